"""Every setting of a fine-tuning run: defaults and checks. Nothing here imports torch or transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastbert.runs.command_settings import CommandSettings
from fastbert.runs.errors import SettingsError

MODES = ("full", "head", "lora", "top-k")
DTYPES = ("float32", "bfloat16")
# Peak learning rates where none is given: Devlin et al. (2019) search 2e-5 to 5e-5 for all weights; what trains few needs more.
_LEARNING_RATES = {"full": 5e-5, "top-k": 5e-5, "lora": 5e-4, "head": 1e-3}
_OF_MODE = {"top_k_layers": "top-k", "lora_r": "lora", "lora_alpha": "lora"}


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(CommandSettings):
    """The settings of ``fastbert finetune``; the command's options carry the same names.

    ``task``: see :func:`fastbert.tasks.registry.task_for`. ``data``: a folder with train, dev and test files, a training file, or a
    Hugging Face dataset; ``dev``, ``test``: files besides; without any dev data ``dev_fraction`` of the training data is held out.
    ``label_column``: several are labels of their own, with 0 or 1 in each row. ``learning_rate``: None for the mode's usual one.
    ``max_seq_length``: None for what the model takes (384 in question answering). ``max_steps``: None for all of ``epochs``.
    ``warmup``: share of the steps. ``eval_steps``: None evaluates after every epoch; ``early_stopping``: evaluations without a
    better score after which training ends. ``metric``: that chooses the best checkpoint, None for the task's. ``limit``: examples
    of each split that are used (drawn, the same in every run), for a quick look. ``adapt``: raw text of the domain (files, folders
    or a dataset) on which the masked language model goes on first, for ``adapt_steps``.

    Raises :class:`SettingsError`, naming the setting, for a value or a combination that cannot work.
    """

    task: str
    model: str
    data: str
    dev: str | None = None
    test: str | None = None
    output: str = "runs/finetune"
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: tuple[str, ...] = ()
    label_separator: str = ","
    mode: str = "full"
    top_k_layers: int | None = None
    lora_r: int | None = None
    lora_alpha: int | None = None
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 32
    gradient_accumulation_steps: int = 1
    learning_rate: float | None = None
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    max_seq_length: int | None = None
    seeds: tuple[int, ...] = (0,)
    dtype: str = "float32"
    metric: str | None = None
    eval_steps: int | None = None
    early_stopping: int | None = None
    dev_fraction: float = 0.1
    limit: int | None = None
    device: str = "auto"
    adapt: tuple[str, ...] = ()
    adapt_steps: int | None = None
    resume: bool = False
    overwrite: bool = False

    command_name: ClassVar[str] = "finetune"
    least: ClassVar[dict[str, int]] = {
        **dict.fromkeys(("top_k_layers", "lora_r", "lora_alpha", "max_steps", "batch_size", "gradient_accumulation_steps"), 1),
        **dict.fromkeys(("eval_steps", "early_stopping", "limit", "adapt_steps"), 1),
        "max_seq_length": 8,
    }

    def __post_init__(self) -> None:
        for name in ("label_column", "seeds", "adapt"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self.check_least()
        self.check_one_of("mode", MODES)
        self.check_one_of("dtype", DTYPES)
        self.check_positive("epochs", "learning_rate", "max_grad_norm")
        self.check_not_negative("weight_decay")
        if not 0 <= self.warmup < 1:
            raise SettingsError(f"--warmup is {self.warmup}; it is a share of the steps, at least 0 and below 1")
        if not 0 < self.dev_fraction < 1:
            raise SettingsError(f"--dev-fraction is {self.dev_fraction}; it must lie between 0 and 1")
        self.check_seeds(self.seeds)
        for name, mode in _OF_MODE.items():
            if getattr(self, name) is not None and self.mode != mode:
                raise SettingsError(f"--{name.replace('_', '-')} is for --mode {mode}, not for --mode {self.mode}")
        if not self.label_separator:
            raise SettingsError("--label-separator is empty; it is what stands between two labels, such as ;")
        self.check_not_empty()
        if self.adapt_steps is not None and not self.adapt:
            raise SettingsError("--adapt-steps is for --adapt CORPUS")
        self.check_resume_or_overwrite()

    @property
    def effective_learning_rate(self) -> float:
        return _LEARNING_RATES[self.mode] if self.learning_rate is None else self.learning_rate
