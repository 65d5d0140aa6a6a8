"""The backward pass of attention is right where nothing has been on the GPU before it: see ``first_gpu_work``."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fastbert.ops import backends

from ..conftest import REPOSITORY
from .helpers import DEVICE


def check(backend: str, way: str, sequences: int) -> None:
    if reasons := backends.not_supported_reasons(backend, "attention", DEVICE, torch.bfloat16, 64):
        pytest.skip(f"{backend}: {'; '.join(reasons)}")
    command = [sys.executable, "-m", "tests.ops.first_gpu_work", backend, way, str(sequences)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "dqkv is right" in done.stdout and f"on {DEVICE}" in done.stdout


# A batch that leaves most of the GPU idle and one that fills it: Triton has a kernel for each.
@pytest.mark.cuda
@pytest.mark.parametrize("sequences", [4, 256])
@pytest.mark.parametrize("way", ["main", "autograd"])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_the_backward_pass_comes_first(backend, way, sequences):
    check(backend, way, sequences)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the program itself")
@pytest.mark.parametrize(("backend", "way"), [("triton", "main"), ("cuda", "autograd")])
def test_the_program_on_a_cpu(backend, way):
    check(backend, way, 4)
