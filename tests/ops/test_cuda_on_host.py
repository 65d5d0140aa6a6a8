"""The CUDA kernels on the model of a GPU's threads (tests/cuda_on_host), and what the model can tell.

A kernel without a missing barrier gives the same bits in whatever order its threads take their turns.
"""

from __future__ import annotations

import subprocess

import pytest
import torch

from fastbert.ops import add_layer_norm, attention, cuda, embedding_layer_norm, gelu_layer_norm, mlm_loss

from .. import cuda_on_host
from .helpers import new_seed

needs_model = pytest.mark.skipif(
    cuda.DEVICE_TYPE != "cpu" or cuda.unavailable_reason() is not None, reason="the CUDA kernels are not on the model of a GPU"
)
EPS, DROPOUT = 1e-12, {"dropout_p": 0.3, "seed": new_seed(), "stream": 3}
# Rows of one warp, four to a block; of two, two to a block; of eight. The numbers of rows are no multiple of either.
WIDTHS = (96, 768, 2304)


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16).requires_grad_()


def run_add_layer_norm(hidden: int) -> list[torch.Tensor]:
    leaves = [leaf(37, hidden), leaf(hidden), leaf(37, hidden), leaf(hidden), leaf(hidden)]
    return with_gradients(add_layer_norm(*leaves, EPS, **DROPOUT, backend="cuda"), leaves)


def run_gelu_layer_norm(hidden: int) -> list[torch.Tensor]:
    leaves = [leaf(37, hidden), leaf(hidden), leaf(hidden), leaf(hidden)]
    return with_gradients(gelu_layer_norm(*leaves, EPS, backend="cuda"), leaves)


def run_embedding_layer_norm(hidden: int) -> list[torch.Tensor]:
    """Runs of one id that are short, and longer than the 64 rows that are summed at once."""
    ids = torch.randint(30, (201,)).clamp(min=12), torch.randint(2, (201,)), torch.randint(4, (201,)).clamp(min=2)
    leaves = [leaf(30, hidden), leaf(4, hidden), leaf(2, hidden), leaf(hidden), leaf(hidden)]
    return with_gradients(embedding_layer_norm(*ids, *leaves, EPS, **DROPOUT, backend="cuda"), leaves)


def run_mlm_loss(classes: int) -> list[torch.Tensor]:
    leaves = [leaf(13, 8), leaf(classes + 1, 8), leaf(classes + 1)]
    losses, correct = mlm_loss(*leaves, torch.randint(classes, (13,)), label_smoothing=0.1, reduction="none", backend="cuda")
    return [correct, *with_gradients(losses, leaves)]


def run_attention(head_dim: int) -> list[torch.Tensor]:
    """Several tiles, by the kernels of both architectures; behind the ends of sequences is the NaN of others."""
    qkv, cu_seqlens = leaf(166, 3, 1, head_dim), torch.tensor([0, 140, 143, 163, 166], dtype=torch.int32)
    others = torch.ones(166, dtype=torch.bool)
    others[140:143] = others[163:] = False
    qkv.data[~others] = torch.nan
    results = []
    for capability in (80, 90):
        with cuda_on_host.capability(capability):
            results += with_gradients(attention(qkv, cu_seqlens, 140, **DROPOUT, backend="cuda"), [qkv])
    return [result[others] for result in results]


def with_gradients(out: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.randn_like(out))]


RUNS = {
    "add_layer_norm": (run_add_layer_norm, WIDTHS),
    "gelu_layer_norm": (run_gelu_layer_norm, WIDTHS),
    "embedding_layer_norm": (run_embedding_layer_norm, WIDTHS),
    "mlm_loss": (run_mlm_loss, WIDTHS),
    "attention": (run_attention, (64, 96)),
}


@needs_model
@pytest.mark.parametrize(("op", "width"), [(op, width) for op, (_, widths) in RUNS.items() for width in widths])
def test_same_bits_in_whatever_order_threads_take_turns(op, width):
    results = []
    for order in range(5):  # ascending, descending, shuffled
        torch.manual_seed(1)
        with cuda_on_host.threads_in_order(order):
            results.append(RUNS[op][0](width))
    assert all(torch.isfinite(t).all() for t in results[0])
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include "cuda/launcher.cuh"

using fastbert::cuda::launch;

void take_neighbours(int* out, bool with_barrier) {
  __shared__ int shared[64];
  shared[threadIdx.x] = 1 + static_cast<int>(threadIdx.x);
  if (with_barrier) __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + 1) % 64];
}

void barrier_of_some() {
  if (threadIdx.x < 32) __syncthreads();
}

void two_meetings() {
  if (threadIdx.x < 16) {
    __syncwarp();
  } else {
    __shfl_xor_sync(0xFFFFFFFF, 1, 1);
  }
}

// By how many steps a warp was ahead of the other at most.
void race(int* out) {
  __shared__ int steps[2];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  steps[warp] = 0;
  __syncthreads();
  for (int step = 1; step <= 200; ++step) {
    __syncwarp();
    steps[warp] = step;
    out[threadIdx.x] = std::max(out[threadIdx.x], step - steps[1 - warp]);
  }
}

void be_last(int* out) { *out = static_cast<int>(blockIdx.x + 10 * blockIdx.y); }

void nothing() {}

int main(int, char** arguments) {
  const std::string kernel = arguments[1];
  simt::set_order(std::strtoull(arguments[2], nullptr, 10));
  int out[64] = {};
  try {
    simt::run(1, 64, 0, [&] {
      if (kernel == "barrier" || kernel == "no barrier") take_neighbours(out, kernel == "barrier");
      if (kernel == "barrier of some") barrier_of_some();
      if (kernel == "two meetings") two_meetings();
      if (kernel == "race") race(out);
    });
    if (kernel == "last block") launch("last block", be_last, dim3(3, 2), 1, 0, nullptr, &out[0]);
    if (kernel == "no blocks") launch("no blocks", nothing, dim3(3, 0), 32, 0, nullptr);
    if (kernel == "many blocks") launch("many blocks", nothing, dim3(1, 1 << 16), 32, 0, nullptr);
    if (kernel == "many threads") launch("many threads", nothing, 1, dim3(1024, 2), 0, nullptr);
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 1;
  }
  for (const int value : out) std::printf("%d ", value);
}
"""


@pytest.fixture(scope="module")
def run_kernel(tmp_path_factory):
    """run_kernel(name of a kernel of the program above, order) -> (whether it ended well, what was printed)."""
    compiler = cuda_on_host.compiler()
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("simt")
    (folder / "main.cpp").write_text(PROGRAM, encoding="utf-8")
    files = [str(folder / "main.cpp"), str(cuda_on_host.FOLDER / "simt.cpp"), "-o", str(folder / "main")]
    subprocess.run([*compiler, *cuda_on_host.FLAGS, f"-I{cuda_on_host.FOLDER}", *files], check=True)

    def run(kernel: str, order: int) -> tuple[bool, str]:
        result = subprocess.run([str(folder / "main"), kernel, str(order)], capture_output=True, text=True, timeout=60)
        return result.returncode == 0, result.stdout

    return run


def test_the_model_shows_a_missing_barrier(run_kernel):
    expected = "".join(f"{1 + (i + 1) % 64} " for i in range(64))
    assert {run_kernel("barrier", order) for order in range(4)} == {(True, expected)}
    without = {run_kernel("no barrier", order) for order in range(4)}
    assert len(without) == 4
    assert (True, expected) not in without


def test_a_warp_runs_far_ahead_in_shuffled_orders(run_kernel):
    """Warps that stay together would hide a missing barrier between a tile's users and its next writers."""
    lead = [max(map(int, run_kernel("race", order)[1].split())) for order in range(4)]
    assert max(lead[:2]) <= 2
    assert min(lead[2:]) > 100


def test_the_model_names_a_deadlock(run_kernel):
    ended_well, text = run_kernel("barrier of some", 0)
    assert not ended_well
    line = PROGRAM.splitlines().index("  if (threadIdx.x < 32) __syncthreads();") + 1
    assert "deadlock" in text
    assert "32 threads have returned" in text
    assert f"32 threads wait for a barrier at {text.split('a barrier at ')[1].split(':')[0]}:{line}" in text


def test_the_model_names_threads_that_meet_in_different_calls(run_kernel):
    ended_well, text = run_kernel("two meetings", 0)
    assert not ended_well
    assert "different calls: __syncwarp" in text
    assert "__shfl_xor_sync" in text


def test_blocks_run_in_that_order_too(run_kernel):
    last = [run_kernel("last block", order)[1].split()[0] for order in range(8)]
    assert last[:2] == ["12", "0"]
    assert len(set(last)) > 2


@pytest.mark.parametrize("launch", ["no blocks", "many blocks", "many threads"])
def test_a_launch_that_a_gpu_refuses_is_refused(run_kernel, launch):
    assert run_kernel(launch, 0) == (False, f"{launch}: invalid configuration argument\n")
