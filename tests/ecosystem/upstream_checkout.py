"""transformers' own test file of a model, out of a checkout of its source, with our classes in the place of theirs.

``python -m tests.ecosystem.upstream_checkout /path/to/transformers`` prints how many tests pass by each door, and which do not.
The checkout must be of the version that is installed (``git clone --depth 1 --branch v...``).
"""

from __future__ import annotations

import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from .upstream import FAMILIES, doors

HERE = Path(__file__).resolve().parent


def test_file(checkout: Path, family_name: str) -> Path:
    """Where the tests of a family are. Raises ValueError where ``checkout`` is not one of the installed version."""
    source = checkout / "src" / "transformers" / "__init__.py"
    found = re.search(r'^__version__ = "(.*)"', source.read_text(), re.MULTILINE) if source.is_file() else None
    if found is None:
        raise ValueError(f"{checkout} is no checkout of transformers' source: no version in {source}")
    if found[1] != version("transformers"):
        raise ValueError(f"{checkout} is transformers {found[1]}, installed is {version('transformers')}; the two must be the same")
    return checkout / "tests" / "models" / family_name / f"test_modeling_{family_name}.py"


def outcomes(checkout: Path, family_name: str, door: str) -> dict[str, str]:
    """ "passed", "skipped" or "failed" for each test of the family, run in a process of its own.

    Raises RuntimeError with pytest's output where the tests cannot be collected.
    """
    path = test_file(checkout, family_name)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "outcomes.json"
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
            "FASTBERT_DOOR": door,
            "FASTBERT_CLASSES": ",".join(FAMILIES[family_name].class_names()),
            "FASTBERT_OUTCOMES": str(file),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "upstream_plugin", "-p", "no:cacheprovider", "--tb=short", str(path)]
        run = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        if run.returncode not in (0, 1) or not file.is_file():
            raise RuntimeError(f"{' '.join(command)} ended with {run.returncode}:\n{run.stdout[:3000]}{run.stderr[:3000]}")
        return json.loads(file.read_text())


def lost(theirs: dict[str, str], ours: dict[str, str]) -> list[str]:
    """The tests that pass for theirs and do not for ours."""
    return [test for test, result in theirs.items() if result == "passed" and ours.get(test) != "passed"]


def main(checkout: Path) -> int:
    """Prints the counts of all families; the number of tests that are lost."""
    number_lost = 0
    for family_name in FAMILIES:
        theirs = outcomes(checkout, family_name, "theirs")
        print(family_name, "theirs", dict(collections.Counter(theirs.values())))
        for door in doors(family_name):
            ours = outcomes(checkout, family_name, door)
            print(family_name, door, dict(collections.Counter(ours.values())), "lost:", lost(theirs, ours))
            number_lost += len(lost(theirs, ours))
    return number_lost


if __name__ == "__main__":
    sys.exit(min(main(Path(sys.argv[1]).resolve()), 1))
