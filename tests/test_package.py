"""The package as a whole: lazy imports, the folder kernels/, one OpenMP runtime."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import fastbert

from .conftest import REPOSITORY


def python(code: str) -> str:
    """What ``code`` prints in a fresh interpreter that was started in the repository."""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="there is nothing to build elsewhere")
def test_compilers_that_do_and_say_nothing_are_a_reason_not_an_error(monkeypatch, tmp_path):
    setuptools = pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.chdir(REPOSITORY)
    steps = runpy.run_path("setup.py")
    silent = tmp_path / "bin" / "nvcc"
    silent.parent.mkdir()
    silent.write_text("#!/bin/sh\n")
    silent.chmod(0o755)
    monkeypatch.setenv("CXX", str(silent))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    for build, reason in (("build_cpu", "ended without an error and wrote no module.so"), ("build_cuda", "knows none of the arch")):
        with pytest.raises(steps["NativeBuildError"], match=reason):
            steps[build](tmp_path, str(tmp_path / "module.so"))


def test_a_source_distribution_has_all_of_csrc(monkeypatch):
    """setuptools puts into it what the extension modules name."""
    setuptools = pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: given.update(options))
    monkeypatch.chdir(REPOSITORY)
    runpy.run_path("setup.py")
    named = {path for module in given["ext_modules"] for path in (*module.sources, *module.depends)}
    assert named == {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "csrc").rglob("*.*")}


def test_what_is_imported_is_declared():
    """Not left to what another dependency happens to bring."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [
        *project["dependencies"],
        *(name for extra in ("train", "eval") for name in project["optional-dependencies"][extra]),
    ]
    names = {re.match(r"[\w-]+", requirement)[0].replace("-", "_") for requirement in declared}
    imported = set()
    for path in [*(REPOSITORY / "fastbert").rglob("*.py"), *(REPOSITORY / "kernels").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.partition(".")[0])
    others = imported - sys.stdlib_module_names - {"fastbert", "fastbert_kernels"}
    assert {"torch", "typer"} < others
    assert {{"sklearn": "scikit_learn"}.get(name, name) for name in others} <= names


def test_importing_the_package_imports_neither_torch_nor_transformers():
    assert python("import sys, fastbert; print({'torch', 'transformers'} & set(sys.modules))") == "set()"


def test_every_public_name_is_there():
    assert all(hasattr(fastbert, name) for name in fastbert.__all__)
    assert set(dir(fastbert)) == set(fastbert.__all__)
    with pytest.raises(AttributeError, match="no attribute 'BertForDreams'"):
        _ = fastbert.BertForDreams


def test_the_folder_kernels_does_not_shadow_hugging_faces_package():
    """transformers probes a package called kernels; from the repository's root ours must not answer."""
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()
    assert python("from transformers import BertModel; import fastbert_kernels.attention; print(BertModel.__name__)") == "BertModel"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
def test_the_process_holds_one_openmp_runtime():
    """A second one would spin against the first."""
    code = (
        "import torch, fastbert\n"
        "from fastbert.ops import add_layer_norm\n"
        "x = torch.randn(4096, 64)\n"
        "add_layer_norm(x, None, x, torch.ones(64), torch.zeros(64), 1e-12)\n"
        "print(open('/proc/self/maps').read())"
    )
    runtimes = set(re.findall(r"\S*/lib(?:gomp|iomp5|omp)[^/\s]*\.so[^\s]*", python(code)))
    assert len(runtimes) <= 1, runtimes
