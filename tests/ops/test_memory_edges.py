"""The C++ kernels read and write what they are given and nothing beside it, on every instruction set.

Each case runs on tensors before a protected page and behind one, with memory that holds different bytes before it is written: an
access beyond an edge ends the process, and what depends on bytes that nobody has written differs.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import random
import signal

import pytest
import torch

from fastbert.ops import backends, native, reference
from fastbert.ops.encoder_layer import EncoderLayerWeights, LayerNormWeights, LinearWeights
from fastbert.ops.native.encoder_layer import PackedEncoderLayer, PackedEncoderLayers, run_layers
from fastbert.ops.native.inference import EmbeddingTables, PackedDense, read_mask

from .guarded_memory import GuardedMemory
from .test_native import instruction_set  # noqa: F401 (a fixture)

REASON = backends.unavailable_reason("native")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
WIDTHS = (1, 3, 15, 16, 17, 33, 130, 257)
ROWS = (1, 2, 5, 23, 97)


class Draw:
    """Sizes and tensors of one case, the same whenever it is drawn: an odd mixture, since edges of all kinds are what matters."""

    def __init__(self, case: int, dtype: torch.dtype) -> None:
        self.dtype, self._random, self._generator = dtype, random.Random(case), torch.Generator().manual_seed(case)

    def one_of(self, *choices):
        return self._random.choice(choices)

    def floats(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator).to(dtype or self.dtype)

    def ids(self, most: int, *shape: int) -> torch.Tensor:
        return torch.randint(most, shape, generator=self._generator)

    def apart(self, rows: int, columns: int) -> torch.Tensor:
        """Rows that are apart, and the last one at the edge."""
        stride = columns + self.one_of(0, 1, 7)
        return self.floats(rows * stride).as_strided((rows, columns), (stride, 1))

    def dropout(self) -> tuple:
        return self.one_of((0.0, None, 0), (0.3, self.ids(2**40, 1), 5))

    def bounds(self, total: int) -> tuple[torch.Tensor, int]:
        cuts = torch.tensor([0, total // 7, total // 7, total], dtype=torch.int32)
        return cuts, int(cuts.diff().max())


def embeddings(draw):
    rows, hidden = draw.one_of(*ROWS), draw.one_of(*WIDTHS)
    ids = [draw.ids(most, rows) for most in (40, 2, 9)]
    tables = [draw.floats(most, hidden) for most in (40, 9, 2)]
    weight, ln_bias, dy, dropout = draw.floats(hidden), draw.floats(hidden), draw.floats(rows, hidden), draw.dropout()

    def run(to):
        *mine, w, b, g = (to(t) for t in (*ids, *tables, weight, ln_bias, dy))
        rate, seed, stream = dropout
        y, mean, rstd = native.embedding_layer_norm_forward(*mine, w, b, 1e-5, rate, to(seed), stream)
        needs = (True, True, True)
        return y, *native.embedding_layer_norm_backward(g, *mine, w, mean, rstd, 3, needs, rate, to(seed), stream)

    return run


def embedded_tokens(draw):
    batch, length, hidden = draw.one_of(1, 3), draw.one_of(1, 5, 33), draw.one_of(*WIDTHS)
    tables, norm = [draw.floats(most, hidden) for most in (40, 40, 2)], [draw.floats(hidden), draw.floats(hidden)]
    ids, types, mask = draw.ids(40, batch, length), draw.ids(2, batch, length), draw.ids(2, batch, length)

    def run(to):
        cu_seqlens, _, indices = read_mask(to(mask))
        y = EmbeddingTables(*map(to, (*tables, *norm)), 1e-5).embed(to(ids), to(types), None, indices)
        return cu_seqlens, indices, y

    return run


def ends_of_halves(draw):
    rows, hidden, dropout = draw.one_of(*ROWS), draw.one_of(*WIDTHS), draw.dropout()
    x, residual, dy = (draw.floats(rows, hidden) for _ in range(3))
    bias, weight, ln_bias = draw.one_of(None, draw.floats(hidden)), draw.floats(hidden), draw.floats(hidden)

    def run(to):
        (rate, seed, stream), b, w, lb = dropout, to(bias), to(weight), to(ln_bias)
        y, z, mean, rstd = native.add_layer_norm_forward(to(x), b, to(residual), w, lb, 1e-5, rate, to(seed), stream)
        grads = native.add_layer_norm_backward(to(dy), z, mean, rstd, w, b is not None, rate, to(seed), stream)
        y2, mean, rstd = native.gelu_layer_norm_forward(to(x), b, w, lb, 1e-5)
        return y, z, *grads, y2, *native.gelu_layer_norm_backward(to(dy), to(x), b, w, mean, rstd)

    return run


def attention(draw):
    total, heads, head_dim, dropout = draw.one_of(*ROWS), draw.one_of(1, 3), draw.one_of(1, 2, 7, 16, 17, 33, 64), draw.dropout()
    qkv, dout, (cu_seqlens, longest) = (
        draw.floats(total, 3, heads, head_dim),
        draw.floats(total, heads, head_dim),
        draw.bounds(total),
    )
    rows = draw.ids(total, draw.one_of(1, 4, total)).sort().values

    def run(to):
        rate, seed, stream = dropout
        sequences, options = (to(cu_seqlens), longest, 0.3), (rate, to(seed), stream)
        packed, g, read = to(qkv), to(dout), to(rows)
        out, lse = native.attention_forward(packed, *sequences, *options)
        dqkv = native.attention_backward(g, packed, out, lse, *sequences, *options)
        q, kv = to(qkv[rows, 0]), to(qkv[:, 1:].contiguous())
        of_rows, lse_of_rows = native.attention_of_rows_forward(q, kv, read, *sequences, *options)
        grads = native.attention_of_rows_backward(to(dout[rows]), q, kv, read, of_rows, lse_of_rows, *sequences, *options)
        return out, lse, dqkv, of_rows, lse_of_rows, *grads

    return run


def products(draw):
    rows, depth, columns = draw.one_of(*ROWS), draw.one_of(*WIDTHS), draw.one_of(*WIDTHS)
    a = draw.apart(rows, depth) if draw.one_of(True, False) else draw.apart(depth, rows).t()
    b = draw.apart(depth, columns) if draw.one_of(True, False) else draw.apart(columns, depth).t()
    bias, u, out = draw.one_of(None, draw.floats(columns)), draw.floats(rows, columns), draw.apart(rows, columns)

    def run(to):
        if not native.multiplies(draw.dtype):
            return ()
        a_, b_, bias_ = to(a), to(b), to(bias)
        results = [native.matmul(a_, b_, bias_), native.matmul(a_, b_, bias_, to(out)), *native.matmul_and_row_sums(a_, b_)]
        if draw.dtype == torch.float32:
            results += [*native.matmul_gelu(a_, b_, bias_), *native.matmul_gelu_gradient(a_, b_, to(u), bias_, True)]
        return results

    return run


def masked_lm_loss(draw):
    rows, block, first = draw.one_of(*ROWS), draw.one_of(*WIDTHS), draw.one_of(0, 64)
    logits, bias, labels, dloss = (
        draw.apart(rows, block),
        draw.one_of(None, draw.floats(block)),
        draw.ids(300, rows),
        draw.floats(rows),
    )
    dloss[::3] = 0

    def run(to):
        mine, b, which = to(logits), to(bias), to(labels)
        statistics = [to(torch.full((rows,), start)) for start in (-torch.inf, 0.0, 0.0, 0.0)]
        native.mlm_loss_forward(mine, b, which, first, *statistics)
        dbias = torch.empty(block, dtype=draw.dtype)
        native.mlm_loss_backward(mine, b, which, first, 400, *statistics[:2], to(dloss.float()), 0.1, dbias)
        return mine, dbias, *statistics

    return run


def packed_layers(draw):
    kind = draw.one_of(*((torch.float32,) if draw.dtype == torch.float32 else ()), torch.bfloat16, torch.int8)
    total, heads, head_dim, wide = draw.one_of(*ROWS), draw.one_of(1, 3), draw.one_of(4, 12, 20), draw.one_of(4, 36, 132)
    hidden, (cu_seqlens, _), x = heads * head_dim, draw.bounds(total), draw.floats(total, heads * head_dim)
    shapes = ((3 * hidden, hidden), (hidden, hidden), (wide, hidden), (hidden, wide))
    drawn = [(draw.floats(*shape, dtype=torch.float32), draw.one_of(None, draw.floats(shape[0]))) for shape in shapes]
    norms = [draw.floats(hidden) for _ in range(4)]

    def linear(weight, bias, to):
        if kind != torch.int8:
            return LinearWeights(to(weight.to(kind)), to(bias))
        quantized, scale = reference.quantize_weight(weight)
        return LinearWeights(to(quantized), to(bias), to(scale))

    def run(to):
        linears = [linear(*one, to) for one in drawn]
        norm, last_norm = (LayerNormWeights(to(norms[i]), to(norms[i + 1]), 1e-5) for i in (0, 2))
        weights = EncoderLayerWeights(*linears[:2], norm, *linears[2:], last_norm, heads, 0.3)
        layer = PackedEncoderLayer(weights, draw.dtype)
        y = run_layers(PackedEncoderLayers([layer, layer]), to(x), to(cu_seqlens))
        rows = draw.dtype if kind == torch.int8 else kind
        weight, bias = drawn[2]
        dense = PackedDense(LinearWeights(to(weight.to(rows)), to(bias)))
        return y, dense(to(torch.cat([x, x], dim=1).to(rows))[:, hidden:])

    return run


def bytes_of(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8)


CASES = (embeddings, embedded_tokens, ends_of_halves, attention, products, masked_lm_loss, packed_layers)


@pytest.mark.parametrize("case", CASES, ids=[case.__name__ for case in CASES])
def test_nothing_is_read_or_written_beyond_an_edge(case, instruction_set):  # noqa: F811
    threads = torch.get_num_threads()
    try:
        for number in range(16):
            torch.set_num_threads(1 + number % 3)
            run = case(Draw(number, (torch.float32, torch.bfloat16)[number % 2]))
            results = []
            for at_end, fill in ((True, 0xFF), (False, 0x00)):
                with GuardedMemory(at_end=at_end, fill=fill) as memory:
                    results.append([bytes_of(x) for x in run(memory.given) if x is not None])
            assert len(results[0]) == len(results[1])
            assert all(torch.equal(one, other) for one, other in zip(*results, strict=True)), number
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("at_end", [True, False])
def test_an_access_beyond_an_edge_ends_the_process(at_end):
    x = GuardedMemory(at_end=at_end, fill=0).moved(torch.ones(3))
    beyond = x.data_ptr() + (x.numel() * x.element_size() if at_end else -1)
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        ctypes.string_at(beyond, 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV
