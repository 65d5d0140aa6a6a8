"""DistributedDataParallel, FSDP2 and FSDP1 with two processes: the gradients and weights of one process with the whole batch."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ..processes import ForkedModule

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no distributed gloo backend"
)
WORLD = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The results of both processes, which run all cases one after the other: starting them is what takes the time."""
    folder: Path = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-m", "tests.ecosystem.distributed_worker"]
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context((folder / f"{rank}.log").open("w")) for rank in range(WORLD)]
        processes = [ForkedModule([*command, str(rank), str(folder)], stdout=log, stderr=log) for rank, log in enumerate(logs)]
        try:
            codes = [process.wait(300) for process in processes]
        finally:
            for process in processes:
                process.kill()
    assert codes == [0] * WORLD, "\n".join(Path(log.name).read_text()[-3000:] for log in logs)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-4) -> None:
    assert found.keys() <= expected.keys()
    largest = max(value.abs().max() for value in expected.values())
    for name, wanted in expected.items():
        if name in found and wanted.abs().max() > 1e-6 * largest:
            error = (found[name] - wanted).abs().max() / wanted.abs().max()
            assert error <= tolerance, f"{name}: relative error {error:.2e}"


def assert_as_one_process(results: list[dict], case: str, name: str) -> None:
    expected = results[0][name]
    for rank, result in enumerate(results):
        found = result[case]
        torch.testing.assert_close(torch.stack(found["losses"]), torch.stack(expected["losses"]), atol=2e-5, rtol=2e-5)
        if found.get("gradients"):
            assert found["gradients"].keys() == expected["gradients"].keys()
            assert_same(found["gradients"], expected["gradients"])
        if rank == 0 or found["weights"]:  # of FSDP2's whole state dict, the first process gets all
            assert len(found["weights"]) > 30
            assert_same(found["weights"], expected["weights"])


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("ddp, classification", "BertForSequenceClassification"),
        ("ddp, pretraining", "BertForPreTraining"),
        ("ddp, static graph", "BertForSequenceClassification"),
        ("ddp, static graph of pretraining", "BertForPreTraining"),
        ("ddp, looking for unused parameters", "BertForPreTraining"),
        ("ddp, gradients as views of buckets", "BertForPreTraining"),
        ("fsdp2, classification", "BertForSequenceClassification"),
        ("fsdp2, pretraining", "BertForPreTraining"),
        ("fsdp2, gathered until backward", "BertForSequenceClassification"),
        ("fsdp2, checkpointing", "BertForSequenceClassification"),
        ("fsdp1, original parameters", "BertForSequenceClassification"),
        ("fsdp1, flat parameters", "BertForSequenceClassification"),
    ],
)
def test_three_steps_are_those_of_one_process(results, case, name):
    assert_as_one_process(results, case, name)


def test_gradient_accumulation_without_synchronisation(results):
    for result in results:
        found = result["ddp, accumulation"]
        assert_same(found["gradients"], found["expected"])
        assert found["gradients"].keys() == found["expected"].keys()


def test_sharded_in_bfloat16(results):
    """Parameters are cast as they are gathered: at most twice the error of transformers' model, sharded in the same way."""
    exact = torch.stack(results[0]["BertForSequenceClassification"]["losses"])
    errors = []
    for model in ("theirs", "ours"):
        losses = torch.stack([torch.stack(result["fsdp2, bfloat16"][model]) for result in results]).mean(0)
        errors.append((losses - exact).abs().max())
    assert 0 < errors[1] <= 2 * errors[0]


def test_sharded_layers_are_still_packed(results):
    assert results[0]["fsdp2, classification"]["encoder"] == []
