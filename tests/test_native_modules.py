"""The native modules: what they offer is what their callers ask for, and an older one is no module but a reason."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from types import ModuleType

import pytest

from fastbert.build_report import import_built
from fastbert.ops import native
from fastbert.ops.cuda import extension

from .conftest import REPOSITORY
from .test_package import python

MODULES = pytest.mark.parametrize(("name", "names"), [("_cpu", native.NAMES), ("_cuda", extension.NAMES)])


@MODULES
def test_names_are_those_of_the_module(name, names):
    """On machines without a GPU _cuda is the one of tests/cuda_on_host, of the same sources."""
    try:
        module = importlib.import_module(f"fastbert.{name}")
    except ImportError as error:
        pytest.skip(str(error))
    assert {offered for offered in dir(module) if not offered.startswith("_")} == set(names)


@MODULES
def test_a_module_of_older_sources_is_told_apart(monkeypatch, name, names):
    older = ModuleType(f"fastbert.{name}")
    for known in names[2:]:
        setattr(older, known, None)
    monkeypatch.setitem(sys.modules, f"fastbert.{name}", older)
    module, reason = import_built(name, names)
    assert module is None
    assert reason.startswith(f"fastbert.{name} was built from other sources, without {names[0]}, {names[1]}: install")
    assert import_built(name, names[2:]) == (older, None)


@pytest.mark.parametrize("module", ["None", "types.ModuleType(name)"], ids=["none", "older"])
def test_without_them_everything_is_there_but_their_backends(module):
    code = (
        "import sys, types\n"
        "for name in ('fastbert._cpu', 'fastbert._cuda'):\n"
        f"    sys.modules[name] = {module}\n"
        "import torch\n"
        "from fastbert.ops import backends, gelu_layer_norm\n"
        "from fastbert.train import optimizer\n"
        "gelu_layer_norm(torch.randn(2, 8), None, torch.ones(8), torch.zeros(8), 1e-12)\n"
        "from transformers import BertConfig\n"
        "from fastbert import BertModel\n"
        "sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=9)\n"
        "model, ids = BertModel(BertConfig(**sizes)).eval(), torch.ones(2, 3, dtype=torch.int64)\n"
        "with torch.no_grad():\n"
        "    inference = model(ids, torch.tensor([[1, 1, 1], [1, 0, 0]])).last_hidden_state\n"
        "assert torch.equal(inference, model(ids, torch.tensor([[1, 1, 1], [1, 0, 0]])).last_hidden_state)\n"
        "for name, backend in backends.report()['backends'].items():\n"
        "    print(name, backend['reason'])"
    )
    reasons = dict(line.split(" ", 1) for line in python(code).splitlines())
    for backend, name in (("native", "_cpu"), ("cuda", "_cuda")):
        assert reasons[backend] != "None"
        assert reasons[backend].startswith(f"fastbert.{name} was built from other sources") == (module != "None")


@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang++ is not installed")
@pytest.mark.parametrize("source", sorted((REPOSITORY / "csrc" / "cpu").glob("*.cpp")), ids=lambda source: source.stem)
def test_clang_takes_the_kernels(source):
    """It looks into templates where GCC does not yet."""
    flags = ["-std=c++17", "-Icsrc", "-DFASTBERT_ISA=baseline", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    done = subprocess.run(["clang++", *flags, str(source)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
