"""The machine's matmul rate is that of real products, by every library, and measuring it changes nothing else."""

from __future__ import annotations

import pytest
import torch

from fastbert.ops import matmul_rate

FLOPS = 2 * 2048 * 768 * 3072


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_every_library_computes_the_product(dtype):
    x, weight = (matmul_rate.random_matrix(rows, 64, "cpu", dtype) for rows in (40, 48))
    expected = x.double() @ weight.double().t()
    products = matmul_rate.matmuls(x, weight)
    assert products
    for library, matmul in products.items():
        torch.testing.assert_close(matmul().double(), expected, rtol=1e-2, atol=0.1, msg=library)


def test_the_rate_of_a_library_is_that_of_its_fastest_run(monkeypatch):
    seconds = {"MKL": iter([2.0]), "oneDNN": iter([0.5, 0.6]), "oneDNN prepacked": iter([0.6, 0.4])}
    monkeypatch.setattr(matmul_rate, "matmuls", lambda *_: {name: lambda name=name: name for name in seconds})
    monkeypatch.setattr(matmul_rate, "_seconds", lambda product, _: next(seconds[product()]))
    assert matmul_rate.matmul_rates("cpu", torch.float32, seconds=0.0) == {
        "MKL": FLOPS / 2.0,
        "oneDNN": FLOPS / 0.5,
        "oneDNN prepacked": FLOPS / 0.4,
    }


def test_the_random_state_stays_as_it_is(one_thread):
    before = torch.get_rng_state()
    rates = matmul_rate.matmul_rates("cpu", torch.float32, seconds=0.0)
    assert min(rates.values()) > 0
    assert torch.equal(before, torch.get_rng_state())


def test_why_nothing_is_measured(monkeypatch):
    assert matmul_rate.unmeasured_reason() == "FASTBERT_CALIBRATION is off"  # as in all tests
    monkeypatch.delenv("FASTBERT_CALIBRATION")
    assert matmul_rate.unmeasured_reason() is None
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert matmul_rate.unmeasured_reason() == "torch's deterministic algorithms are on"
