"""The output folder of ``fastbert prepare``: whose it is, what is complete in it, and where a run goes on.

``prepared.json`` is written after the shards that it names, and holds all that a run needs to go on behind them. Beside it, until
the end: ``inputs.json``, sizes and times of the files of the corpus, and ``seen.sqlite``, digests of the documents read.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastbert.data.errors import CorpusError
from fastbert.data.shards import FORMAT, HELD_OUT, MANIFEST, SPLITS, TRAIN, Shard, check_sizes, read_manifest
from fastbert.runs.errors import SettingsError
from fastbert.runs.folder import check_writable
from fastbert.runs.whole_file import whole_file

from .reader import Position
from .seen import delete_seen
from .settings import PrepareSettings

INPUTS, SEEN = "inputs.json", "seen.sqlite"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
_SHARD = re.compile(rf"({'|'.join(SPLITS)})-\d{{5,}}\.safetensors")
# Shards that appear in prepared.json in time, and what a process that was killed left of a file.
_UNFINISHED = re.compile(rf"\.({_SHARD.pattern}|{re.escape(MANIFEST)}|{re.escape(INPUTS)})\.new")
_OWN = re.compile(f"{_SHARD.pattern}|{_UNFINISHED.pattern}")
_COUNTS = ("documents", "sentences", "words", "characters", "tokens", "empty", "cut_sentences")


class PreparedFolder:
    """A folder that is being filled. manifest: the content of ``prepared.json``, JSON-ready; position: behind its shards."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest

    @classmethod
    def begin(cls, settings: PrepareSettings, inputs: dict[str, Any]) -> PreparedFolder:
        """An empty one; with ``overwrite`` what a run left there is deleted first. Raises OSError."""
        path = Path(settings.output)
        if settings.overwrite:
            _delete(path)
        path.mkdir(parents=True, exist_ok=True)
        _write_json(path / INPUTS, inputs)
        counts = {f"{split}_{name}": 0 for split in ("train", "held_out") for name in ("documents", "sentences", "tokens")}
        folder = cls(
            path,
            {
                "format": FORMAT,
                "complete": False,
                "settings": settings.deciding(),
                "tokenizer": None,
                "shards": {split: [] for split in SPLITS},
                "facts": {**dict.fromkeys(_COUNTS, 0), **counts},
                "position": asdict(Position.start()),
            },
        )
        folder.write()
        return folder

    @classmethod
    def resume(cls, settings: PrepareSettings) -> PreparedFolder:
        """Raises CorpusError for shards that were cut short, and where the digests of the documents read are gone. Files that are
        not in the manifest are going to be written again."""
        path = Path(settings.output)
        folder = cls(path, read_manifest(path))
        check_sizes(path, folder.manifest)
        if folder.position.batch and not settings.keep_duplicates and not (path / SEEN).is_file():
            raise CorpusError(f"{path / SEEN} is gone, without which the run cannot go on; --overwrite begins anew")
        folder.manifest["settings"] = settings.deciding()
        return folder

    @property
    def position(self) -> Position:
        try:
            return Position(**self.manifest["position"])
        except TypeError as error:
            raise CorpusError(f"{self.path / MANIFEST}: damaged ({error}); prepare the corpus anew") from error

    @property
    def facts(self) -> dict[str, Any]:
        return self.manifest["facts"]

    @property
    def num_shards(self) -> int:
        return sum(map(len, self.manifest["shards"].values()))

    def inputs(self) -> dict[str, Any]:
        """The files of the corpus when the run began. Raises CorpusError."""
        try:
            return json.loads((self.path / INPUTS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CorpusError(
                f"{self.path / INPUTS} cannot be read ({error}): the run cannot go on; --overwrite begins anew"
            ) from error

    def add(self, train: Shard | None, held_out: Shard | None, counts: dict[str, int], position: Position) -> None:
        """Takes shards that are written into the manifest: from here on a run goes on behind them."""
        for split, shard in ((TRAIN, train), (HELD_OUT, held_out)):
            if shard is not None:
                self.manifest["shards"][split].append(asdict(shard))
        for name, count in counts.items():
            self.facts[name] += count
        self.manifest["position"] = asdict(position)
        self.write()

    def finish(self, facts: dict[str, Any]) -> None:
        """Marks the folder as complete, with all its facts, and deletes what only a run needs."""
        self.manifest |= {"complete": True, "facts": facts}
        del self.manifest["position"]
        self.write()
        _delete_progress(self.path)

    def write(self) -> None:
        _write_json(self.path / MANIFEST, self.manifest)


def check_output(settings: PrepareSettings) -> None:
    """Refuses, before any work, an output folder that must not be written to.

    Raises :class:`SettingsError` where it holds a prepared corpus, or a part of one, and neither ``resume`` nor ``overwrite`` is
    set; where there is nothing to resume, or the run in it had other settings; where files of the same names are from elsewhere,
    and where they are the tokenizer that is asked for; OSError where it cannot be written to.
    """
    output = Path(settings.output)
    check_writable(output)
    if settings.tokenizer is not None and output.resolve() == Path(settings.tokenizer).resolve():
        raise SettingsError(f"--output {output} is the folder of the tokenizer; give another one")
    begun = (output / MANIFEST).is_file()
    if settings.resume and not begun:
        raise SettingsError(f"{output} holds no prepared corpus: there is nothing to resume (leave out --resume to begin one)")
    if not begun:
        # What a run that was killed before its first manifest left is nobody's.
        names = [path.name for path in _own_files(output)]
        strangers = [name for name in names if name != INPUTS and not _UNFINISHED.fullmatch(name)]
        if strangers:
            raise SettingsError(
                f"{output} holds {', '.join(strangers)} but no {MANIFEST}, so these are not from fastbert prepare and are left "
                "alone; choose another --output"
            )
        return
    if settings.overwrite:
        return
    manifest = read_manifest(output)
    if manifest["complete"]:
        if settings.resume:
            _delete_progress(output)  # a run may have been killed between its last two steps
        what = "there is nothing to resume" if settings.resume else "pretrain reads it"
        raise SettingsError(f"{output} holds a prepared corpus, complete: {what} (--overwrite makes it anew)")
    if not settings.resume:
        raise SettingsError(
            f"{output} holds a corpus prepared in part: --resume goes on with it, --overwrite deletes it, --output names another "
            "folder"
        )
    settings.refuse_changes(settings.output, settings.deciding(), manifest["settings"])


def settings_of(output: str) -> dict[str, Any]:
    """The settings of the run in ``output``, by name; empty where there is none. Raises CorpusError."""
    if not (Path(output) / MANIFEST).is_file():
        return {}
    return read_manifest(Path(output))["settings"]


def _own_files(output: Path) -> list[Path]:
    if not output.is_dir():
        return []
    names = (MANIFEST, INPUTS, SEEN, f"{SEEN}-journal", *_TOKENIZER_FILES)
    return sorted(path for path in output.iterdir() if path.name in names or _OWN.fullmatch(path.name))


def _delete_progress(output: Path) -> None:
    """What only a run that is not at its end needs."""
    (output / INPUTS).unlink(missing_ok=True)
    delete_seen(output / SEEN)


def _delete(output: Path) -> None:
    """Deletes the files of a run and nothing else; the manifest goes last, so that a deletion that was stopped can be repeated."""
    for path in sorted(_own_files(output), key=lambda path: path.name == MANIFEST):
        path.unlink()


def _write_json(path: Path, document: Any) -> None:
    with whole_file(path, on_disk=True) as beside:
        beside.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
