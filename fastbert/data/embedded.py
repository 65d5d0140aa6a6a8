"""English prose that every installation already has: the docstrings and documentation of Python and of installed packages.

Nothing is imported or executed: docstrings are string literals found in the source text and read with
``ast.literal_eval``. Parsing whole modules with ``ast.parse`` finds the same docstrings (a test compares) in ten times the
time, most of it spent on code.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from fastbert.data.documents import CorpusReport, Document
from fastbert.data.errors import CorpusError

_FIRST_PACKAGES = ("numpy", "torch", "transformers")
_SKIPPED_FOLDERS = frozenset({"test", "tests", "testing", "site-packages", "dist-packages", "_vendor", "__pycache__"})
_DOCUMENTATION = (".md", ".rst")
_STANDARD_LIBRARY = "Python standard library"

# A triple-quoted literal that stands first in a module or right behind the colon that ends a class or def line. Docstrings in
# single quotes are left out: one line each, three in a hundred.
_DOCSTRING = re.compile(
    r"""(?: \A (?:[ \t]* (?:\#[^\n]*)? \n)* | : [ \t]* (?:\#[^\n]*)? \n \s* )
        (?P<literal> [rRuU]? (?P<quotes>\"{3}|'{3}) (?:[^\\]|\\.)*? (?P=quotes) )""",
    re.DOTALL | re.VERBOSE,
)
_FENCE = re.compile(r"^([ \t]*)(```|~~~).*?^\1\2[ \t]*$", re.DOTALL | re.MULTILINE)
_CODE_MARKS = (">>>", "...:", "```", "::=", "|--", "--|", "+--", "---", "===", "***", "~~~", "<div", "<img", "](http", "://")
_MARKUP = re.compile(r":[\w:+-]+:(?=`)|[`*~]{1,2}(?=\S)|(?<=\S)[`*]{1,2}|:(?=:$)")
_WORD = re.compile(r"""(?<!\S)["'(\[]*[A-Za-z]+(?:['-][A-Za-z]+)*[.,;:!?)\]"']*(?!\S)""")
_FEWEST_WORDS = 6
_WORD_SHARE = 0.75


def embedded_documents(max_characters: int = 12_000_000) -> tuple[list[Document], CorpusReport]:
    """The prose of this installation and its counts: a module or a documentation file is a document.

    Read in this order until ``max_characters`` are together: the standard library with the Python reference that it
    carries for ``help()``, numpy, torch, transformers, then every other package by name. Paragraphs that are code,
    doctest, tables or mostly symbols are dropped, and so are paragraphs seen before (generated and inherited docstrings
    repeat by the thousand). The same installation gives the same documents.

    Raises CorpusError where fewer than two documents are found (an interpreter shipped without its sources).
    """
    documents: list[Document] = []
    seen: set[str] = set()
    characters = 0
    for source, texts in _texts():
        paragraphs = []
        for paragraph in (paragraph for text in texts for paragraph in _prose(text)):
            if characters >= max_characters:
                break
            if paragraph not in seen:
                seen.add(paragraph)
                paragraphs.append(paragraph)
                characters += len(paragraph)
        if paragraphs:
            documents.append(Document(source, paragraphs))
        if characters >= max_characters:
            break
    if len(documents) < 2:
        raise CorpusError("this installation holds no docstrings to train on (Python without its sources): give a corpus")
    return documents, CorpusReport.from_documents(documents)


def _texts() -> Iterator[tuple[str, list[str]]]:
    """(source, texts) of every module and documentation file, in the order of reading."""
    standard_library = Path(sysconfig.get_path("stdlib"))
    for topic in _help_topics(standard_library / "pydoc_data" / "topics.py"):
        yield _STANDARD_LIBRARY, [topic]
    for texts in _folder_texts(standard_library):
        yield _STANDARD_LIBRARY, texts
    for name, folder in _packages():
        for texts in _folder_texts(folder):
            yield name, texts


def _help_topics(path: Path) -> Iterator[str]:
    """The chapters of the language reference that ``help()`` shows: a literal dictionary of texts."""
    if not path.is_file():
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value


def _packages() -> Iterator[tuple[str, Path]]:
    """Import name and folder of the installed packages: fastbert's own requirements first, the rest by name."""
    folders: dict[str, Path] = {}
    for name in _FIRST_PACKAGES:
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            folders[name] = Path(spec.submodule_search_locations[0])
    for site in sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}):
        for folder in sorted(Path(site).glob("*")):
            if (folder / "__init__.py").is_file() and folder.name not in _SKIPPED_FOLDERS:
                folders.setdefault(folder.name, folder)
    yield from folders.items()


def _folder_texts(folder: Path) -> Iterator[list[str]]:
    for parent, children, files in os.walk(folder):
        children[:] = sorted(name for name in children if name not in _SKIPPED_FOLDERS)
        for name in sorted(files):
            if name.endswith(".py"):
                yield _docstrings(_source(os.path.join(parent, name)))
            elif name.endswith(_DOCUMENTATION) and not name.upper().startswith(("LICENSE", "LICENCE", "COPYING", "NOTICE")):
                yield [_source(os.path.join(parent, name))]


def _source(path: str) -> str:
    """A file's text without the bytes that are not UTF-8; nothing for a file that cannot be read (a dangling link)."""
    try:
        with open(path, "rb") as file:
            return file.read().decode("utf-8", errors="ignore").replace("\r\n", "\n")
    except OSError:
        return ""


def _docstrings(source: str) -> list[str]:
    docstrings = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's docstrings
        for match in _DOCSTRING.finditer(source):
            try:
                docstrings.append(ast.literal_eval(match["literal"]))
            except (SyntaxError, ValueError):  # a broken escape: such a module does not compile either
                continue
    return docstrings


def _prose(text: str) -> Iterator[str]:
    """The paragraphs of a docstring or documentation file that are sentences, each on one line, without markup."""
    literal_indent = None
    for block in re.split(r"\n\s*\n", _FENCE.sub("", inspect.cleandoc(text))):
        lines = block.strip("\n").split("\n")
        indent = len(lines[0]) - len(lines[0].lstrip())
        if literal_indent is not None:
            if indent > literal_indent:
                continue
            literal_indent = None
        stripped = block.strip()
        if stripped.endswith("::") or stripped.startswith(".. "):
            literal_indent = indent
        if stripped.startswith((".. ", "#", "@", "$", "%")) or any(mark in block for mark in _CODE_MARKS):
            continue
        paragraph = _MARKUP.sub("", " ".join(block.split()))
        if _is_prose(paragraph):
            yield paragraph


def _is_prose(paragraph: str) -> bool:
    words = len(_WORD.findall(paragraph))
    return words >= max(_FEWEST_WORDS, _WORD_SHARE * (paragraph.count(" ") + 1)) and paragraph.isprintable()
