"""The C++ kernels need no more instructions than the committed table says; and what finds it out if they did."""

from __future__ import annotations

import re

import pytest

from benchmarks import instructions

from ..conftest import REPOSITORY

REASON = instructions.why_not()


@pytest.mark.timeout(200)  # 15 s on an idle core
def test_no_kernel_needs_more_instructions_than_the_table_says():
    if REASON is not None:
        pytest.skip(REASON)
    measured = instructions.measure()
    assert instructions.compare(measured, instructions.read_table()) == []
    # Every kernel is counted, and what was counted is a kernel's work.
    declared = set(re.findall(r"X\((\w+), \w+\)", (REPOSITORY / "csrc" / "cpu" / "kernels.h").read_text()))
    counted = {f"{entry['op']}_{entry['direction']}" for entry in measured}
    assert declared == {name if name in declared else name.removesuffix("_forward") for name in counted}
    for entry in measured:
        assert 0.1 < entry["instructions_per_element"] < 100, entry


def record(per_element: float, compiler: str = "g++ 12", **changes) -> dict:
    base = {"op": "attention", "direction": "forward", "dtype": "float32", "dropout": False, "isa": "avx2"}
    return {**base, "compiler": compiler, "instructions_per_element": per_element, **changes}


@pytest.mark.parametrize(
    ("per_element", "compiler", "found"),
    [
        (1.09, "g++ 12", None),
        (0.50, "g++ 12", None),
        (1.12, "g++ 12", r"1.12 times the 1.000 in instructions.json; 1.10 times are allowed"),
        (1.39, "clang++ 15", None),
        (1.42, "clang++ 15", r"1.42 times the 1.000 of g\+\+ 12 in instructions.json; 1.40 times are allowed"),
    ],
)
def test_what_is_too_much(per_element, compiler, found):
    problems = instructions.compare([record(per_element, compiler)], [record(1.0), record(9.0, dtype="bfloat16")])
    if found is None:
        assert problems == []
    else:
        (problem,) = problems
        assert re.search(found, problem) and problem.startswith("attention forward, float32, avx2: ")


def test_a_kernel_that_the_table_does_not_know():
    (problem,) = instructions.compare([record(1.0, dropout=True)], [record(1.0)])
    assert "attention forward, float32, dropout, avx2: instructions.json does not have it" in problem


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("g++ (Debian 12.2.0-14+deb12u1) 12.2.0", "g++ 12"),
        ("g++ (Ubuntu 11.4.0-1ubuntu1~22.04) 11.4.0; it knows no flags for avx512_bf16", "g++ 11"),
        ("Ubuntu clang version 15.0.7", "clang++ 15"),
        ("", "unknown"),
    ],
)
def test_names_of_compilers(line, name):
    assert instructions.compiler_of(line) == name


def test_counts_between_other_places_are_refused(tmp_path):
    path = tmp_path / "counts.1"
    path.write_text("desc: Trigger: --dump-before=fastbert::cpu::set_openmp_parallel(unsigned long)\ntotals: 1234\n")
    assert instructions.count_of(path) == 1234
    path.write_text("desc: Trigger: Program termination\ntotals: 1234\n")
    with pytest.raises(instructions.CountingError, match="between two marks: Program termination"):
        instructions.count_of(path)
    with pytest.raises(instructions.CountingError, match="counts.2 .* does not exist"):
        instructions.count_of(tmp_path / "counts.2")


def test_saving_replaces_what_the_same_compiler_had(monkeypatch, tmp_path):
    monkeypatch.setattr(instructions, "TABLE", tmp_path / "instructions.json")
    instructions.save([record(1.0), record(2.0, dtype="bfloat16")])
    instructions.save([record(5.0, "clang++ 15")])
    instructions.save([record(3.0)])
    assert instructions.read_table() == [record(5.0, "clang++ 15"), record(3.0)]
