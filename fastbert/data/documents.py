"""What a corpus is made of: documents of paragraphs, and the counts of a corpus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

_SOURCES_SHOWN = 6


@dataclass
class Document:
    """A text whose sentences follow one another.

    source: the file, dataset or package that it came from; paragraphs: never empty strings, at least one.
    """

    source: str
    paragraphs: list[str]


@dataclass(frozen=True)
class CorpusReport:
    """Counts of a corpus. sources: documents per source, in the order of reading; words: separated by white space."""

    sources: dict[str, int]
    documents: int
    paragraphs: int
    characters: int
    words: int

    @classmethod
    def from_documents(cls, documents: Iterable[Document]) -> CorpusReport:
        """Counts ``documents``; characters are those of the paragraphs, without line ends."""
        sources: Counter[str] = Counter()
        paragraphs = characters = words = 0
        for document in documents:
            sources[document.source] += 1
            paragraphs += len(document.paragraphs)
            for paragraph in document.paragraphs:
                characters += len(paragraph)
                words += len(paragraph.split())
        return cls(dict(sources), sum(sources.values()), paragraphs, characters, words)

    def __str__(self) -> str:
        largest = sorted(self.sources.items(), key=lambda item: (-item[1], item[0]))
        shown = ", ".join(f"{name} {count:,}" for name, count in largest[:_SOURCES_SHOWN])
        more = len(largest) - _SOURCES_SHOWN
        rest = f" and {more:,} more sources" if more > 0 else ""
        return (
            f"{self.documents:,} documents, {self.paragraphs:,} paragraphs, {self.words:,} words, "
            f"{self.characters / 1e6:.1f} M characters (documents by source: {shown}{rest})"
        )
