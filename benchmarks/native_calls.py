"""Every C++ kernel for CPUs, called once on fixed inputs: what ``instructions`` runs under valgrind.

    python -I -S native_calls.py PATH-OF-fastbert/_cpu*.so INSTRUCTION-SET

Knows no torch, which would take minutes to import there: memory is ctypes', values are a pattern. Before each call, before one of
nothing at the end, and after it stands a mark, the call of a function that valgrind is told to look for. For each call there is a
line of JSON at the end, in order: ``kernel``, ``dtype``, ``dropout`` and ``elements``, by which ``instructions`` divides: rows x
hidden of the row-wise ops, logits of mlm_loss, multiply-adds of the matmuls and of attention's scores.
"""

from __future__ import annotations

import array
import ctypes
import importlib.util
import json
import math
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

# Small, since valgrind takes 50 times as long, and large enough that what a call costs once is below 1%. Odd sizes are the tests'.
ROWS, HIDDEN, CLASSES = 64, 768, 1024
LENGTHS, HEADS, HEAD_DIM = (128, 37, 64), 2, 64
MATMUL = 128, 256, 256  # rows, depth, columns
LAYER_HIDDEN, LAYER_WIDE = 128, 512
DTYPES = ("float32", "bfloat16")
PROBABILITY, LEVELS = 6554, 65536
EPS, SEED, ALIGNMENT = 1e-12, 0x1234567890ABCDE, 64
THREADS = 1


class Call(NamedTuple):
    kernel: str
    dtype: str
    dropout: bool
    elements: int
    run: Callable[[], Any]


class Memory:
    """Addresses of arrays that stay as long as this object."""

    def __init__(self) -> None:
        self._kept: list[Any] = []
        values = [math.sin(12.9898 * i) for i in range(1021)]
        halves = [struct.unpack("<I", struct.pack("<f", value))[0] >> 16 for value in values]
        self._patterns = {"float32": array.array("f", values).tobytes(), "bfloat16": array.array("H", halves).tobytes()}

    def of_bytes(self, content: bytes) -> int:
        buffer = ctypes.create_string_buffer(len(content) + ALIGNMENT)
        self._kept.append(buffer)
        address = -(-ctypes.addressof(buffer) // ALIGNMENT) * ALIGNMENT
        ctypes.memmove(address, content, len(content))
        return address

    def values(self, dtype: str, *shape: int) -> int:
        """From -1 to 1."""
        pattern, size = self._patterns[dtype], math.prod(shape) * (4 if dtype == "float32" else 2)
        return self.of_bytes((pattern * (size // len(pattern) + 1))[:size])

    def floats(self, value: float, count: int) -> int:
        return self.of_bytes(array.array("f", [value]).tobytes() * count)

    def integers(self, numbers: list[int], code: str = "q") -> int:
        return self.of_bytes(array.array(code, numbers).tobytes())

    def empty(self, *shape: int) -> int:
        """Of float32, which is room enough for any dtype."""
        return self.of_bytes(bytes(4 * math.prod(shape)))


def calls(cpu: Any, memory: Memory) -> Iterator[Call]:
    """cpu: the module fastbert._cpu."""
    seed = memory.integers([SEED])
    dropouts = {
        False: cpu.Dropout(0, 1.0, 0, 0),
        True: cpu.Dropout(PROBABILITY, LEVELS / (LEVELS - PROBABILITY), seed, 5),
    }
    for dtype in DTYPES:
        for has_dropout, dropout in dropouts.items():
            for kernel, elements, arguments in with_dropout(cpu, memory, dtype, dropout, has_dropout):
                yield bound(cpu, kernel, dtype, has_dropout, elements, arguments)
        for kernel, elements, arguments in without_dropout(cpu, memory, dtype):
            yield bound(cpu, kernel, dtype, False, elements, arguments)
    for kernel, elements, arguments in matmul_and_layer(cpu, memory):
        yield bound(cpu, kernel, "float32", False, elements, arguments)


def bound(cpu: Any, kernel: str, dtype: str, dropout: bool, elements: int, arguments: tuple) -> Call:
    function = cpu.EncoderLayers.forward if kernel == "encoder_layer" else getattr(cpu, kernel)
    return Call(kernel, dtype, dropout, elements, lambda: function(*arguments))


def with_dropout(cpu: Any, memory: Memory, dtype: str, dropout: Any, has_dropout: bool) -> Iterator[tuple[str, int, tuple]]:
    of_dtype, end = getattr(cpu.DType, dtype), (getattr(cpu.DType, dtype), THREADS)
    x, other, out, second = (memory.values(dtype, ROWS, HIDDEN) for _ in range(4))
    bias, weight, ln_bias, mean, rstd = (memory.values("float32", HIDDEN) for _ in range(5))
    sums, partials = [memory.empty(HIDDEN) for _ in range(3)], memory.empty(cpu.row_chunks(ROWS), 3, HIDDEN)
    elements = ROWS * HIDDEN

    forward = (x, bias, other, weight, ln_bias, out, second, mean, rstd, ROWS, HIDDEN, EPS, dropout, *end)
    yield "add_layer_norm_forward", elements, forward
    dx = second if has_dropout else 0
    yield "add_layer_norm_backward", elements, (x, other, mean, rstd, weight, dx, out, *sums, partials, ROWS, HIDDEN, dropout, *end)

    ids = [memory.integers([row * 7 % CLASSES for row in range(ROWS)]), memory.integers([0] * ROWS),
           memory.integers(list(range(ROWS)))]  # fmt: skip
    tables = [memory.values(dtype, rows, HIDDEN) for rows in (CLASSES, ROWS, 2)]
    norm = (weight, ln_bias, out, mean, rstd, ROWS, HIDDEN, EPS, dropout, *end)
    yield "embedding_layer_norm_forward", elements, (*ids, *tables, *norm)
    dz = memory.empty(ROWS, HIDDEN)
    gradients = (dz, *sums[:2], partials, ROWS, HIDDEN, dropout, *end)
    yield "embedding_layer_norm_backward", elements, (x, *ids, *tables, mean, rstd, weight, *gradients)

    total, pairs = sum(LENGTHS), sum(length * length for length in LENGTHS)
    bounds = memory.integers([sum(LENGTHS[:i]) for i in range(len(LENGTHS) + 1)], "i")
    qkv, dqkv = memory.values(dtype, total, 3, HEADS, HEAD_DIM), memory.empty(total, 3, HEADS, HEAD_DIM)
    heads, dheads = (memory.values(dtype, total, HEADS, HEAD_DIM) for _ in range(2))
    lse = memory.floats(5.0, HEADS * total)
    shape = (total, len(LENGTHS), HEADS, HEAD_DIM, HEAD_DIM**-0.5, dropout, of_dtype, THREADS)
    yield "attention_forward", pairs * HEADS * HEAD_DIM, (qkv, bounds, heads, memory.empty(HEADS, total), *shape)
    yield "attention_backward", pairs * HEADS * HEAD_DIM, (dheads, qkv, heads, lse, bounds, dqkv, *shape)

    # The first row of each sequence: keys and values are packed for one query.
    rows, some = memory.integers([sum(LENGTHS[:i]) for i in range(len(LENGTHS))]), (len(LENGTHS), *shape)
    q, kv = memory.values(dtype, len(LENGTHS), HEADS, HEAD_DIM), memory.values(dtype, total, 2, HEADS, HEAD_DIM)
    out, dout = (memory.values(dtype, len(LENGTHS), HEADS, HEAD_DIM) for _ in range(2))
    elements = total * HEADS * HEAD_DIM
    yield "attention_of_rows_forward", elements, (q, kv, rows, bounds, out, memory.empty(HEADS, len(LENGTHS)), *some)
    dq, dkv = memory.empty(len(LENGTHS), HEADS, HEAD_DIM), memory.empty(total, 2, HEADS, HEAD_DIM)
    yield "attention_of_rows_backward", elements, (dout, q, kv, rows, out, lse, bounds, dq, dkv, *some)


def without_dropout(cpu: Any, memory: Memory, dtype: str) -> Iterator[tuple[str, int, tuple]]:
    end = (getattr(cpu.DType, dtype), THREADS)
    x, dy, out, second = (memory.values(dtype, ROWS, HIDDEN) for _ in range(4))
    bias, weight, ln_bias, mean, rstd = (memory.values("float32", HIDDEN) for _ in range(5))
    sums, partials = [memory.empty(HIDDEN) for _ in range(3)], memory.empty(cpu.row_chunks(ROWS), 3, HIDDEN)
    elements = ROWS * HIDDEN
    yield "gelu_layer_norm_forward", elements, (x, bias, weight, ln_bias, out, mean, rstd, ROWS, HIDDEN, EPS, *end)
    backward = (dy, x, bias, weight, mean, rstd, out, *sums, partials, ROWS, HIDDEN, *end)
    yield "gelu_layer_norm_backward", elements, backward
    yield "bias_gelu_forward", elements, (x, bias, out, ROWS, HIDDEN, *end)
    yield "bias_gelu_backward", elements, (dy, x, bias, out, second, sums[0], partials, ROWS, HIDDEN, *end)

    # Every id occurs: the C library's memset, which clears the others' rows, has other instructions on every machine.
    dz, ids = memory.values("float32", ROWS, HIDDEN), memory.integers([row * 7 % ROWS for row in range(ROWS)])
    sorting = (memory.integers([0] * ROWS), memory.integers([0] * (ROWS + 1)))
    yield "table_gradient", elements, (dz, ids, *sorting, memory.empty(ROWS, HIDDEN), ROWS, ROWS, HIDDEN, -1, *end)

    logits, bias = memory.values(dtype, ROWS, CLASSES), memory.values("float32", CLASSES)
    labels = memory.integers([row * 11 % CLASSES for row in range(ROWS)])
    statistics = [memory.floats(value, ROWS) for value in (-math.inf, 0.0, 0.0)]
    yield "mlm_loss_forward", ROWS * CLASSES, (logits, bias, labels, *statistics, 0, ROWS, CLASSES, CLASSES, 0, *end)
    final = [memory.floats(value, ROWS) for value in (2.0, CLASSES / 2, 1 / ROWS)]
    gradients = (memory.empty(CLASSES), memory.empty(cpu.row_chunks(ROWS), CLASSES))
    shape = (ROWS, CLASSES, CLASSES, 0, CLASSES, 0.0, *end)
    yield "mlm_loss_backward", ROWS * CLASSES, (logits, bias, labels, *final, *gradients, *shape)


def matmul_and_layer(cpu: Any, memory: Memory) -> Iterator[tuple[str, int, tuple]]:
    """The kernels of float32 alone, with this instruction set."""
    rows, depth, columns = MATMUL
    a, b, bias = (memory.values("float32", *shape) for shape in ((rows, depth), (columns, depth), (columns,)))
    packed = memory.of_bytes(bytes(cpu.matmul_workspace_bytes(depth, columns, cpu.DType.float32)))
    # a times b transposed, as in a forward pass.
    strides = (depth, 1, 1, depth, columns)
    out = memory.empty(rows, columns)
    end = (cpu.MatmulEnd.product, cpu.DType.float32, cpu.DType.float32, THREADS)
    yield "matmul", rows * depth * columns, (a, b, bias, out, 0, 0, 0, packed, rows, depth, columns, *strides, *end)

    float32, hidden, wide = cpu.DType.float32, LAYER_HIDDEN, LAYER_WIDE
    linears = []
    for out_features, in_features in ((3 * hidden, hidden), (hidden, hidden), (wide, hidden), (hidden, wide)):
        weight, packed = memory.values("float32", out_features, in_features), memory.empty(out_features, in_features)
        yield "pack_weight", out_features * in_features, (weight, packed, out_features, in_features, float32, THREADS)
        bias = memory.values("float32", out_features)
        linears.append(cpu.PackedLinear(packed, bias, 0, 0, out_features, in_features))
    norms = [memory.values("float32", hidden) for _ in range(4)]
    shape = (EPS, EPS, hidden // HEAD_DIM, HEAD_DIM, HEAD_DIM**-0.5, float32, float32)
    layers = cpu.EncoderLayers([cpu.EncoderLayer(*linears, *norms, *shape)])
    total, batch = sum(LENGTHS), len(LENGTHS)
    bounds = memory.integers([sum(LENGTHS[:i]) for i in range(batch + 1)], "i")
    x, y = memory.values("float32", total, hidden), memory.empty(total, hidden)
    size = layers.workspace_bytes(bounds, total, batch, THREADS)
    workspace = memory.of_bytes(bytes(size))
    dense = (linears[2], x, memory.empty(total, wide), total, hidden, float32, THREADS)
    yield "packed_dense", total * hidden * wide, dense

    multiply_adds = total * (4 * hidden * hidden + 2 * hidden * wide)
    yield "encoder_layer", multiply_adds, (layers, x, bounds, y, workspace, total, batch, THREADS, [], 0)


def main() -> None:
    library, instruction_set = sys.argv[1:]
    spec = importlib.util.spec_from_file_location("_cpu", library)
    cpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cpu)
    cpu.set_instruction_set(instruction_set)
    memory = Memory()
    prepared = list(calls(cpu, memory))
    mark = cpu.set_openmp_parallel  # to one thread, which is what it is
    for call in prepared:
        mark(0)
        call.run()
    mark(0)
    (lambda: None)()
    mark(0)
    for call in prepared:
        print(json.dumps({"kernel": call.kernel, "dtype": call.dtype, "dropout": call.dropout, "elements": call.elements}))


if __name__ == "__main__":
    main()
