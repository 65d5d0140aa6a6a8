"""Sentences in words out of CoNLL files and of tables whose cells are lists, as examples."""

from __future__ import annotations

from fastbert.data.conll import read_sentences
from fastbert.data.sources import Source

from .examples import Examples, WordsExample


def read_words(
    source: Source, words: str | None, tags: str | None, entities: bool | None, *, labelled: bool | None = None
) -> Examples[WordsExample]:
    """See :func:`fastbert.data.conll.read_sentences`; ``words`` and ``tags`` are its columns."""
    sentences = read_sentences(source, word_column=words, tag_column=tags, entities=entities, labelled=labelled)
    items = [WordsExample(sentence.place, sentence.words, sentence.tags) for sentence in sentences]
    return Examples(str(source), items, {field: name for field, name in (("words", words), ("tags", tags)) if name is not None})
