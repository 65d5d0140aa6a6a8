from __future__ import annotations

import ast
import sys
import sysconfig
from pathlib import Path

import pytest

from fastbert.data import embedded
from fastbert.data.corpus import CorpusError, CorpusReport, embedded_documents

MODULE = '''#!/usr/bin/env python
# A comment before the docstring.
r"""The harbour master keeps a ledger of every ship that enters.

Each ship is written down with its *name*, its ``captain`` and the
:class:`~harbour.Flag` it sails under, one line for every ship.

>>> from harbour import Ledger, and so on and so on for a while
>>> Ledger().ships

=====  =====================================
flag   which nations sail under this flag here
=====  =====================================

Use the ledger as in the example that follows these words::

    ledger = Ledger this block of words is literal and must not appear

The example is over and ordinary prose goes on from here.

x = f(a[i], b[j]) + g(c) * h(d) ** 2; y -> z(k, l, m)
"""
raise SystemExit("this module must never be imported")


class Ledger(
    dict,
):  # a comment
    \'\'\'Keeps the ships of one harbour in the order of their arrival.\'\'\'

    def ships(self, since: int = 0,
              until: int = 9) -> list[str]:
        """
        Returns the names of all the ships that came in between.
        """
        text = """This string is no docstring and must not be taken for one."""
        return [text]


def broken():
    """A broken escape: \\N{NO SUCH NAME} makes this literal unreadable to everyone."""
'''


def test_docstrings_are_cleaned_and_nothing_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "harbour"
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text(MODULE)
    (package / "copy.py").write_text(MODULE)
    (package / "tests" / "test_it.py").write_text('"""Docstrings of the tests of a package are never part of it."""')
    (package / "GUIDE.md").write_text(
        "# Guide\n\nThe guide tells new captains where to anchor.\n\n"
        "```\nnot this line, it is code\n\nand not these words of the same code either\n\nnor the last of it\n```\n"
    )
    (package / "LICENSE.md").write_text("Permission is hereby granted to anyone who asks politely for it.")
    (package / "dangling.md").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(embedded, "_packages", lambda: [("harbour", package)])
    monkeypatch.setattr(embedded.sysconfig, "get_path", lambda name: str(tmp_path / "no standard library"))
    documents, report = embedded_documents()
    assert [document.paragraphs for document in documents] == [
        ["The guide tells new captains where to anchor."],
        [
            "The harbour master keeps a ledger of every ship that enters.",
            "Each ship is written down with its name, its captain and the harbour.Flag it sails under, one line for every ship.",
            "Use the ledger as in the example that follows these words:",
            "The example is over and ordinary prose goes on from here.",
            "Keeps the ships of one harbour in the order of their arrival.",
            "Returns the names of all the ships that came in between.",
        ],
    ]
    assert report.sources == {"harbour": 2}
    assert "harbour" not in sys.modules


def test_an_installation_without_sources_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_packages", lambda: [])
    monkeypatch.setattr(embedded.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(CorpusError, match="no docstrings to train on"):
        embedded_documents()


def test_the_search_finds_the_docstrings_that_a_parser_finds() -> None:
    library = Path(sysconfig.get_path("stdlib"))
    files = [*sorted(library.glob("*.py")), *sorted((library / "email").rglob("*.py"))]
    parsed = found = 0
    for file in files:
        source = file.read_text(encoding="utf-8", errors="ignore")
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        truth = {
            text
            for node in ast.walk(ast.parse(source))
            if isinstance(node, nodes) and (text := ast.get_docstring(node, clean=False)) and "\n" in text
        }
        ours = {text for text in embedded._docstrings(source) if "\n" in text}
        parsed, found = parsed + len(truth), found + len(truth & ours)
        assert len(ours - truth) <= 2, file
    assert parsed > 2000
    assert found >= 0.995 * parsed


def test_this_installation_gives_prose_in_a_fixed_order_up_to_the_cap() -> None:
    modules = set(sys.modules)
    documents, report = embedded_documents(2_000_000)
    assert not {name.split(".")[0] for name in set(sys.modules) - modules}
    assert embedded_documents(2_000_000)[0] == documents
    assert report == CorpusReport.from_documents(documents)
    assert 2_000_000 <= report.characters < 2_020_000
    assert list(report.sources)[0] == "Python standard library"
    assert report.sources["Python standard library"] > 300
    paragraphs = [paragraph for document in documents for paragraph in document.paragraphs]
    assert len(set(paragraphs)) == len(paragraphs)
    for paragraph in paragraphs:
        assert ">>>" not in paragraph and "\n" not in paragraph and len(paragraph.split()) >= 6
        paragraph.encode()
    smaller, _ = embedded_documents(300_000)
    assert smaller[:-1] == documents[: len(smaller) - 1]
