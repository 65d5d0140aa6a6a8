"""Every setting of a pretraining run: defaults, checks, model sizes, and which of them a continued run may change.

Nothing here imports torch or transformers, so the command line can refuse a wrong request at once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from fastbert.data.streams import LARGEST_SEED
from fastbert.runs.command_settings import CommandSettings, option
from fastbert.runs.errors import SettingsError

DEFAULT_VOCAB_SIZE = 30522
DEFAULT_DROPOUT = 0.1
DEFAULT_HELD_OUT_FRACTION = 0.05
HEAD_SIZE = 64
DTYPES = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "lamb")
OPTIMIZER_BACKENDS = ("torch", "cuda")
SCHEDULES = ("linear", "polynomial", "one-cycle")
OBJECTIVES = ("mlm-nsp", "mlm")
MASKINGS = ("token", "whole-word", "span")
TRACKERS = ("tensorboard", "trackio", "wandb")


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


@dataclass(frozen=True)
class Phase:
    """Steps ``first_step + 1`` to ``last_step`` of a run, on sequences of at most ``max_seq_length`` tokens."""

    number: int
    first_step: int
    last_step: int
    max_seq_length: int

    @property
    def steps(self) -> int:
        return self.last_step - self.first_step


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(CommandSettings):
    """The settings of ``fastbert pretrain``; the command's options carry the same names.

    ``corpus``: files, folders or a Hugging Face dataset name, or one folder that ``fastbert prepare`` made; empty for the text
    that every installation holds.
    ``tokenizer``: a folder or a Hub name; None trains a WordPiece vocabulary of at most ``vocab_size``
    entries, or takes the tokenizer of ``model`` where that is a folder. ``model``: one of :data:`MODEL_PRESETS`, or a
    checkpoint (folder or Hub name) to continue from; the four sizes override a preset. ``tokens_per_batch``: real tokens,
    padding excluded. ``batches_per_step``: batches whose gradients make a step, over all processes together, so that the same
    steps are taken whatever the number of processes is. ``second_phase_steps``: the last steps of ``steps``, on sequences of
    ``second_phase_seq_length`` (Devlin et al., 2019: 90% of the steps with 128 tokens, the rest with 512), with a warmup and a
    peak of their own where ``second_phase_learning_rate`` is given. ``warmup_steps``: None for a tenth of ``steps``.
    ``dropout``: None for 0.1, or for 0 with ``compare``. ``held_out_fraction``: None for 0.05, or for what a prepared corpus
    has. ``loss_spike``: a step whose loss is above this many times the running mean is left out, as one that is not finite
    is; ``max_skipped_steps`` of them end the run. ``optimizer_backend``: whose kernels take the optimizer's steps, torch's or the
    ones in CUDA C++. ``cuda_graph``: record the step, where it can be, and say why where it cannot. ``compare_steps``: None
    compares every step.

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
    batches_per_step: int = 1
    steps: int = 1000
    second_phase_steps: int = 0
    second_phase_seq_length: int = 512
    second_phase_learning_rate: float | None = None
    objective: str = "mlm-nsp"
    masking: str = "token"
    mlm_probability: float = 0.15
    static_pairs: bool = False
    optimizer: str = "adamw"
    optimizer_backend: str = "torch"
    schedule: str = "linear"
    learning_rate: float = 5e-4
    warmup_steps: int | None = None
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    loss_spike: float = 2.0
    max_skipped_steps: int = 10
    dtype: str = "float32"
    gradient_checkpointing: bool = False
    cuda_graph: bool = False
    seed: int = 0
    save_steps: int = 500
    keep_checkpoints: int = 2
    log_steps: int = 10
    report_to: tuple[str, ...] = ()
    dropout: float | None = None
    held_out_fraction: float | None = None
    workers: int = 0
    device: str = "auto"
    compare: bool = False
    compare_steps: int | None = None
    resume: bool = False
    overwrite: bool = False

    command_name: ClassVar[str] = "pretrain"
    changeable_on_resume: ClassVar[frozenset[str]] = CommandSettings.changeable_on_resume | {
        "save_steps", "keep_checkpoints", "log_steps", "report_to", "workers", "max_skipped_steps",
        "optimizer_backend",
    }  # fmt: skip
    least: ClassVar[dict[str, int]] = {
        **dict.fromkeys(_SIZE_NAMES, 1),
        **dict.fromkeys(("steps", "save_steps", "keep_checkpoints", "log_steps", "compare_steps", "batches_per_step"), 1),
        **dict.fromkeys(("warmup_steps", "second_phase_steps", "max_skipped_steps", "workers", "seed"), 0),
        **dict.fromkeys(("max_seq_length", "second_phase_seq_length"), 8),
        "vocab_size": 200,
    }

    def __post_init__(self) -> None:
        object.__setattr__(self, "corpus", tuple(self.corpus))
        object.__setattr__(self, "report_to", tuple(self.report_to))
        self.check_not_empty()
        self.check_least()
        if self.seed > LARGEST_SEED:
            raise SettingsError(f"--seed is {self.seed}; the largest seed is {LARGEST_SEED}")
        self.check_positive("learning_rate", "second_phase_learning_rate", "max_grad_norm")
        self.check_not_negative("weight_decay")
        for name, allowed in (
            ("dtype", DTYPES), ("optimizer", OPTIMIZERS), ("optimizer_backend", OPTIMIZER_BACKENDS), ("schedule", SCHEDULES),
            ("objective", OBJECTIVES), ("masking", MASKINGS),
        ):  # fmt: skip
            self.check_one_of(name, allowed)
        if unknown := sorted(set(self.report_to) - set(TRACKERS)):
            raise SettingsError(f"--report-to is {' '.join(unknown)}; it must be some of {', '.join(TRACKERS)}")
        for name in ("held_out_fraction", "mlm_probability"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise SettingsError(f"{option(name)} is {value}; it must lie between 0 and 1")
        if not (self.loss_spike == 0 or 1 < self.loss_spike < float("inf")):
            raise SettingsError(f"--loss-spike is {self.loss_spike}; it must be above 1, or 0 (no loss is too high)")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise SettingsError(f"--dropout is {self.dropout}; it must be at least 0 and below 1")
        for phase in self.phases:
            if self.tokens_per_batch < phase.max_seq_length:
                name = "max_seq_length" if phase.number == 1 else "second_phase_seq_length"
                raise SettingsError(
                    f"--tokens-per-batch {self.tokens_per_batch} holds no sequence of {option(name)} {phase.max_seq_length}"
                )
        self._check_phases()
        if self.warmup_steps is not None and self.warmup_steps > self.steps:
            raise SettingsError(f"--warmup-steps {self.warmup_steps} is more than --steps {self.steps}")
        if self.tokenizer is not None and self.vocab_size is not None:
            raise SettingsError("--vocab-size is for a vocabulary that is trained; leave it out where --tokenizer is given")
        if self.compare_steps is not None and not self.compare:
            raise SettingsError("--compare-steps needs --compare")
        self._check_comparison()
        self.check_resume_or_overwrite()
        self._check_model()

    def _check_phases(self) -> None:
        if self.second_phase_steps >= self.steps:
            raise SettingsError(
                f"--second-phase-steps {self.second_phase_steps} are the last of --steps {self.steps} and must be fewer than them"
            )
        if self.second_phase_learning_rate is not None and not self.second_phase_steps:
            raise SettingsError("--second-phase-learning-rate needs --second-phase-steps")

    def _check_comparison(self) -> None:
        if not self.compare:
            return
        if self.dropout:
            raise SettingsError("--compare trains both models without dropout; leave --dropout out or set it to 0")
        changed = self.not_default("batches_per_step", "second_phase_steps", "objective", "dtype", "gradient_checkpointing")
        if changed:
            raise SettingsError(
                f"--compare is for runs of one batch a step in one phase with both objectives in float32; leave out "
                f"{', '.join(map(option, changed))}"
            )

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
    def phases(self) -> tuple[Phase, ...]:
        """One or two, in order; together all steps."""
        first = self.steps - self.second_phase_steps
        phases = (Phase(1, 0, first, self.max_seq_length), Phase(2, first, self.steps, self.second_phase_seq_length))
        return phases if self.second_phase_steps else phases[:1]

    @property
    def longest_sequence(self) -> int:
        return max(phase.max_seq_length for phase in self.phases)

    @property
    def effective_held_out_fraction(self) -> float:
        return DEFAULT_HELD_OUT_FRACTION if self.held_out_fraction is None else self.held_out_fraction

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
