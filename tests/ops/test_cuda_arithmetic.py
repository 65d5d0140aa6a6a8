"""The arithmetic of the CUDA kernels, compiled for the host: its numbers are tested without a GPU."""

from __future__ import annotations

import math
import shutil
import subprocess

import pytest
import torch

from fastbert.ops import reference

from ..conftest import REPOSITORY
from .helpers import new_seed

COLUMNS, ARGUMENTS, SCORES = 7 * 83, 4001, 60
PROGRAM = r"""
#include <cstdio>
#include "cuda/arithmetic.h"
using namespace fastbert::cuda;
float exp_of(float x) { return expf(x); }
float score(int i) { return i % 10 == 0 ? -INFINITY : static_cast<float>(i % 17) * 3.0f - 20.0f; }
int main() {
  for (uint32_t row = 0; row < 7; ++row)
    for (uint32_t column = 0; column < 83; ++column) {
      const Words words = philox(column / 8, row, 3, 11, SEED);
      std::printf("%d\n", keeps(words, column, THRESHOLD) ? 1 : 0);
    }
  for (int i = -2000; i <= 2000; ++i) {
    const float u = i * 0.01f;
    std::printf("%.9g %.9g\n", gelu(u), gelu_derivative(u, normal_cdf(u)));
  }
  SoftmaxSums sums{-INFINITY, 0.0f};
  for (int i = 0; i < SCORES; ++i) sums = merge(exp_of, sums, {score(i), score(i) == -INFINITY ? 0.0f : 1.0f});
  std::printf("%.9g %.9g\n", sums.max, sums.sum);
  for (int i = 0; i < SCORES; ++i) {
    std::printf("%.9g %.9g\n", softmax_gradient(exp_of, score(i), sums.max, 1.0f / sums.sum, i == 7 ? 0.9f : 0.1f, 2.0f),
                softmax_gradient(exp_of, i == 7 ? NAN : score(i), sums.max, 1.0f / sums.sum, 0.1f, 0.0f));
  }
}
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> list[str]:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("arithmetic")
    (folder / "main.cpp").write_text(PROGRAM, encoding="utf-8")
    seed, threshold = int(new_seed()), reference.dropout_threshold(0.3)
    defines = [f"-DSEED={seed}ull", f"-DTHRESHOLD={threshold}u", f"-DSCORES={SCORES}"]
    files = [str(folder / "main.cpp"), "-o", str(folder / "main")]
    subprocess.run([compiler, "-std=c++17", "-O1", f"-I{REPOSITORY / 'csrc'}", *defines, *files], check=True)
    return subprocess.run([str(folder / "main")], capture_output=True, text=True, check=True).stdout.splitlines()


def test_dropout_mask_is_the_references_bit_for_bit(printed):
    rows, columns = torch.arange(7)[:, None], torch.arange(83)[None, :]
    keep = reference.dropout_keep(rows, columns, 3, 0.3, new_seed(), 11)
    assert torch.equal(torch.tensor([line == "1" for line in printed[:COLUMNS]]).view(7, 83), keep)


def test_gelu_and_its_derivative(printed):
    values = torch.tensor(
        [[float(number) for number in line.split()] for line in printed[COLUMNS : COLUMNS + ARGUMENTS]], dtype=torch.float64
    )
    u = (torch.arange(-2000, 2001, dtype=torch.float32) * torch.tensor(0.01)).double()
    cdf = 0.5 * torch.erfc(-u / math.sqrt(2.0))
    derivative = cdf + u * torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)
    torch.testing.assert_close(values[:, 0], u * cdf, atol=1e-10, rtol=2e-5)
    torch.testing.assert_close(values[:, 1], derivative, atol=3e-7, rtol=1e-6)


def test_softmax_and_its_gradient(printed):
    """Among scores of -infinity, which the first one is; where dloss is 0, the gradient is 0 even of NaN."""
    (maximum, total), *gradients = ([float(n) for n in line.split()] for line in printed[COLUMNS + ARGUMENTS :])
    scores = torch.tensor([-math.inf if i % 10 == 0 else i % 17 * 3.0 - 20.0 for i in range(SCORES)], dtype=torch.float64)
    assert maximum == scores.max()
    assert math.isclose(total, (scores - maximum).exp().sum(), rel_tol=1e-6)
    target = torch.full_like(scores, 0.1).index_fill_(0, torch.tensor([7]), 0.9)
    expected = torch.stack([2 * (scores.softmax(0) - target), torch.zeros_like(scores)], dim=1)
    torch.testing.assert_close(torch.tensor(gradients, dtype=torch.float64), expected, atol=1e-6, rtol=0)
