"""Every setting of a pretraining run: defaults, checks, model sizes, and which of them a continued run may change.

Nothing here imports torch or transformers, so the command line can refuse a wrong request at once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from .command_settings import CommandSettings, option
from .errors import SettingsError

DEFAULT_VOCAB_SIZE = 30522
DEFAULT_DROPOUT = 0.1
HEAD_SIZE = 64


@dataclass(frozen=True)
class ModelSize:
    """The four numbers that make a BERT small or large, under transformers' names."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int


# The sizes that Google published: Turc et al., "Well-Read Students Learn Better" (2019), and Devlin et al., "BERT" (2019).
MODEL_PRESETS = {
    "tiny": ModelSize(2, 128, 2, 512),
    "mini": ModelSize(4, 256, 4, 1024),
    "small": ModelSize(4, 512, 8, 2048),
    "medium": ModelSize(8, 512, 8, 2048),
    "base": ModelSize(12, 768, 12, 3072),
    "large": ModelSize(24, 1024, 16, 4096),
}

_SIZE_NAMES = tuple(field.name for field in dataclasses.fields(ModelSize))


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(CommandSettings):
    """The settings of ``fastbert pretrain``; the command's options carry the same names.

    ``corpus``: files, folders or a Hugging Face dataset name; empty for the text that every installation holds.
    ``tokenizer``: a folder or a Hub name; None trains a WordPiece vocabulary of at most ``vocab_size``
    entries, or takes the tokenizer of ``model`` where that is a folder. ``model``: one of :data:`MODEL_PRESETS`, or a
    checkpoint (folder or Hub name) to continue from; the four sizes override a preset. ``tokens_per_batch``: real tokens,
    padding excluded. ``warmup_steps``: None for a tenth of ``steps``. ``dropout``: None for 0.1, or for 0 with ``compare``.
    ``compare_steps``: None compares every step.

    Raises :class:`SettingsError`, naming the setting, for a value or a combination that cannot work.
    """

    output: str = "runs/pretrain"
    corpus: tuple[str, ...] = ()
    text_column: str = "text"
    tokenizer: str | None = None
    vocab_size: int | None = None
    model: str = "mini"
    num_hidden_layers: int | None = None
    hidden_size: int | None = None
    num_attention_heads: int | None = None
    intermediate_size: int | None = None
    max_seq_length: int = 128
    tokens_per_batch: int = 4096
    steps: int = 1000
    learning_rate: float = 5e-4
    warmup_steps: int | None = None
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    seed: int = 0
    save_steps: int = 500
    log_steps: int = 10
    dropout: float | None = None
    held_out_fraction: float = 0.05
    device: str = "auto"
    compare: bool = False
    compare_steps: int | None = None
    resume: bool = False
    overwrite: bool = False

    command_name: ClassVar[str] = "pretrain"
    changeable_on_resume: ClassVar[frozenset[str]] = CommandSettings.changeable_on_resume | {"save_steps", "log_steps"}
    least: ClassVar[dict[str, int]] = {
        **dict.fromkeys(_SIZE_NAMES, 1),
        **dict.fromkeys(("steps", "save_steps", "log_steps", "compare_steps"), 1),
        "warmup_steps": 0,
        "seed": 0,
        "max_seq_length": 8,
        "vocab_size": 100,
    }

    def __post_init__(self) -> None:
        object.__setattr__(self, "corpus", tuple(self.corpus))
        self.check_least()
        self.check_positive("learning_rate", "max_grad_norm")
        self.check_not_negative("weight_decay")
        if not 0 < self.held_out_fraction < 1:
            raise SettingsError(f"--held-out-fraction is {self.held_out_fraction}; it must lie between 0 and 1")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise SettingsError(f"--dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.tokens_per_batch < self.max_seq_length:
            raise SettingsError(
                f"--tokens-per-batch {self.tokens_per_batch} holds no sequence of --max-seq-length {self.max_seq_length}"
            )
        if self.warmup_steps is not None and self.warmup_steps > self.steps:
            raise SettingsError(f"--warmup-steps {self.warmup_steps} is more than --steps {self.steps}")
        if self.tokenizer is not None and self.vocab_size is not None:
            raise SettingsError("--vocab-size is for a vocabulary that is trained; leave it out where --tokenizer is given")
        if self.compare_steps is not None and not self.compare:
            raise SettingsError("--compare-steps needs --compare")
        if self.compare and self.dropout:
            raise SettingsError("--compare trains both models without dropout; leave --dropout out or set it to 0")
        self.check_resume_or_overwrite()
        self._check_model()

    def _check_model(self) -> None:
        if self.continues_checkpoint:
            given = [name for name in _SIZE_NAMES if getattr(self, name) is not None]
            if given:
                raise SettingsError(
                    f"{', '.join(map(option, given))}: the sizes of {self.model!r} are those of its checkpoint; "
                    f"they can be chosen with --model {', '.join(MODEL_PRESETS)}"
                )
            if self.vocab_size is not None:
                raise SettingsError(f"--vocab-size: {self.model!r} comes with its vocabulary; leave the option out")
            return
        size = self.model_size()
        if size.hidden_size % size.num_attention_heads:
            raise SettingsError(
                f"--hidden-size {size.hidden_size} is not a multiple of --num-attention-heads {size.num_attention_heads}"
            )

    @property
    def continues_checkpoint(self) -> bool:
        """Whether training starts from the weights of a checkpoint instead of fresh ones."""
        return self.model not in MODEL_PRESETS

    def model_size(self) -> ModelSize:
        """The preset with the given sizes put in; a new hidden size brings heads of 64 and an intermediate size of 4x."""
        preset = MODEL_PRESETS[self.model]
        hidden_size = self.hidden_size or preset.hidden_size
        heads, intermediate_size = preset.num_attention_heads, preset.intermediate_size
        if hidden_size != preset.hidden_size:
            heads, intermediate_size = max(1, hidden_size // HEAD_SIZE), 4 * hidden_size
        return ModelSize(
            num_hidden_layers=self.num_hidden_layers or preset.num_hidden_layers,
            hidden_size=hidden_size,
            num_attention_heads=self.num_attention_heads or heads,
            intermediate_size=self.intermediate_size or intermediate_size,
        )

    @property
    def effective_warmup_steps(self) -> int:
        return self.steps // 10 if self.warmup_steps is None else self.warmup_steps

    @property
    def effective_dropout(self) -> float:
        """The probability for hidden states and attention: BERT's 0.1 unless given, 0 where two models are compared."""
        if self.dropout is not None:
            return self.dropout
        return 0.0 if self.compare else DEFAULT_DROPOUT

    @property
    def effective_compare_steps(self) -> int:
        if not self.compare:
            return 0
        return self.steps if self.compare_steps is None else min(self.compare_steps, self.steps)
