"""What each of two processes does in ``test_distributed.py``; run as ``python -m tests.ecosystem.distributed_worker``.

The processes share a folder: the rendezvous, and a file of results per process, which the tests compare with one process on the
whole batch.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastbert

from ..model.helpers import inputs_for
from .helpers import fast_pair

WORLD, STEPS = 2, 3


def batch_of(name: str, step: int, rank: int | None = None) -> dict[str, torch.Tensor]:
    """The batch of a step, or the half of process ``rank``. Both halves have as many labels: their means' mean is the whole's."""
    torch.manual_seed(step)
    batch = inputs_for(name)
    if name in ("BertForPreTraining", "BertForMaskedLM"):
        batch["labels"] = torch.where(torch.arange(21) < 1, batch["input_ids"], -100)
    return batch if rank is None else {key: value[rank::WORLD] for key, value in batch.items()}


def models(name: str) -> tuple[nn.Module, nn.Module]:
    """(a plain model, a fast one) with the same weights in all processes; pretraining goes through one door, the rest the other."""
    torch.manual_seed(0)
    theirs, ours = fast_pair("class" if name == "BertForPreTraining" else "accelerate", name, num_hidden_layers=2)
    return theirs.train(), ours.train()


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def reference(name: str) -> dict:
    """One process, the plain model, whole batches: losses, gradients of the first step and weights after the last."""
    theirs, _ = models(name)
    steps, losses, first = optimizer(theirs), [], {}
    for step in range(STEPS):
        steps.zero_grad()
        loss = theirs(**batch_of(name, step)).loss
        loss.backward()
        losses.append(loss.detach())
        first = first or gradients(theirs)
        steps.step()
    return {"losses": losses, "gradients": first, "weights": theirs.state_dict()}


def trained(model: nn.Module, inner: nn.Module, name: str, rank: int, whole_gradients: Callable | None = None) -> dict:
    """The same of this process's halves, with the losses' mean over processes. ``inner``: the model inside of a wrapper."""
    steps, losses, first = optimizer(model), [], {}
    for step in range(STEPS):
        steps.zero_grad()
        loss = model(**batch_of(name, step, rank)).loss
        loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean / WORLD)
        first = first or (whole_gradients or gradients)(inner)
        steps.step()
    return {"losses": losses, "gradients": first}


def ddp(rank: int, name: str, **options) -> dict:
    _, ours = models(name)
    found = trained(DistributedDataParallel(ours, **options), ours, name, rank)
    return found | {"weights": ours.state_dict()}


def ddp_accumulation(rank: int) -> dict:
    """Two micro-batches per step, the first one without synchronisation."""
    name = "BertForSequenceClassification"
    _, ours = models(name)
    model = DistributedDataParallel(ours)
    for part in range(2):
        with model.no_sync() if part == 0 else nullcontext():
            (model(**batch_of(name, part, rank)).loss / 2).backward()
    found = gradients(ours)
    theirs, _ = models(name)
    for part in range(2):
        (theirs(**batch_of(name, part)).loss / 2).backward()
    return {"gradients": found, "expected": gradients(theirs)}


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}


def fsdp2(rank: int, name: str, used_before: bool = False, checkpointing: bool = False, **options) -> dict:
    """Sharded per layer."""
    _, ours = models(name)
    if used_before:
        ours(**batch_of(name, 9))
    if checkpointing:
        ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in ours.bert.encoder.layer:
        fully_shard(layer, **options)
    fully_shard(ours, **options)
    found = trained(ours, ours, name, rank, whole)
    state = get_model_state_dict(ours, options=StateDictOptions(full_state_dict=True))
    reasons = fastbert.explain(ours).encoder
    with torch.no_grad():
        ours.eval()(**batch_of(name, 0, rank))  # gathers again, without a backward pass
    return found | {"weights": state, "encoder": reasons}


def fsdp2_bfloat16(rank: int) -> dict:
    """Parameters are cast as they are gathered."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    name = "BertForSequenceClassification"
    theirs, ours = models(name)
    losses = []
    for model in (theirs, ours):
        for layer in model.bert.encoder.layer:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        steps = optimizer(model)
        losses.append([])
        for step in range(STEPS):
            steps.zero_grad()
            loss = model(**batch_of(name, step, rank)).loss
            loss.backward()
            losses[-1].append(loss.detach())
            steps.step()
    return {"theirs": losses[0], "ours": losses[1]}


def fsdp1(rank: int, use_orig_params: bool) -> dict:
    name = "BertForSequenceClassification"
    _, ours = models(name)
    layers = ours.bert.encoder.layer
    for index, layer in enumerate(layers):
        layers[index] = FullyShardedDataParallel(layer, device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    model = FullyShardedDataParallel(ours, device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    found = trained(model, ours, name, rank, lambda _: {})
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        weights = {name.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for name, p in model.named_parameters()}
    return {"losses": found["losses"], "weights": weights}


CASES: dict[str, Callable[[int], dict]] = {
    "ddp, classification": lambda rank: ddp(rank, "BertForSequenceClassification", find_unused_parameters=False),
    "ddp, pretraining": lambda rank: ddp(rank, "BertForPreTraining", find_unused_parameters=False),
    "ddp, static graph": lambda rank: ddp(rank, "BertForSequenceClassification", static_graph=True),
    "ddp, static graph of pretraining": lambda rank: ddp(rank, "BertForPreTraining", static_graph=True),
    "ddp, looking for unused parameters": lambda rank: ddp(rank, "BertForPreTraining", find_unused_parameters=True),
    "ddp, gradients as views of buckets": lambda rank: ddp(rank, "BertForPreTraining", gradient_as_bucket_view=True),
    "ddp, accumulation": ddp_accumulation,
    "fsdp2, classification": lambda rank: fsdp2(rank, "BertForSequenceClassification"),
    "fsdp2, pretraining": lambda rank: fsdp2(rank, "BertForPreTraining", used_before=True),
    "fsdp2, gathered until backward": lambda rank: fsdp2(rank, "BertForSequenceClassification", reshard_after_forward=False),
    "fsdp2, checkpointing": lambda rank: fsdp2(rank, "BertForSequenceClassification", checkpointing=True),
    "fsdp2, bfloat16": fsdp2_bfloat16,
    "fsdp1, original parameters": lambda rank: fsdp1(rank, use_orig_params=True),
    "fsdp1, flat parameters": lambda rank: fsdp1(rank, use_orig_params=False),
}
REFERENCES = ("BertForSequenceClassification", "BertForPreTraining")


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=WORLD)
    results = {}
    for case, run in CASES.items():
        results[case] = copy.deepcopy(run(rank))
    if rank == 0:
        results |= {name: reference(name) for name in REFERENCES}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
