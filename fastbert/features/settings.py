"""What a run of ``fastbert embed`` was asked for, checked before anything heavy is imported."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fastbert.runs.command_settings import CommandSettings
from fastbert.runs.errors import SettingsError
from fastbert.runs.folder import check_place

DTYPES = ("float32", "bfloat16", "int8")
LEVELS = ("sequence", "token")
OUTPUT_TYPES = (".npy", ".parquet", ".jsonl")
POOLINGS = ("mean", "cls", "max", "last-4")
# Packed tokens of a batch: from 1,024 on the rate of matmuls is nearly flat on CPUs; larger batches only take more memory.
TOKENS_PER_BATCH = 4096
# What a run keeps its finished chunks in, and the names of all that it writes there.
MANIFEST = "manifest.json"
_OURS = re.compile(r"manifest\.json|\.manifest\.json\.new|\.?chunk-\d+-[0-9a-f]+\.npz(\.new)?")


def check_pooling(pooling: str | None, level: str) -> str | None:
    """The pooling of ``level``: at level "sequence" None stands for "mean", at level "token" it is none.

    Raises SettingsError for names that are not known and for what has no meaning for tokens.
    """
    if level not in LEVELS:
        raise SettingsError(f"--level {level} is not known; known are {', '.join(LEVELS)}")
    if pooling not in (None, *POOLINGS):
        raise SettingsError(f"--pooling {pooling} is not known; known are {', '.join(POOLINGS)}")
    if level == "token" and pooling not in (None, "last-4"):
        raise SettingsError(f"--pooling {pooling} makes one row of a text, and --level token has one per token: leave one out")
    return "mean" if pooling is None and level == "sequence" else pooling


@dataclass(frozen=True, kw_only=True)
class EmbedSettings(CommandSettings):
    """The options of the command by their names; ``pooling`` None and ``dtype`` None: see
    :class:`fastbert.features.embedder.Embedder`.

    Raises SettingsError for values that cannot work, whatever the model.
    """

    command_name = "embed"
    least = {"max_seq_length": 1, "tokens_per_batch": 1, "num_processes": 1}

    model: str
    input: tuple[str, ...]
    output: Path
    pooling: str | None = None
    level: str = "sequence"
    normalize: bool = False
    text_column: str | None = None
    text_pair_column: str | None = None
    words_column: str | None = None
    split: str = "train"
    max_seq_length: int | None = None
    tokens_per_batch: int = TOKENS_PER_BATCH
    num_processes: int = 1
    dtype: str | None = None
    device: str = "auto"
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "pooling", check_pooling(self.pooling, self.level))
        self.check_not_empty()
        self.check_least()
        self.check_resume_or_overwrite()
        if not self.input:
            raise SettingsError("--input: nothing to embed was named")
        if self.input.count("-") > 1:
            raise SettingsError("--input - is standard input, which can be read once")
        if self.output.suffix.lower() not in OUTPUT_TYPES:
            raise SettingsError(
                f"--output {self.output}: the name must end in one of {', '.join(OUTPUT_TYPES)}, which is the format"
            )
        if self.dtype not in (None, *DTYPES):
            raise SettingsError(f"--dtype {self.dtype} is not known; known are {', '.join(DTYPES)}")
        if self.words_column is not None and (self.text_column is not None or self.text_pair_column is not None):
            raise SettingsError("--words-column holds the whole text, in words: no --text-column or --text-pair-column beside it")

    @property
    def files(self) -> list[Path]:
        """All that the run writes: the output, and at level "token" of ``.npy`` beside it the one of the offsets."""
        offsets = self.level == "token" and self.output.suffix.lower() == ".npy"
        return [self.output, offsets_of(self.output)] if offsets else [self.output]

    def deciding(self) -> dict[str, Any]:
        """What decides about the output beside model, input and kind of device: a run that goes on must have the same."""
        others = ("model", "input", "output", "num_processes", "device", "resume", "overwrite")
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in others}

    def embedder_settings(self) -> dict[str, Any]:
        """Keyword arguments of ``Embedder.from_pretrained``."""
        names = ("pooling", "level", "normalize", "max_seq_length", "tokens_per_batch", "dtype", "device")
        return {**{name: getattr(self, name) for name in names}, "words": self.words_column is not None}


def parts_folder(output: Path) -> Path:
    return output.with_name(f"{output.name}.parts")


def check_output(settings: EmbedSettings) -> None:
    """Refuses, before any work, an output that must not be written.

    Raises SettingsError where it is one of the inputs, where it, or what a run has left of it, is there and neither ``resume`` nor
    ``overwrite`` is set, where the run that ``resume`` means is done, and where the folder of parts holds files that are none of
    ours; OSError where the output cannot be written.
    """
    output, folder = settings.output, parts_folder(settings.output)
    if any(output.resolve() == Path(name).resolve() for name in settings.input):
        raise SettingsError(f"--output {output} is one of the inputs; give another name")
    if output.is_dir():
        raise SettingsError(f"--output {output} is a folder; give the name of a file")
    check_place(output)
    if folder.exists() and (not folder.is_dir() or any(not _OURS.fullmatch(path.name) for path in folder.iterdir())):
        raise SettingsError(
            f"{folder} holds files that are from no run of fastbert embed and are left alone: choose another --output"
        )
    if settings.overwrite or (settings.resume and folder.exists()):
        return
    if folder.exists():
        raise SettingsError(f"{folder} holds an unfinished run: --resume goes on with it, --overwrite begins anew")
    for path in settings.files:
        if path.exists() and settings.resume:
            raise SettingsError(f"{path} is there and whole: there is nothing to resume (--overwrite makes it anew)")
        if path.exists():
            raise SettingsError(f"{path} is there already: --overwrite makes it anew, --output names another file")


def offsets_of(output: Path) -> Path:
    """Where the offsets of a ``.npy`` of tokens are."""
    return output.with_suffix(".offsets.npy")
