"""Every setting of a GLUE run: defaults and checks. Nothing here imports torch or transformers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fastbert.finetune.settings import FinetuneSettings
from fastbert.runs.command_settings import CommandSettings
from fastbert.runs.errors import SettingsError
from fastbert.tasks.glue_tasks import GlueTask, glue_task


@dataclass(frozen=True, kw_only=True)
class GlueSettings(CommandSettings):
    """The settings of ``fastbert glue``; the command's options carry the same names, and those of fine-tuning mean the same there.

    ``data``: a folder laid out as GLUE's own download. ``tasks``: names in any spelling, empty for all nine. ``seeds``: a model of
    each task for each of them. ``limit``: examples of each split that are used, for a quick look.

    Raises :class:`SettingsError`, naming the setting, for a value or a combination that cannot work.
    """

    data: str
    model: str
    output: str = "runs/glue"
    tasks: tuple[str, ...] = ()
    seeds: tuple[int, ...] = FinetuneSettings.seeds
    mode: str = FinetuneSettings.mode
    top_k_layers: int | None = None
    lora_r: int | None = None
    lora_alpha: int | None = None
    epochs: float = FinetuneSettings.epochs
    batch_size: int = FinetuneSettings.batch_size
    learning_rate: float | None = None
    max_seq_length: int = 128
    dtype: str = FinetuneSettings.dtype
    limit: int | None = None
    device: str = FinetuneSettings.device
    resume: bool = False
    overwrite: bool = False

    command_name: ClassVar[str] = "glue"
    # What a continued run may ask for anew: it leaves the models as they are that are there.
    changeable_on_resume: ClassVar[frozenset[str]] = CommandSettings.changeable_on_resume | {"tasks", "seeds"}

    def __post_init__(self) -> None:
        self.check_not_empty()
        object.__setattr__(self, "tasks", tuple(glue_task(name).name for name in self.tasks))
        object.__setattr__(self, "seeds", tuple(self.seeds))
        if len(set(self.tasks)) < len(self.tasks):
            raise SettingsError(f"--tasks is {' '.join(self.tasks)}; each of them once")
        self.check_resume_or_overwrite()
        self.check_seeds(self.seeds)
        self.of_pair(glue_task("cola"), 0, model=self.model, data=Path(self.data), output=Path(self.output))

    def of_pair(self, task: GlueTask, seed: int, *, model: str, data: Path, output: Path) -> FinetuneSettings:
        """The fine-tuning of one task with one seed, from ``model`` on the files of the folder ``data``.

        Raises SettingsError for what fine-tuning refuses.
        """
        own = {"data", "model", "output", "tasks", "seeds", "resume", "overwrite"}
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in own}
        return FinetuneSettings(task=task.name, model=model, data=str(data), output=str(output), seeds=(seed,), **shared)
