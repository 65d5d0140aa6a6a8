"""LAMB against its formula in float64, tensor by tensor; a step that is left out changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastbert.train.lamb import LAMB
from fastbert.train.optimizer import build_lamb

BETAS, EPSILON, RATE, DECAY = (0.9, 0.999), 1e-6, 0.02, 0.1
SHAPES = ((7, 5), (3,), (1,), (4, 2, 3))


def plain_step(x, m, v, gradient, t, trust_ratio, decay):
    """You et al. (2020), algorithm 2, of one tensor in float64; returns x, m and v after step t."""
    m = BETAS[0] * m + (1 - BETAS[0]) * gradient
    v = BETAS[1] * v + (1 - BETAS[1]) * gradient**2
    r = (m / (1 - BETAS[0] ** t)) / ((v / (1 - BETAS[1] ** t)).sqrt() + EPSILON) + decay * x
    norms = (math.sqrt((x**2).sum()), math.sqrt((r**2).sum()))
    ratio = norms[0] / norms[1] if trust_ratio and all(norms) else 1.0
    return x - RATE * ratio * r, m, v


@pytest.mark.parametrize("trust_ratio", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_tensor_follows_the_formula(trust_ratio, dtype):
    start = [torch.randn(shape, dtype=torch.float64) * 10.0**-index for index, shape in enumerate(SHAPES)]
    start += [torch.zeros(6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]  # no weights, and no gradient
    decay = 0.0 if not trust_ratio else DECAY
    parameters = [nn.Parameter(x.to(dtype, copy=True)) for x in start]
    optimizer = LAMB(parameters, RATE, BETAS, EPSILON, decay, trust_ratio)
    truth = [(x, torch.zeros_like(x), torch.zeros_like(x)) for x in start]
    for t in range(1, 8):
        gradients = [torch.randn_like(x) * 5.0**t for x in start]
        gradients[-1].zero_()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.to(dtype, copy=True)
        optimizer.step()
        truth = [plain_step(*was, g, t, trust_ratio, decay) for was, g in zip(truth, gradients, strict=True)]
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for parameter, (x, m, v) in zip(parameters, truth, strict=True):
        state = optimizer.state[parameter]
        for found, expected in ((parameter, x), (state["exp_avg"], m), (state["exp_avg_sq"], v)):
            assert (found.double() - expected).norm() <= tolerance * expected.norm()
        assert state["step"] == 7


def test_a_tensor_without_gradient_is_left_alone():
    trained, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = LAMB([trained, other], RATE)
    trained.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(other, torch.ones(3)) and not torch.equal(trained, torch.ones(3)) and other not in optimizer.state


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1.0])
def test_found_inf_leaves_everything_as_it_was(first, bad):
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer, other = (LAMB([{"params": parameters}], RATE) for _ in range(2))
    if not first:
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    before = [parameter.detach().clone() for parameter in parameters]
    state = {p: {name: value.clone() for name, value in optimizer.state[p].items()} for p in parameters}
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, bad)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    for parameter, was in zip(parameters, before, strict=True):
        assert torch.equal(parameter, was)
        for name, value in optimizer.state[parameter].items():
            assert torch.equal(value, state[parameter].get(name, torch.zeros_like(value)))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    if first:  # as if the step that was left out had not been
        found = [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            for parameter, was in zip(parameters, before, strict=True):
                parameter.copy_(was)
                parameter.grad = torch.ones_like(parameter)
        other.step()
        assert all(torch.equal(a, b) for a, b in zip(found, parameters, strict=True))


def test_biases_take_adams_steps():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    optimizer = build_lamb(model, 0.1, 0.01)
    adapted = {p for group in optimizer.param_groups if group["trust_ratio"] for p in group["params"]}
    assert adapted == {model[0].weight}
    assert [(group["trust_ratio"], group["weight_decay"]) for group in optimizer.param_groups] == [(True, 0.01), (False, 0.0)]
