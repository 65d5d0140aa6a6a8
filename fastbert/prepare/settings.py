"""What a run of ``fastbert prepare`` was asked for, checked before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fastbert.runs.command_settings import CommandSettings
from fastbert.runs.errors import SettingsError

DEFAULT_VOCAB_SIZE = 30522
TOKENS_PER_SHARD = 1 << 24


@dataclass(frozen=True, kw_only=True)
class PrepareSettings(CommandSettings):
    """The options of the command by their names.

    ``corpus``: files, folders or names of Hugging Face datasets. ``rows_per_document``: consecutive rows of JSONL, Parquet and
    datasets that make a document; None for one (1,000 of ``bookcorpus``, whose rows are sentences). ``tokenizer``: a folder or a
    Hub name; None trains a WordPiece vocabulary of at most ``vocab_size`` entries on the corpus's beginning.
    ``held_out_fraction``: share of the documents, 0 for none. ``tokens_per_shard``: a shard ends with the batch of documents that
    fills it. ``workers``: processes that encode; None for one per core.

    Raises :class:`SettingsError`, naming the setting, for a value or a combination that cannot work.
    """

    corpus: tuple[str, ...]
    output: str
    text_column: str = "text"
    rows_per_document: int | None = None
    tokenizer: str | None = None
    vocab_size: int | None = None
    held_out_fraction: float = 0.01
    tokens_per_shard: int = TOKENS_PER_SHARD
    keep_duplicates: bool = False
    skip_bad_text: bool = False
    workers: int | None = None
    resume: bool = False
    overwrite: bool = False

    command_name: ClassVar[str] = "prepare"
    # A run that stopped at bad text has left none out so far, and may go on without it.
    changeable_on_resume: ClassVar[frozenset[str]] = frozenset({"output", "workers", "resume", "overwrite", "skip_bad_text"})
    least: ClassVar[dict[str, int]] = {"rows_per_document": 1, "vocab_size": 200, "tokens_per_shard": 1, "workers": 1}

    def __post_init__(self) -> None:
        object.__setattr__(self, "corpus", tuple(self.corpus))
        if not self.corpus:
            raise SettingsError("--corpus: no text to prepare was named")
        self.check_not_empty()
        self.check_least()
        if not 0 <= self.held_out_fraction < 1:
            raise SettingsError(f"--held-out-fraction is {self.held_out_fraction}; it must be at least 0 and below 1")
        if self.tokenizer is not None and self.vocab_size is not None:
            raise SettingsError("--vocab-size is for a vocabulary that is trained; leave it out where --tokenizer is given")
        self.check_resume_or_overwrite()

    def deciding(self) -> dict[str, Any]:
        """What decides about the shards, JSON-ready: it stays with them."""
        others = self.changeable_on_resume - {"skip_bad_text"}
        return {name: value for name, value in self.to_dict().items() if name not in others}
