"""Sentence splitting by rule.

Not nltk's punkt, which downloads its model at run time, nor pysbd, which is some hundred times slower: next sentence
prediction needs spans of text in their order, and a boundary missed here or there costs nothing.
"""

from __future__ import annotations

import re

# The look-behind keeps a long row of dots linear: only its first one starts a match.
_BOUNDARY = re.compile(r"""(?<![.!?…])[.!?…]+["'”’»)\]}]*\s+|[。！？｡]+[」』”’）]*\s*""")
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
    before = paragraph[start : match.start()]
    words = before[-40:].split()
    if not words:
        return True
    word = words[-1].lstrip(_OPENING).lower()
    if _ABBREVIATION.fullmatch(word):
        return False
    if following.isdigit() and _ABBREVIATION_BEFORE_NUMBER.fullmatch(word):
        return False
    return not (word.isdigit() and before.strip() == word)
