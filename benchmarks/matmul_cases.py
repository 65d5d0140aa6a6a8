"""The ops with a matmul beside what torch and Liger-Kernel have for them.

A whole encoder layer in one call (``fastbert.ops.encoder_layer``) is none of them: the benchmark of inference measures it, and its
peers. AdamW is torch's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbert.ops import int8_linear, linear_gelu, mlm_loss
from fastbert.ops.feed_forward import feed_forward
from fastbert.ops.int8_linear import quantize_weight
from fastbert.ops.linear import linear
from fastbert.ops.reference import quantize_rows

from .op_contenders import LABELLED, NO_LIGER_GELU, Case, Contender, Offer, Scale, leaf, liger

# Of a result whose activations are rounded to int8 with one step for all rows, not one for each.
_ERROR_OF_ONE_STEP = 0.05
_TOO_LONG = "seconds for each pass on a CPU; --suite pretrain measures it, as transformers"


def linear_cases(scale: Scale, hidden: int, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Queries, keys and values together."""
    x, wide = leaf(scale.tokens, hidden, device=device, dtype=dtype), 3 * hidden
    weight, bias = (leaf(*shape, device=device, dtype=dtype, scale=0.03) for shape in ((wide, hidden), (wide,)))
    leaves, dout = [x, weight, bias], torch.randn(scale.tokens, wide, device=device).to(dtype)
    shape = {"rows": scale.tokens, "in_features": hidden, "out_features": wide}
    peers: dict[str, Offer] = {"torch eager": lambda: Contender(F.linear, leaves, dout)}
    yield Case(
        "linear", f"{scale.tokens} rows", hidden, 0.0, shape, lambda _: linear, leaves, dout, peers=peers,
        compiled=None, chooses=False,
    )  # fmt: skip


def linear_gelu_cases(scale: Scale, hidden: int, device: str, dtype: torch.dtype) -> Iterator[Case]:
    x, wide = leaf(scale.tokens, hidden, device=device, dtype=dtype), 4 * hidden
    weight, bias = (leaf(*shape, device=device, dtype=dtype, scale=0.03) for shape in ((wide, hidden), (wide,)))
    leaves, dout = [x, weight, bias], torch.randn(scale.tokens, wide, device=device).to(dtype)

    def ours(backend):
        return lambda *t: linear_gelu(*t, backend=backend)

    peers: dict[str, Offer] = {
        "torch eager": lambda: Contender(lambda *t: F.gelu(F.linear(*t)), leaves, dout),
        # Not the same work: the matmul alone, which the goal is set beside.
        "plain linear": lambda: Contender(F.linear, leaves, dout, comparable=False),
        "Liger GELU": NO_LIGER_GELU,
    }
    shape = {"rows": scale.tokens, "in_features": hidden, "out_features": wide}
    yield Case("linear_gelu", f"{scale.tokens} rows", hidden, 0.0, shape, ours, leaves, dout, peers=peers)


def feed_forward_cases(scale: Scale, hidden: int, device: str, dtype: torch.dtype) -> Iterator[Case]:
    x, wide = leaf(scale.tokens, hidden, device=device, dtype=dtype), 4 * hidden
    shapes = ((wide, hidden), (wide,), (hidden, wide))
    leaves = [x, *(leaf(*shape, device=device, dtype=dtype, scale=0.03) for shape in shapes)]
    dout = torch.randn(scale.tokens, hidden, device=device).to(dtype)

    def eager(x, weight, bias, out_weight):
        return F.linear(F.gelu(F.linear(x, weight, bias)), out_weight)

    peers: dict[str, Offer] = {"torch eager": lambda: Contender(eager, leaves, dout)}
    shape = {"rows": scale.tokens, "hidden": hidden, "intermediate": wide}
    yield Case(
        "feed_forward", f"{scale.tokens} rows", hidden, 0.0, shape, lambda _: feed_forward, leaves, dout,
        peers=peers, chooses=False,
    )  # fmt: skip


def int8_linear_cases(scale: Scale, hidden: int, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """With the GELU, as in front of a layer's wide activations. No op of these has a backward pass."""
    x, wide = leaf(scale.tokens, hidden, device=device, dtype=dtype).detach(), 4 * hidden
    weight, step = quantize_weight(torch.randn(wide, hidden, device=device) * 0.03)
    bias = torch.randn(wide, device=device)

    def ours(backend):
        return lambda x: int8_linear(x, weight, step, bias, activation="gelu", backend=backend)

    def eager(x: Tensor) -> Tensor:
        q, row_step = quantize_rows(x)
        return F.gelu(torch._int_mm(q, weight.t()) * (row_step[:, None] * step) + bias).to(x.dtype)

    def quantized() -> Contender:
        """torch.ao.quantization.quantize_dynamic's Linear: one step for all of x, found in each call."""
        zero_points = torch.zeros(wide, dtype=torch.int64)
        steps = step.double()
        of_channels = torch._make_per_channel_quantized_tensor(weight, steps, zero_points, 0)
        packed = torch.ops.quantized.linear_prepack(of_channels, bias)
        run = lambda x: F.gelu(torch.ops.quantized.linear_dynamic(x, packed))  # noqa: E731
        return Contender(run, [x], None, largest_error=_ERROR_OF_ONE_STEP)

    plain_weight = (weight * step[:, None]).to(dtype)
    peers: dict[str, Offer] = {
        "torch eager": lambda: Contender(eager, [x], None),
        "torch quantized": quantized if device == "cpu" and dtype == torch.float32 else "it takes float32 on a CPU only",
        # Not the same work: the matmul alone, in the dtype of the activations.
        "plain linear": lambda: Contender(lambda x: F.linear(x, plain_weight, bias.to(dtype)), [x], None, comparable=False),
    }
    shape = {"rows": scale.tokens, "in_features": hidden, "out_features": wide}
    yield Case(
        "int8_linear", f"{scale.tokens} rows", hidden, 0.0, shape, ours, [x], None, peers=peers, compiled=None,
        matmul_dtype="int8",
    )  # fmt: skip


def mlm_loss_cases(scale: Scale, hidden: int, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Liger's kernels make the gradients in the forward pass: only both directions together compare with theirs."""
    rows = int(scale.tokens * LABELLED)
    x = leaf(scale.tokens, hidden, device=device, dtype=dtype)
    shapes = ((scale.vocabulary, hidden), (scale.vocabulary,))
    weight, bias = (leaf(*shape, device=device, dtype=dtype, scale=0.03) for shape in shapes)
    labels, dout = torch.randint(scale.vocabulary, (rows,), device=device), torch.ones((), device=device)
    chosen = torch.randperm(scale.tokens, device=device)[:rows]
    all_labels = torch.full((scale.tokens,), -100, device=device).index_copy(0, chosen, labels)
    leaves = [x.detach()[chosen].requires_grad_(), weight, bias]

    def ours(backend):
        return lambda *t: mlm_loss(*t, labels, backend=backend)[0]

    def eager(targets):
        return lambda *t: F.cross_entropy(F.linear(*t).float(), targets)

    def all_rows() -> Contender:
        def restore(out: Tensor, grads: Sequence[Tensor]) -> list[Tensor]:
            return [out, grads[0][chosen], *grads[1:]]

        return Contender(eager(all_labels), [x, weight, bias], dout, restore)

    def liger_cross_entropy() -> Contender:
        from liger_kernel.transformers.functional import liger_cross_entropy

        return Contender(lambda *t: liger_cross_entropy(F.linear(*t), labels), leaves, dout)

    def liger_fused() -> Contender:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return Contender(lambda x, w, b: liger_fused_linear_cross_entropy(x, w, labels, bias=b), leaves, dout)

    peers: dict[str, Offer] = {
        "torch eager": lambda: Contender(eager(labels), leaves, dout),
        "torch eager, all rows": all_rows if scale.unlabelled_rows else _TOO_LONG,
        "Liger cross-entropy": liger(device, liger_cross_entropy),
        "Liger fused linear cross-entropy": liger(device, liger_fused),
    }
    shape = {"rows": rows, "hidden": hidden, "vocabulary": scale.vocabulary}
    yield Case("mlm_loss", f"{rows} of {scale.tokens} rows", hidden, 0.0, shape, ours, leaves, dout, peers=peers)
