"""Sentence splitting by rule.

Not nltk's punkt, which downloads its model at run time, nor pysbd, which is some hundred times slower: next sentence
prediction needs spans of text in their order, and a boundary missed here or there costs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# The look-behind keeps a long row of dots linear: only its first one starts a match.
_BOUNDARY = re.compile(r"""(?<![.!?…])[.!?…]+["'”’»)\]}]*\s+|[。！？｡]+[」』”’）]*\s*""")
_LONGEST_WORD_BEFORE = 40
_UP_TO_WHITE_SPACE = re.compile(r".*\s", re.DOTALL)
_OPENING = "\"'“‘«([{¿¡—-"
_ABBREVIATION = re.compile(
    r"(?:[^\W\d_]\.)*[^\W\d_]"  # initials: J., U.S., i.e.
    r"|mrs?|ms|messrs|mme|mlle|dr|prof|ste?|mt|ft|rev|hon|gen|col|capt|lt|maj|sgt|cmdr|gov|sen|rep|pres|supt"
    r"|vs|viz|cf|al|ph\.d|approx|esp"
)
_ABBREVIATION_BEFORE_NUMBER = re.compile(
    r"nos?|vols?|pp|figs?|eqs?|ch|chap|sec|art|op|ver|ca|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec"
)


def split_sentences(paragraph: str) -> list[str]:
    """Splits a paragraph into its sentences, in order, none of them empty; only white space between them is lost.

    A sentence ends at ``. ! ? …`` with closing quotes or brackets and white space behind, unless the next one would begin
    with a small letter (in a paragraph that has a capital at all) or the full stop belongs to an abbreviation (``Dr.``),
    to initials (``J. R.``, ``U.S.``), to ``No.`` and the like before a number, or to the number of a list item; and at the
    full-width ``。！？`` in any case.
    """
    paragraph = paragraph.strip()
    has_capitals = not paragraph.islower()
    sentences = []
    start = 0
    for match in _BOUNDARY.finditer(paragraph):
        end = match.end()
        if end < len(paragraph) and _ends_sentence(paragraph, start, match, has_capitals):
            sentences.append(paragraph[start:end].strip())
            start = end
    sentences.append(paragraph[start:].strip())
    return [sentence for sentence in sentences if sentence]


def _ends_sentence(paragraph: str, start: int, match: re.Match[str], has_capitals: bool) -> bool:
    mark = match.group()
    if mark[0] in "。！？｡":
        return True
    following = paragraph[match.end() : match.end() + 4].lstrip(_OPENING)[:1]
    if has_capitals and following.islower():
        return False
    if mark.rstrip() != ".":
        return True
    # All of a text without an end would be copied again for each of its full stops.
    before = paragraph[max(start, match.start() - _LONGEST_WORD_BEFORE) : match.start()]
    words = before.split()
    if not words:
        return True
    word = words[-1].lstrip(_OPENING).lower()
    if _ABBREVIATION.fullmatch(word):
        return False
    if following.isdigit() and _ABBREVIATION_BEFORE_NUMBER.fullmatch(word):
        return False
    is_whole = match.start() - start <= _LONGEST_WORD_BEFORE
    return not (is_whole and word.isdigit() and before.strip() == word)


def cut_text(text: str, longest: int) -> Iterator[str]:
    """The text in pieces of at most ``longest`` characters, divided at white space where there is any; none of them is empty."""
    start = 0
    while start < len(text):
        end = start + longest
        if end < len(text) and (match := _UP_TO_WHITE_SPACE.match(text, start, end)):
            end = match.end()
        if piece := text[start:end].strip():
            yield piece
        start = end
