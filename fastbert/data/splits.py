"""Which file, or which split of a Hugging Face dataset, is for training, which for choosing (dev) and which for testing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from fastbert.data.errors import DataError
from fastbert.data.hub import no_waiting_for_the_hub
from fastbert.data.sources import DATASET_NAME, Source
from fastbert.data.tables import TABLE_TYPES, file_kind

SPLITS = ("train", "dev", "dev_mismatched", "test", "test_mismatched")
SPLIT_FILE_TYPES = (*TABLE_TYPES, ".conll", ".conllu", ".iob2", ".iob", ".bio")

# A word of a name, between anything but letters: in en_ewt-ud-train and wnut17train, not in latest.
_WORDS = {"train": "train(ing)?", "dev": "dev(elopment)?|val(id(ation)?)?", "test": "test"}
_WORD_OF = {split: re.compile(f"(?<![a-z])({words})(?![a-z])") for split, words in _WORDS.items()}
_MISMATCHED = re.compile("(?<![a-z])mismatched(?![a-z])")


def find_splits(data: str, *, dev: str | None = None, test: str | None = None) -> dict[str, Source]:
    """The sources of the splits that there are, by their names in :data:`SPLITS`; train is always among them.

    ``data`` is
    - a folder: the file whose name (without its type) is or has in it the word train or training is that of train; dev,
      development, val, valid or validation make it dev, test makes it test, with mismatched (as in MNLI) dev_mismatched or
      test_mismatched. Hidden files, files of other types and subfolders are not looked at;
    - a file: train;
    - else the name of a Hugging Face dataset, ``name`` or ``name:config``, whose splits are told apart by the same words.

    ``dev`` and ``test`` are files that take the place of what ``data`` has for them. Raises DataError for what is not there, for
    two files (or splits) that could be the same split, naming both, and where none is for training.
    """
    given = {name: _given_file(name, path) for name, path in (("dev", dev), ("test", test)) if path is not None}
    path = Path(data)
    if path.is_dir():
        found = _splits_of_folder(path, given)
    elif path.is_file():
        found = {"train": Source(path)}
    else:
        found = _splits_of_dataset(data, given)
    found |= given
    return {name: found[name] for name in SPLITS if name in found}


def _given_file(split: str, path: str) -> Source:
    if not Path(path).is_file():
        problem = "a folder, expected a file" if Path(path).is_dir() else "no such file"
        raise DataError(f"{path}: {problem} (given as {split})")
    return Source(Path(path))


def _splits_of_folder(folder: Path, given: Iterable[str]) -> dict[str, Source]:
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    stems = {path: _stem(path) for path in files if file_kind(path) in SPLIT_FILE_TYPES}
    found = {name: Source(path) for name, path in _by_split(str(folder), stems, given, "give the one you mean by itself").items()}
    if "train" not in found:
        listed = ", ".join(path.name for path in files[:10]) or "no files"
        listed += f" and {len(files) - 10} more" if len(files) > 10 else ""
        listed += "".join(f", and a link to nothing, {path.name}" for path in sorted(folder.iterdir()) if not path.exists())
        raise DataError(
            f"{folder}: no file for training: expected one with train in its name, such as train.tsv "
            f"({', '.join(SPLIT_FILE_TYPES)}, also with .gz); the folder holds {listed}"
        )
    return found


def _splits_of_dataset(data: str, given: Iterable[str]) -> dict[str, Source]:
    name = None if data.lower().removesuffix(".gz").endswith(SPLIT_FILE_TYPES) else DATASET_NAME.fullmatch(data)
    if name is None:
        raise DataError(f"{data}: no such file or folder")
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{data}: no such file or folder; for a Hugging Face dataset of this name: pip install 'fastbert[train]'"
        ) from error
    try:
        with no_waiting_for_the_hub(data):
            splits = datasets.get_dataset_split_names(name["name"], name["config"])
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{data}: no such file or folder, and looking for a Hugging Face dataset of this name failed "
            f"({type(error).__name__}: {error})"
        ) from error
    names = _by_split(data, {split: split for split in splits}, given, "save the one you mean as a file")
    if "train" not in names:
        raise DataError(f"{data}: the Hugging Face dataset has no split for training; it has {', '.join(splits)}")
    return {name: Source(dataset=data, split=split) for name, split in names.items()}


def _stem(path: Path) -> str:
    """``en_ewt-ud-train`` of ``en_ewt-ud-train.conllu.gz``."""
    return path.name.lower().removesuffix(".gz").removesuffix(file_kind(path))


def _by_split(data: str, candidates: dict, given: Iterable[str], advice: str) -> dict:
    """Split: candidate; ``candidates`` maps each to the name that tells what it is for. Those that are given are not looked for."""
    found: dict = {}
    for candidate, name in candidates.items():
        splits = [split for split, word in _WORD_OF.items() if word.search(name.lower())]
        if len(splits) > 1:
            raise DataError(f"{data}: {_shown(candidate)} has {' and '.join(splits)} in its name; {advice}")
        if not splits:
            continue
        split = splits[0]
        if split != "train" and _MISMATCHED.search(name.lower()):
            split += "_mismatched"
        if split in given:
            continue
        if split in found:
            raise DataError(f"{data}: both {_shown(found[split])} and {_shown(candidate)} could be {split}; {advice}")
        found[split] = candidate
    return found


def _shown(candidate: Path | str) -> str:
    return candidate.name if isinstance(candidate, Path) else f"the split {candidate}"
