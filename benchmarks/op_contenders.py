"""What the benchmarks of the ops are made of: sizes, cases, and contenders, each with the layout that it wants."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastbert.ops import backends, measured_backends

from .lengths import MLPERF, embedded
from .work import DIRECTIONS
from .workloads import VOCABULARY

EPS, STREAM, LABELLED = 1e-12, 5, 0.15
# Names of --peers -> how the names of their contenders begin.
PEERS = {
    "torch-eager": "torch eager",
    "torch-compile": "torch.compile",
    "torch-quantized": "torch quantized",
    "plain-linear": "plain linear",
    "sdpa": "sdpa",
    "varlen-attn": "varlen_attn",
    "flash-attn": "flash-attn",
    "liger": "Liger",
}


@dataclass(frozen=True)
class Scale:
    """tokens: of every case. lengths: of the cases of equal sequences. mix: one cycle of real lengths, and whose they are.

    checked_tokens: where not None, cases with dropout are compared with the reference on so many tokens, since it takes a minute to
    draw its masks for all of them. unlabelled_rows: whether a peer computes the losses' logits of all rows, as transformers does.
    """

    tokens: int
    hidden: tuple[int, ...]
    head_dim: int
    vocabulary: int
    lengths: tuple[int, ...]
    mix: tuple[int, ...]
    mix_name: str = "real lengths"
    checked_tokens: int | None = None
    unlabelled_rows: bool = True


# Where the backends for GPUs are compared with each other alone, at many rows and at few (``fastest_backends.py``).
_FOR_BACKENDS = Scale(
    65536, (768, 1024, 256), 64, VOCABULARY, (128, 512, 256, 64), embedded()["mnli"].quantiles(32), "MNLI's lengths", 4096
)
SCALES = {
    "full": Scale(65536, (768, 1024), 64, VOCABULARY, (128, 512), embedded()[MLPERF].quantiles(32), "Wikipedia's lengths"),
    "many": _FOR_BACKENDS,
    "few": replace(_FOR_BACKENDS, tokens=4096),
    "cpu": Scale(4096, (768,), 64, VOCABULARY, (128, 512), embedded()["mnli"].quantiles(32), "MNLI's lengths", 512, False),
    # What compute-sanitizer watches: rows in the registers of 32, 128 and 256 threads, and sequences of one tile and of several.
    "small": Scale(200, (64, 1024, 4096), 64, 320, (40,), (1, 33, 129, 512)),
    "toy": Scale(12, (64,), 64, 20, (), (3, 9)),
}


@dataclass
class Contender:
    """run(*leaves) -> output; restore(output, gradients of the leaves) -> the same in the layout of fastbert's op.

    Where no leaf requires a gradient there is a forward pass alone. ``largest_error``: of a result that is rounded elsewhere than
    the reference's; None for what the dtype gives.
    """

    run: Callable[..., Tensor]
    leaves: Sequence[Tensor]
    dout: Tensor | None
    restore: Callable[[Tensor, Sequence[Tensor]], list[Tensor]] = lambda out, grads: [out, *grads]
    comparable: bool = True  # not where it draws a dropout mask of its own, or does only a part of the work
    largest_error: float | None = None

    @property
    def directions(self) -> tuple[str, ...]:
        return DIRECTIONS if any(leaf.requires_grad for leaf in self.leaves) else DIRECTIONS[:1]


Offer = Callable[[], Contender] | str  # what makes a contender, or the reason why there is none


@dataclass
class Case:
    """ours(backend) is the op on that backend; ``compiled`` names the peer that torch.compile may try its luck with.

    matmul_dtype: of the matmul rate that is its ceiling, None for that of its leaves. chooses: whether the op takes the name of a
    backend; one that does not chooses by itself.
    """

    op: str
    name: str
    hidden: int
    dropout_p: float
    shape: dict[str, Any]
    ours: Callable[[str], Callable[..., Tensor]]
    leaves: Sequence[Tensor]
    dout: Tensor | None
    head_dim: int | None = None
    peers: dict[str, Offer] = field(default_factory=dict)
    compiled: str | None = "torch eager"
    matmul_dtype: str | None = None
    chooses: bool = True

    @property
    def dtype(self) -> str:
        return dtype_name(self.leaves[0].dtype)

    @property
    def sizes(self) -> dict[str, int]:
        """What the choice of a backend depends on (``fastbert.ops.measured_backends``)."""
        lengths = self.shape.get("lengths", (0,))
        known = {**self.shape, "rows": self.shape.get("rows", sum(lengths)), "max_seqlen": max(lengths)}
        return {name: known[name] for name in measured_backends.SIZES.get(self.op, ())}

    def picked(self, device: str, direction: str = DIRECTIONS[0]) -> str:
        """The contender of fastbert's that a user gets."""
        if not self.chooses:
            return "fastbert"
        dtype, sizes = self.leaves[0].dtype, {"head_dim": self.head_dim, **self.sizes}
        return f"fastbert {backends.choose(self.op, 'auto', torch.device(device), dtype, direction, **sizes)}"

    def contenders(self, device: str) -> Iterator[tuple[str, Offer]]:
        """(name, offer), fastbert's first; the reference only where "auto" picks it."""
        if not self.chooses:
            yield "fastbert", lambda: Contender(self.ours("auto"), self.leaves, self.dout)
        dtype, picked = self.leaves[0].dtype, self.picked(device)
        for backend in backends.BACKENDS if self.chooses else ():
            reasons = backends.not_supported_reasons(backend, self.op, device, dtype, self.head_dim)
            if backend != "reference" or picked == "fastbert reference":
                make = lambda backend=backend: Contender(self.ours(backend), self.leaves, self.dout)  # noqa: E731
                yield f"fastbert {backend}", "; ".join(reasons) or make
        yield from self.peers.items()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def leaf(*shape: int, device: str, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_()


def seed_on(device: str) -> Tensor:
    return torch.tensor([0x1234567890ABCDE], dtype=torch.int64, device=device)


def gpu_package(package: str, install: str, device: str, make: Callable[[], Contender], *reasons: str) -> Offer:
    """A contender whose package has kernels for CUDA devices alone; ``reasons``: what else speaks against it."""
    found = list(reasons)
    if importlib.util.find_spec(package) is None:
        found.append(f"{package} is not installed (pip install {install})")
    if device != "cuda":
        found.append("it runs on CUDA devices only")
    return "; ".join(found) or make


def liger(device: str, make: Callable[[], Contender]) -> Offer:
    """A contender of Liger-Kernel's Triton kernels (Hsu et al., 2024), as of its release 0.8."""
    return gpu_package("liger_kernel", "liger-kernel", device, make)


NO_LIGER_GELU = "Liger-Kernel has no GELU by itself: its GEGLU multiplies the tanh approximation by a gate"
