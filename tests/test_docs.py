"""docs/compatibility.md speaks of tests that exist, in the words of ``explain``, and its versions are those that are tested;
links of all pages lead somewhere."""

from __future__ import annotations

import ast
import re

import pytest
from packaging.version import Version

from .conftest import REPOSITORY

TEXT = (REPOSITORY / "docs" / "compatibility.md").read_text(encoding="utf-8")
CELLS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("|")]
ROWS = [cells for cells in CELLS if cells[0] != "Feature" and set(cells[0]) != {"-"}]
TEST = re.compile(r"`([\w/]+\.py)::(\w+)`")


def path_of(name: str) -> str:
    """The path in the repository of a file that the table names."""
    return name if name.startswith("tests/") else f"tests/ecosystem/{name}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_every_row_names_tests_that_exist(row):
    assert len(row) == 5, row
    named = TEST.findall(row[4])
    assert named and re.sub(TEST, "", row[4]).strip(", ") == "", f"expected `file.py::test` and commas, got {row[4]}"
    for file, test in named:
        tree = ast.parse((REPOSITORY / path_of(file)).read_text(encoding="utf-8"))
        tests = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
        assert test in tests, f"{path_of(file)} has no {test}"


@pytest.mark.parametrize("row", [row for row in ROWS if row[3]], ids=lambda row: row[0])
def test_explain_says_so(row):
    sources = [*REPOSITORY.glob("fastbert/model/*.py"), *REPOSITORY.glob("fastbert/ops/*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    words = re.findall(r"`([^`]+)`", row[3])
    assert words and [phrase for phrase in words if phrase not in code] == []


def test_every_file_of_the_ecosystem_is_named():
    files = {path.name for path in (REPOSITORY / "tests" / "ecosystem").glob("test_*.py")}
    named = {file for row in ROWS for file, _ in TEST.findall(row[4]) if "/" not in file}
    assert named == files


def pin(file: str, package: str) -> str:
    """The release of ``package`` in a file of constraints, the last where there is one for each Python."""
    pins = re.findall(rf"^{package}==([\d.]+)", (REPOSITORY / file).read_text(encoding="utf-8"), re.MULTILINE)
    return pins[-1]


@pytest.mark.parametrize("page", [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not link.startswith("http") and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_the_tested_pairs_are_the_promised_ones(package):
    """The lowest is pyproject.toml's bound; both are what the page says."""
    lowest, highest = pin("constraints-lowest.txt", package), pin("constraints.txt", package)
    bound = re.search(rf'"{package}>=([\d.]+)"', (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert bound and Version(lowest) == Version(bound[1])
    versions = TEXT.partition("## Versions")[2]
    assert f"{package} {lowest}" in versions and re.search(rf"{package}\s+{re.escape(highest)}", versions)
