"""AdamW and LAMB by CUDA C++: as exact as torch's against float64, and exchangeable with them; on a model of a GPU's threads where
there is no GPU.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer

from fastbert.ops.cuda import DEVICE_TYPE, unavailable_reason
from fastbert.ops.cuda import multi_tensor as kernels
from fastbert.train import multi_tensor
from fastbert.train.lamb import LAMB
from fastbert.train.multi_tensor import MultiTensorAdamW, MultiTensorLAMB

from .. import cuda_on_host
from ..ops.helpers import assert_within_budget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(unavailable_reason() is not None, reason=f"no CUDA kernels: {unavailable_reason()}"),
]

BETAS, EPSILON, RATE, DECAY, MAX_NORM = (0.9, 0.999), 1e-6, 0.02, 0.1, 3.0
OPTIONS = {"lr": RATE, "betas": BETAS, "eps": EPSILON, "weight_decay": DECAY}
# Fewer elements than a thread's access, no multiple of it, one chunk and a bit of a second one, two exactly, none.
SHAPES = ((1,), (7,), (5, 3), (4096 + 3,), (2**14 + 3,), (2, 2**14), (0,))


def fused_adamw(parameters: Any, **options: Any) -> AdamW:
    return AdamW(parameters, fused=True, **options)


OURS_AND_TORCHS = pytest.mark.parametrize(
    ("ours", "theirs"), [(MultiTensorAdamW, fused_adamw), (MultiTensorLAMB, LAMB)], ids=["adamw", "lamb"]
)


def parameters_of(values: Sequence[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(value.to(DEVICE_TYPE, torch.float32, copy=True)) for value in values]


def give(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.to(DEVICE_TYPE, torch.float32, copy=True)


def random_values(shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    """Of different sizes, in float64 that float32 holds."""
    return [(torch.randn(shape) * 10.0 ** -(index % 3)).double() for index, shape in enumerate(shapes)]


def tensors_of(parameters: Sequence[nn.Parameter], optimizer: Optimizer) -> list[Tensor]:
    """Copies of what a step changes."""
    states = (sorted(optimizer.state[parameter].items()) for parameter in parameters)
    tensors = [t for parameter, state in zip(parameters, states, strict=True) for t in (parameter, *dict(state).values())]
    return [tensor.detach().clone() for tensor in tensors]


def true_step(was: tuple[Tensor, ...], gradient: Tensor, t: int, decay: float, trusts: bool) -> tuple[Tensor, ...]:
    x, m, v = was
    m = BETAS[0] * m + (1 - BETAS[0]) * gradient
    v = BETAS[1] * v + (1 - BETAS[1]) * gradient**2
    r = (m / (1 - BETAS[0] ** t)) / ((v / (1 - BETAS[1] ** t)).sqrt() + EPSILON) + decay * x
    ratio = float(x.norm() / r.norm()) if trusts and x.norm() > 0 and r.norm() > 0 else 1.0
    return x - RATE * ratio * r, m, v


@OURS_AND_TORCHS
@pytest.mark.parametrize("clipped", [True, False])
def test_as_exact_as_torchs(ours, theirs, clipped):
    """Two groups, one without decay and trust ratio; tensors without weights, without gradient, and with a gradient of zeros."""
    start = random_values((*(shape for shape in SHAPES for _ in range(6 if math.prod(shape) < 20 else 1)), (9,), (9,), (9,)))
    start[-3].zero_()
    number = len(start)
    runs = []
    for build in (ours, theirs):
        parameters = parameters_of(start)
        second = {"params": parameters[number // 2 :], "weight_decay": 0.0}
        if build in (MultiTensorLAMB, LAMB):
            second["trust_ratio"] = False
        runs.append((parameters, build([{"params": parameters[: number // 2]}, second], **OPTIONS)))
    truth = [(x, torch.zeros_like(x), torch.zeros_like(x)) for x in start]
    for t in range(1, 6):
        gradients = [value * 2.0**t for value in random_values([tuple(x.shape) for x in start])]
        gradients[-2].zero_()
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients[:-1]))
        for parameters, optimizer in runs:
            give(parameters, [*gradients[:-1], None])
            if clipped and optimizer is runs[0][1]:
                found = optimizer.clip_grad_norm(MAX_NORM)
                assert found.item() == pytest.approx(norm, rel=2e-7) and found.dtype == torch.float32 and found.dim() == 0
            elif clipped:
                clip_grad_norm_(parameters, MAX_NORM)
            optimizer.step()
        factor = min(1.0, MAX_NORM / (norm + 1e-6)) if clipped else 1.0
        for i, gradient in enumerate(gradients[:-1]):
            first = i < number // 2
            truth[i] = true_step(truth[i], factor * gradient, t, DECAY if first else 0.0, first and ours is MultiTensorLAMB)
    for shape in (*SHAPES, (9,)):
        places = [i for i, x in enumerate(start[:-1]) if tuple(x.shape) == shape]
        columns = [[torch.cat([row[i][part].cpu().flatten() for i in places]) for part in range(3)] for row in (
            *([(p.detach(), o.state[p]["exp_avg"], o.state[p]["exp_avg_sq"]) for p in ps[:-1]] for ps, o in runs), truth,
        )]  # fmt: skip
        assert_within_budget(*columns, names=[f"{shape} {name}" for name in ("parameter", "exp_avg", "exp_avg_sq")])
    for parameters, optimizer in runs:
        assert all(optimizer.state[parameter]["step"] == 5 for parameter in parameters[:-1])
        assert parameters[-1] not in optimizer.state and torch.equal(parameters[-1].double().cpu(), start[-1])


@OURS_AND_TORCHS
def test_places_in_memory_do_not_matter(ours, theirs):
    """Parameters, gradients and state that begin in the middle of 16 bytes, as they do in DDP's buckets: the same bits."""
    sizes = (1, 7, 4096 + 3)

    def views() -> list[Tensor]:
        memory = torch.zeros(4 + sum(sizes) + 3, device=DEVICE_TYPE)
        return list(memory[1 : 1 + sum(sizes)].split(sizes))

    start = random_values([(size,) for size in sizes])
    aligned = parameters_of(start)
    shifted = [nn.Parameter(view.copy_(value)) for view, value in zip(views(), start, strict=True)]
    assert all(parameter.data_ptr() % 16 == 4 for parameter in shifted[:1])
    plain, other = ours(aligned, **OPTIONS), ours(shifted, **OPTIONS)
    for parameter, average, square in zip(shifted, views(), views(), strict=True):
        step = torch.zeros((), device=DEVICE_TYPE)
        other.state[parameter] = {"step": step, "exp_avg": average, "exp_avg_sq": square}
    for _ in range(3):
        gradients = random_values([(size,) for size in sizes])
        give(aligned, gradients)
        for parameter, view, gradient in zip(shifted, views(), gradients, strict=True):
            parameter.grad = view.copy_(gradient)
        assert torch.equal(plain.clip_grad_norm(MAX_NORM), other.clip_grad_norm(MAX_NORM))
        plain.step()
        other.step()
    assert all(map(torch.equal, tensors_of(aligned, plain), tensors_of(shifted, other)))


def test_gradients_of_another_layout():
    parameters, others = (parameters_of(random_values([(6, 4)])) for _ in range(2))
    with torch.no_grad():
        others[0].copy_(parameters[0])
    gradient = torch.randn(4, 6, device=DEVICE_TYPE)
    parameters[0].grad, others[0].grad = gradient.t(), gradient.t().contiguous()
    for (parameter,) in (parameters, others):
        optimizer = MultiTensorAdamW([parameter], **OPTIONS)
        optimizer.clip_grad_norm(MAX_NORM)
        optimizer.step()
    assert torch.equal(parameters[0], others[0])


def test_hundreds_of_tensors_in_many_groups():
    """More than a launch writes into the table; every group has a rate of its own."""
    shapes = [(1 + index % 5,) for index in range(500)]
    start, gradients = random_values(shapes), random_values(shapes)
    mine, other = parameters_of(start), parameters_of(start)
    for parameters, build in ((mine, MultiTensorAdamW), (other, fused_adamw)):
        groups = [{"params": parameters[first : first + 8], "lr": RATE * (1 + first)} for first in range(0, 500, 8)]
        optimizer = build(groups, **OPTIONS)
        give(parameters, gradients)
        optimizer.step()
    torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


@OURS_AND_TORCHS
def test_any_order_of_threads(ours, theirs):
    """On the model of a GPU: no result depends on who comes first."""
    if DEVICE_TYPE != "cpu":
        pytest.skip("a GPU takes its own order")
    shapes = ((7,), (4096 + 3,), (2**14 + 5,))
    start, gradients = random_values(shapes), random_values(shapes)
    results = []
    for order in (0, 1, 20181011):
        parameters = parameters_of(start)
        optimizer = ours(parameters, **OPTIONS)
        give(parameters, gradients)
        with cuda_on_host.threads_in_order(order):
            norm = optimizer.clip_grad_norm(MAX_NORM)
            optimizer.step()
        results.append([norm, *tensors_of(parameters, optimizer)])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@OURS_AND_TORCHS
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1.0])
def test_found_inf_leaves_everything_as_it_was(ours, theirs, first, bad):
    parameters = parameters_of(random_values())
    optimizer = ours(parameters, **OPTIONS)
    if not first:
        give(parameters, random_values())
        optimizer.step()
    before = copy.deepcopy([p.detach() for p in parameters])
    state = {p: {name: value.clone() for name, value in optimizer.state[p].items()} for p in parameters}
    give(parameters, [torch.full_like(p, bad) for p in parameters])
    norm = optimizer.clip_grad_norm(MAX_NORM)
    assert math.isfinite(norm) == (bad == 1.0)
    optimizer.found_inf = torch.ones((), device=DEVICE_TYPE)
    optimizer.step()
    for parameter, was in zip(parameters, before, strict=True):
        assert torch.equal(parameter, was)
        for name, value in optimizer.state[parameter].items():
            assert torch.equal(value, state[parameter].get(name, torch.zeros_like(value)))
    other = parameters_of([p.detach() for p in parameters])
    fresh = ours(other, **OPTIONS)
    if not first:
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.found_inf = torch.zeros((), device=DEVICE_TYPE)
    gradients = random_values()
    for some, its in ((parameters, optimizer), (other, fresh)):  # as if the step that was left out had not been
        give(some, gradients)
        its.step()
    assert all(map(torch.equal, tensors_of(parameters, optimizer), tensors_of(other, fresh)))


def test_clipping_is_for_one_step_and_leaves_the_gradients():
    values, gradients = random_values(), random_values()
    clipped, plain = parameters_of(values), parameters_of(values)
    optimizer, other = MultiTensorAdamW(clipped, **OPTIONS), MultiTensorAdamW(plain, **OPTIONS)
    give(clipped, gradients)
    norm = optimizer.clip_grad_norm(MAX_NORM)
    optimizer.step()
    assert all(torch.equal(p.grad.double().cpu(), gradient) for p, gradient in zip(clipped, gradients, strict=True))
    factor = norm.new_tensor(MAX_NORM) / (norm + 1e-6)
    assert factor < 1
    give(plain, gradients)
    for parameter in plain:
        parameter.grad *= factor
    other.step()
    assert all(map(torch.equal, tensors_of(clipped, optimizer), tensors_of(plain, other)))
    for some, its in ((clipped, optimizer), (plain, other)):
        give(some, gradients)
        its.step()
    assert all(map(torch.equal, tensors_of(clipped, optimizer), tensors_of(plain, other)))
    assert torch.equal(norm, optimizer.clip_grad_norm(1e9))  # a factor of 1, not above
    optimizer.step()
    other.step()
    assert all(map(torch.equal, clipped, plain))


def test_the_end_of_a_tensor_without_epsilon():
    """What is loaded beyond the last element, 0 over 0, is in no sum."""
    start, gradients = random_values([(7,)]), random_values([(7,)])
    mine, other = parameters_of(start), parameters_of(start)
    for parameters, build in ((mine, MultiTensorLAMB), (other, LAMB)):
        give(parameters, gradients)
        build(parameters, **{**OPTIONS, "eps": 0.0}).step()
    torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def test_no_gradient_at_all():
    parameters = parameters_of(random_values())
    before = copy.deepcopy(parameters)
    optimizer = MultiTensorLAMB(parameters, **OPTIONS)
    assert optimizer.clip_grad_norm(MAX_NORM) == 0
    optimizer.step()
    assert all(map(torch.equal, parameters, before)) and not optimizer.state


@OURS_AND_TORCHS
def test_tensors_come_go_and_move(ours, theirs):
    """Gradients in memory of their own in every step, some steps without one, weights and state that are replaced."""
    shapes = ((3,), (40, 5), (17,))
    start = random_values(shapes)
    mine, other = parameters_of(start), parameters_of(start)
    optimizer, reference = ours(mine, **OPTIONS), theirs(other, **OPTIONS)
    kept = []
    for step in range(8):
        gradients: list[Tensor | None] = list(random_values(shapes))
        if step in (0, 3):
            gradients[step % 2] = None
        give(mine, gradients)
        give(other, gradients)
        kept.append([p.grad for p in mine])  # nothing gets the memory of a gradient before
        if step == 5:
            for parameter in mine:
                parameter.data = parameter.data.clone()
                for name, value in optimizer.state[parameter].items():
                    optimizer.state[parameter][name] = value.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(tensors_of(mine, optimizer), tensors_of(other, reference), rtol=2e-5, atol=2e-6)
    assert [optimizer.state[p]["step"].item() for p in mine] == [7, 7, 8]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(MultiTensorAdamW, fused_adamw), (MultiTensorAdamW, AdamW), (MultiTensorLAMB, LAMB)],
    ids=["fused adamw", "adamw", "lamb"],
)
@pytest.mark.parametrize("to_torch", [True, False])
def test_state_goes_to_torchs_and_back(ours, theirs, to_torch):
    before, after = (ours, theirs) if to_torch else (theirs, ours)
    shapes = ((3,), (40, 5))
    start = random_values(shapes)
    straight, first = parameters_of(start), parameters_of(start)
    reference, optimizer = theirs(straight, **OPTIONS), before(first, **OPTIONS)
    for step in range(4):
        gradients = random_values(shapes)
        if step == 2:
            state = optimizer.state_dict()
            first = parameters_of([p.detach() for p in first])
            optimizer = after(first, **OPTIONS)
            optimizer.load_state_dict(state)
        for parameters, its in ((straight, reference), (first, optimizer)):
            give(parameters, gradients)
            its.step()
    assert {len(optimizer.state[p]) for p in first} == {3}
    torch.testing.assert_close(first, straight, rtol=1e-5, atol=1e-6)
    for parameter, its in zip(first, straight, strict=True):
        for name in ("exp_avg", "exp_avg_sq", "step"):
            torch.testing.assert_close(
                optimizer.state[parameter][name].cpu(), reference.state[its][name].cpu(), rtol=2e-5, atol=1e-7
            )


def test_a_step_count_from_elsewhere_is_taken():
    """torch counts on the host, and in float64 where that is the default dtype."""
    (parameter,) = parameters_of(random_values([(3,)]))
    optimizer = MultiTensorAdamW([parameter], **OPTIONS)
    give([parameter], random_values([(3,)]))
    optimizer.step()
    optimizer.state[parameter]["step"] = torch.tensor(7.0, dtype=torch.float64)
    give([parameter], random_values([(3,)]))
    optimizer.step()
    step = optimizer.state[parameter]["step"]
    assert step == 8 and step.dtype == torch.float32 and step.device == parameter.device


def test_options_that_it_lacks_are_refused():
    parameters = parameters_of(random_values([(3,)]))
    optimizer = MultiTensorAdamW(parameters, **OPTIONS)
    optimizer.load_state_dict(AdamW(parameters, amsgrad=True, **OPTIONS).state_dict())
    give(parameters, random_values([(3,)]))
    with pytest.raises(ValueError, match="neither amsgrad nor maximize"):
        optimizer.step()


def test_parameters_that_it_does_not_take_are_refused(monkeypatch):
    def value(**options) -> nn.Parameter:
        return nn.Parameter(torch.zeros(4, 6, device=DEVICE_TYPE, **options))

    with pytest.raises(ValueError, match="must be float32, contiguous.*one is torch.float64"):
        MultiTensorAdamW([value(dtype=torch.float64)], **OPTIONS)
    with pytest.raises(ValueError, match="not contiguous"):
        MultiTensorLAMB([nn.Parameter(value().detach().t())], **OPTIONS)
    with pytest.raises(ValueError, match="at most 64 groups of parameters, not 65"):
        MultiTensorAdamW([{"params": [value()]} for _ in range(65)], **OPTIONS)
    with pytest.raises(RuntimeError, match=f"its kernels run on {DEVICE_TYPE}, the parameters are on meta"):
        MultiTensorAdamW([nn.Parameter(torch.zeros(3, device="meta"))], **OPTIONS)
    monkeypatch.setattr(multi_tensor, "unavailable_reason", lambda: "nvcc is not there")
    with pytest.raises(RuntimeError, match="nvcc is not there"):
        MultiTensorLAMB([value()], **OPTIONS)


def test_a_scaler_unscales_for_it():
    start = random_values([(3,), (5, 2)])
    plain, scaled = parameters_of(start), parameters_of(start)
    scaler = torch.amp.GradScaler(DEVICE_TYPE, init_scale=64.0)
    optimizers = MultiTensorAdamW(plain, **OPTIONS), MultiTensorAdamW(scaled, **OPTIONS)
    sum(parameter.square().sum() for parameter in plain).backward()
    scaler.scale(sum(parameter.square().sum() for parameter in scaled)).backward()
    optimizers[0].step()
    scaler.step(optimizers[1])
    assert all(map(torch.equal, plain, scaled))


class Recording:
    """In the extension's place: notes the calls that give work to the device instead of making them, as a CUDA graph does."""

    WORK = ("write_words", "assign_chunks", "gradient_norm", "adamw", "lamb")

    def __init__(self, extension: Any) -> None:
        self.extension = extension
        self.calls: list[tuple[Callable, tuple]] = []

    def __getattr__(self, name: str) -> Any:
        made = getattr(self.extension, name)
        return (lambda *args: self.calls.append((made, args))) if name in self.WORK else made

    def repeat(self) -> None:
        for function, args in self.calls:
            function(*args)


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable], tuple[Recording, Any]]]:
    """Records what a function does; memory that it allocates stays, as a graph's does."""
    memory: list[Tensor] = []

    def record(function: Callable) -> tuple[Recording, Any]:
        recorded = Recording(kernels.extension)
        empty = torch.empty

        def kept(*args, **kwargs) -> Tensor:
            memory.append(empty(*args, **kwargs).fill_(-1))
            return memory[-1]

        with monkeypatch.context() as patch:
            patch.setattr(kernels, "extension", recorded)
            for module in (kernels, multi_tensor):
                patch.setattr(module, "is_recorded", lambda device: True)
            patch.setattr(torch, "empty", kept)
            return recorded, function()

    yield record


@OURS_AND_TORCHS
def test_a_recorded_step_repeats(ours, theirs, recording):
    """With other gradients, another rate and steps that are left out, all read on the device; steps that are not recorded, on
    gradients in other places, come between.
    """
    shapes = ((3,), (40, 5), (2**14 + 3,))
    start = random_values(shapes)
    plain, recorded = parameters_of(start), parameters_of(start)
    rates = [torch.tensor(RATE, device=DEVICE_TYPE) for _ in range(2)]
    skips = [torch.zeros((), device=DEVICE_TYPE) for _ in range(2)]
    optimizers = [ours(ps, **{**OPTIONS, "lr": rate}) for ps, rate in zip((plain, recorded), rates, strict=True)]
    for optimizer, skip in zip(optimizers, skips, strict=True):
        optimizer.found_inf = skip

    def take(optimizer: Optimizer) -> Tensor:
        norm = optimizer.clip_grad_norm(MAX_NORM)
        optimizer.step()
        return norm

    graph, graph_norm = None, None
    graphs, others = ([p.detach() for p in parameters_of(start)] for _ in range(2))
    for step in range(7):
        unrecorded = step in (0, 3, 5)
        gradients = random_values(shapes)
        for rate, skip in zip(rates, skips, strict=True):
            rate.fill_(RATE / (step + 1))
            skip.fill_(float(step == 4))
        give(plain, gradients)
        norm = take(optimizers[0])
        for place, parameter, gradient in zip(others if unrecorded else graphs, recorded, gradients, strict=True):
            parameter.grad = place.copy_(gradient)
        if unrecorded:
            found = take(optimizers[1])
        else:
            if graph is None:
                before = tensors_of(recorded, optimizers[1])
                graph, graph_norm = recording(lambda: take(optimizers[1]))
                again, _ = recording(lambda: take(optimizers[1]))
                assert len(again.calls) == len(graph.calls)  # a table of its own, as graphs go one by one
                assert all(map(torch.equal, tensors_of(recorded, optimizers[1]), before))
            graph.repeat()
            found = graph_norm
        assert torch.equal(found, norm)
        assert all(map(torch.equal, tensors_of(recorded, optimizers[1]), tensors_of(plain, optimizers[0])))
    assert optimizers[0].state[plain[0]]["step"] == 6
