"""The CUDA kernels (csrc/cuda) made by a C++ compiler, on a model of a GPU's threads: their numbers are tested without a GPU.

csrc/cuda keeps what is not plain CUDA C++ in two headers, ptx.cuh and launcher.cuh; this folder has a twin of each, the part of
CUDA's own headers that is used, and simt.h, which says what the model shows and what it cannot.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parent.parent
FLAGS = (
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",  # as nvcc compiles
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",  # unroll
)


@functools.cache
def compiler() -> list[str] | None:
    """The command of a C++ compiler that knows enough of C++20 (GCC 11), or None where there is none."""
    commands = [shlex.split(os.environ["CXX"])] if os.environ.get("CXX") else [["g++"], ["clang++"]]
    return next((command for command in commands if shutil.which(command[0]) and _knows_cpp20(command)), None)


def _knows_cpp20(command: list[str]) -> bool:
    program = "#include <source_location>\nstd::source_location here = std::source_location::current();\n"
    probe = [*command, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    return subprocess.run(probe, input=program, text=True, capture_output=True, check=False).returncode == 0


def load() -> ModuleType:
    """``fastbert._cuda`` of this machine's compiler, built where its sources have changed; for processes that start together."""
    from filelock import FileLock

    build = REPOSITORY / "build" / "cuda_on_host"
    build.mkdir(parents=True, exist_ok=True)
    command = compiler()
    target = build / f"{_digest(command)}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with FileLock(build / "lock"):
        if not target.exists():
            _build(command, build, target)
    loader = importlib.machinery.ExtensionFileLoader("fastbert._cuda", str(target))
    spec = importlib.util.spec_from_file_location("fastbert._cuda", target, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _digest(command: list[str]) -> str:
    digest = hashlib.sha256(repr((command, FLAGS, sys.version)).encode())
    for path in sorted([*FOLDER.rglob("*.*"), *(REPOSITORY / "csrc").rglob("*.*")]):
        if path.suffix in (".h", ".cuh", ".cu", ".cpp"):
            digest.update(path.relative_to(REPOSITORY).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _build(command: list[str], build: Path, target: Path) -> None:
    import pybind11

    includes = [f"-I{path}" for path in (FOLDER, REPOSITORY / "csrc", pybind11.get_include(), sysconfig.get_path("include"))]
    # The slowest to compile comes first.
    sources = [REPOSITORY / "csrc/cuda/bindings.cpp", *sorted((REPOSITORY / "csrc" / "cuda").glob("*.cu")), FOLDER / "simt.cpp"]
    objects = [str(build / f"{source.stem}.o") for source in sources]

    def compile_one(source: Path, result: str) -> None:
        subprocess.run([*command, *FLAGS, *includes, "-x", "c++", "-c", str(source), "-o", result], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    partial = target.with_suffix(".partial")
    subprocess.run([*command, "-shared", *objects, "-o", str(partial)], check=True)
    for old in build.glob(f"*{target.suffix}"):
        old.unlink()
    os.replace(partial, target)


@contextmanager
def threads_in_order(order: int) -> Iterator[None]:
    """Blocks run, and the threads of each take turns, in ascending order (0), descending (1), or shuffled by this seed (others)."""
    library = _library()
    library.simt_set_order(ctypes.c_uint64(order))
    try:
        yield
    finally:
        library.simt_set_order(ctypes.c_uint64(0))


@contextmanager
def capability(value: int) -> Iterator[None]:
    """The kernels are those of a GPU of this compute capability, 80 or 90 (the default)."""
    library = _library()
    library.simt_set_capability(value)
    try:
        yield
    finally:
        library.simt_set_capability(90)


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(sys.modules["fastbert._cuda"].__file__)
