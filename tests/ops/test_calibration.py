"""The measurement behind the choice of a matmul, and the file that keeps it. Measured are functions whose time is known."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch

from fastbert.ops import calibration
from fastbert.ops import linear as products

KIND, CHOICES = "product", {"slow": lambda x: time.sleep(0.01), "fast": lambda x: None}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTBERT_CALIBRATION", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "_known", {})
    return tmp_path


def fastest(choices=CHOICES, operands=lambda: (torch.ones(1),)):
    return calibration.fastest(KIND, choices, operands, 1e6)


def not_called(*_):
    raise AssertionError("measured although the answer was there")


def in_a_new_process(monkeypatch):
    monkeypatch.setattr(calibration, "_known", {})


def test_the_fastest_is_taken_and_kept(monkeypatch):
    assert fastest() == "fast"
    assert list(calibration.known()[KIND]) == ["fast", "slow"] and calibration.known()[KIND]["slow"] < 1e8
    assert fastest(operands=not_called) == "fast"
    in_a_new_process(monkeypatch)
    assert fastest(operands=not_called) == "fast"
    assert [path.name for path in calibration.cache_file().parent.iterdir()] == [calibration.cache_file().name]


@pytest.mark.parametrize(("rate", "taken"), [(1.02, "slow"), (1.04, "fast")])
def test_the_preferred_one_is_taken_unless_another_is_clearly_faster(rate, taken, monkeypatch):
    monkeypatch.setattr(calibration, "_known", {torch.get_num_threads(): {KIND: {"fast": rate, "slow": 1.0}}})
    assert calibration.fastest(KIND, CHOICES, not_called, 1e6, "slow") == taken
    assert calibration.fastest(KIND, CHOICES, not_called, 1e6, "not a candidate") == "fast"


def test_the_file_is_for_one_machine_number_of_threads_and_build(monkeypatch):
    paths = {calibration.cache_file()}
    monkeypatch.setattr(calibration, "_processor", lambda: ["another", "avx"])
    paths.add(calibration.cache_file())
    monkeypatch.setattr(calibration.torch, "get_num_threads", lambda: 77)
    paths.add(calibration.cache_file())
    monkeypatch.setattr(calibration.torch, "__version__", "9.9")
    paths.add(calibration.cache_file())
    monkeypatch.setattr(calibration, "__version__", "9.9")
    paths.add(calibration.cache_file())
    monkeypatch.setattr(calibration, "_extension", lambda: [1, 2])
    paths.add(calibration.cache_file())
    assert len(paths) == 6


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"flops_per_s": 3}',
        '{"flops_per_s": {"product": {}}}',
        '{"flops_per_s": {"product": {"fast": "x"}}}',
        "\xff\xfe",
    ],
)
def test_a_broken_file_is_measured_anew(content):
    path = calibration.cache_file()
    path.parent.mkdir(parents=True)
    path.write_bytes(content.encode("latin-1"))
    assert fastest() == "fast"
    assert json.loads(path.read_text())["flops_per_s"][KIND]["fast"] > 0


def test_candidates_of_another_installation_are_measured_anew(monkeypatch):
    fastest({"gone": lambda x: None, **CHOICES})
    in_a_new_process(monkeypatch)
    assert fastest() == "fast" and set(calibration.known()[KIND]) == set(CHOICES)


def test_a_folder_that_cannot_be_made_keeps_answers_in_memory(empty_cache, monkeypatch):
    (empty_cache / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(empty_cache / "file"))
    assert fastest() == "fast" and fastest(operands=not_called) == "fast"


def test_a_write_that_fails_leaves_the_old_file_and_no_other(monkeypatch):
    fastest()
    before = calibration.cache_file().read_text()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    calibration.fastest("another product", CHOICES, lambda: (torch.ones(1),), 1e6)
    assert calibration.cache_file().read_text() == before and len(list(calibration.cache_file().parent.iterdir())) == 1


def test_what_other_processes_measured_is_kept(monkeypatch):
    fastest()
    in_a_new_process(monkeypatch)
    calibration._known[torch.get_num_threads()] = {}
    calibration.fastest("another product", CHOICES, lambda: (torch.ones(1),), 1e6)
    assert set(json.loads(calibration.cache_file().read_text())["flops_per_s"]) == {KIND, "another product"}


def test_relative_cache_homes_are_ignored(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert calibration.cache_file().is_absolute() and "here" not in calibration.cache_file().parts


@pytest.mark.parametrize("value", ["0", "OFF", "false"])
def test_a_value_that_says_nothing_is_an_error(monkeypatch, value):
    monkeypatch.setenv("FASTBERT_CALIBRATION", value)
    with pytest.raises(ValueError, match=f"FASTBERT_CALIBRATION={value}: expected off, or on"):
        calibration._check_setting()


def test_off_measures_nothing(monkeypatch):
    monkeypatch.setattr(calibration, "fastest", not_called)
    large = {"rows": 4096, "weight_elements": 768 * 768}
    monkeypatch.setenv("FASTBERT_CALIBRATION", "off")
    assert products.choice("dx", torch.float32, **large) == next(iter(products.candidates("dx", torch.float32)))
    monkeypatch.delenv("FASTBERT_CALIBRATION")
    torch.use_deterministic_algorithms(True)
    try:
        assert products.choice("dx", torch.bfloat16, **large) == "torch"
    finally:
        torch.use_deterministic_algorithms(False)
    assert products.choice("dx", torch.float32, rows=2, weight_elements=64) == next(iter(products.candidates("dx", torch.float32)))


def test_a_product_is_measured_once_and_without_a_trace(monkeypatch):
    """Torch's random numbers, default dtype and device, autocast and gradients are those of the caller."""
    monkeypatch.setattr(products, "_TIMED", {"few rows": (4, 8, 16), "many rows": (8, 8, 16)})
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
            for product in products.PRODUCTS:
                for dtype in products.DTYPES:
                    assert products.choice(product, dtype, 1 << 10, 1 << 14) in products.candidates(product, dtype)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(state, torch.get_rng_state())
    kinds = calibration.known()
    assert set(kinds) == {f"{p}, {d}, many rows" for p in products.PRODUCTS for d in ("float32", "bfloat16")}
    monkeypatch.setattr(calibration, "_measure", not_called)
    products.choice("dx", torch.float32, 1 << 10, 1 << 14)
    assert products.choice("forward", torch.float32, 1 << 10, 1 << 14) == next(iter(kinds["forward, float32, many rows"]))


def test_calibrate_measures_everything(monkeypatch):
    monkeypatch.setattr(products, "MEASURED_FLOPS", 0)
    monkeypatch.setattr(products, "_TIMED", {"few rows": (4, 8, 16), "many rows": (300, 8, 16)})
    products.calibrate()
    assert len(calibration.known()) == 12
    assert all(set(rates) for rates in calibration.known().values())


def test_measured_without_autocast_and_gradients():
    seen = []
    with torch.autocast("cpu", torch.bfloat16):
        fastest({"one": lambda x: seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))})
    assert set(seen) == {(False, False)}


def test_a_forced_instruction_set_has_a_file_of_its_own(monkeypatch):
    paths = {calibration.cache_file()}
    monkeypatch.setenv("FASTBERT_CPU_ISA", "avx2")
    assert calibration.cache_file() not in paths
