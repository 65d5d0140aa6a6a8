"""Who takes a training step beside fastbert: transformers, as different users train it.

An entry's ``make`` gets the step of transformers' model (``benchmarks.training.TrainingStep``) and returns one or several of its
kind by contender's name. Those that need a GPU are written after their libraries' sources and have not been run on one.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.models.bert import modeling_bert

from ..cpu_goals import PADDED_TO_LONGEST
from . import FASTBERT, FLASH_ATTN, TORCH, TRANSFORMERS
from .peer import FLOATS, Package, Peer
from .with_torch import TOKEN_BUDGET, onednn_float32_matmul

if TYPE_CHECKING:
    from ..training import TrainingStep

THEIRS, EAGER, COMPILED = "transformers", "transformers eager", "transformers compiled"
FLASH, LIGER = "transformers flash-attention", "transformers with Liger"
SORTED = "transformers sorted in micro-batches, oneDNN"
WHOLE_BATCHES = (THEIRS, EAGER, COMPILED, FLASH, LIGER)  # of the contenders, those that take a batch as it is padded

Steps = dict[str, "TrainingStep"]


def _as_it_comes(theirs: TrainingStep) -> Steps:
    return {THEIRS: theirs}


def _eager(theirs: TrainingStep) -> Steps:
    return {EAGER: theirs.of(_with_attention(theirs.model, "eager"))}


def _flash(theirs: TrainingStep) -> Steps:
    return {FLASH: theirs.of(_with_attention(theirs.model, "flash_attention_2"))}


def _with_attention(model: nn.Module, implementation: str) -> nn.Module:
    copied = copy.deepcopy(model)
    copied.set_attn_implementation(implementation)
    return copied


def _compiled(theirs: TrainingStep) -> Steps:
    return {COMPILED: theirs.called_by(torch.compile(theirs.model, dynamic=False))}


def _sorted(theirs: TrainingStep) -> Steps:
    careful = theirs.under(onednn_float32_matmul)
    return {PADDED_TO_LONGEST: careful, SORTED: careful}


def _liger(theirs: TrainingStep) -> Steps:
    """Liger patches no BERT: this is what its own patches of other models do, LayerNorm's forward on each module and the loss in
    the module that computes it. Its GELU is tanh's approximation inside a gated MLP, which BERT does not have."""
    from liger_kernel.transformers import LigerLayerNorm

    model = copy.deepcopy(theirs.model)
    for module in model.modules():
        if type(module) is nn.LayerNorm:
            module.variance_epsilon = module.eps
            module.forward = LigerLayerNorm.forward.__get__(module)
    return {LIGER: theirs.of(model).under(_liger_cross_entropy)}


@contextlib.contextmanager
def _liger_cross_entropy() -> Iterator[None]:
    """transformers' BERT computes its losses with Liger's kernel, which leaves the logits' gradient in the logits' memory."""
    from liger_kernel.transformers import LigerCrossEntropyLoss

    kept = modeling_bert.CrossEntropyLoss
    modeling_bert.CrossEntropyLoss = LigerCrossEntropyLoss
    try:
        yield
    finally:
        modeling_bert.CrossEntropyLoss = kept


_BOTH, _PACKAGES = {"cpu": FLOATS, "cuda": FLOATS}, (TRANSFORMERS, TORCH)
# Names are those of --peers; the first always takes part.
PEERS = {
    "transformers": Peer(THEIRS, _as_it_comes, _BOTH, "as it comes: attention by torch's SDPA, padding computed", _PACKAGES),
    "transformers-eager": Peer(EAGER, _eager, _BOTH, 'attn_implementation="eager"', _PACKAGES),
    "transformers-sorted": Peer(
        f"{PADDED_TO_LONGEST}; {SORTED}", _sorted, {"cpu": FLOATS},
        "batches padded to their own longest sequence, or (where the loss is a mean over sequences) in micro-batches of similar "
        f"lengths of at most {TOKEN_BUDGET} tokens with padding, whose gradients are accumulated; float32 matmuls by oneDNN",
        _PACKAGES,
    ),
    "transformers-compiled": Peer(COMPILED, _compiled, _BOTH, "torch.compile(model, dynamic=False)", _PACKAGES),
    "transformers-flash": Peer(
        FLASH, _flash, {"cuda": ("bfloat16",)}, 'attn_implementation="flash_attention_2"', (FLASH_ATTN, *_PACKAGES),
    ),
    "transformers-liger": Peer(
        LIGER, _liger, {"cuda": FLOATS}, "SDPA; LigerLayerNorm's forward on every LayerNorm, LigerCrossEntropyLoss for the losses",
        (Package("liger_kernel", "pip install liger-kernel"), *_PACKAGES),
    ),
}  # fmt: skip
# The others take minutes.
DEFAULT_PEERS = ("transformers", "transformers-sorted", "transformers-flash", "transformers-liger")


def described(names: Iterable[str]) -> dict[str, dict[str, str | None]]:
    """What a document says of fastbert and of the peers of those names: title, versions, how they are run."""
    how = "fastbert's class of the same name; packed: the batch's real tokens in one row, as a packing data loader makes them"
    peers = {name: peer.described() for name, peer in PEERS.items() if name == THEIRS or name in names}
    return {"fastbert": {"title": "fastbert", "version": FASTBERT.version, "how": how}, **peers}
