"""Builds fastbert's two native modules; pyproject.toml says everything else.

``fastbert._cpu`` (csrc/cpu, a C++17 compiler) and ``fastbert._cuda`` (csrc/cuda, nvcc) know no torch, so setuptools and
pybind11 are all that a build needs. A failed native build never fails the installation: the package then runs on PyTorch and
Triton, and the reason is kept in ``fastbert/_build_report.json`` for ``fastbert doctor``.

Environment: MAX_JOBS, parallel compilers (default: the number of CPUs); CXX, the C++ compiler; FASTBERT_CUDA=0 (skip), 1 (failing
is an error) or auto (default: where nvcc is found, in CUDA_HOME or on PATH); FASTBERT_CUDA_ARCHS, such as "80;90a;100" (default:
those of the three that nvcc knows).
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

REPORT_NAME = "_build_report.json"
OUTPUT_TAIL_LINES = 40
PTXAS_FLAGS = ["-Xptxas", "-v"]
PTXAS_KERNEL = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'\n(.*?)(?=Compiling entry function|\Z)", re.DOTALL)
PTXAS_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
# Of nvcc and ptxas; the loss is what ptxas calls wgmma instructions that it has to wait for one by one.
COMPLAINT = re.compile(r"\bwarning\b|Performance Loss", re.IGNORECASE)

OPS = (
    "embedding_layer_norm",
    "table_gradient",
    "attention",
    "add_layer_norm",
    "gelu_layer_norm",
    "linear_gelu",
    "matmul",
    "mlm_loss",
    "packed_dense",
    "encoder_layer",
)
CPU_COMMON = (
    "csrc/bindings.cpp",
    "csrc/unchanged.cpp",
    *(
        f"csrc/cpu/{name}.cpp"
        for name in ("dispatch", "runtime", "attention_schedule", "embed_tokens", "encoder_plan", "fingerprint")
    ),
)
# GCC 12 takes its own AVX-512 intrinsics for uninitialised (its bug 105593).
CPU_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]
AVX512_FLAGS = ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
INSTRUCTION_SETS = {
    "x86_64": {
        "baseline": ["-march=x86-64"],
        "avx2": ["-mavx2", "-mfma"],
        "avx2_vnni": ["-mavx2", "-mfma", "-mavxvnni"],
        "avx512": AVX512_FLAGS,
        "avx512_vnni": [*AVX512_FLAGS, "-mavx512vnni"],
        "avx512_bf16": [*AVX512_FLAGS, "-mavx512bf16", "-mavx512vnni"],
        "avx512_amx": [*AVX512_FLAGS, "-mavx512bf16", "-mavx512vnni", "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
    },
    "aarch64": {"baseline": []},
}

# Of a set that differs from the one before it in these alone.
OPS_OF = {
    "avx2_vnni": ("encoder_layer",),
    "avx512_vnni": ("encoder_layer",),
    "avx512_amx": ("attention", "encoder_layer", "packed_dense", "matmul"),
}

CUDA_SOURCES = ("csrc/cuda/bindings.cpp", *(path.as_posix() for path in sorted(Path("csrc/cuda").glob("*.cu"))))
CUDA_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CUDA_ARCHS = ("80", "90a", "100")


class NativeBuildError(Exception):
    """Why a native module was not built; ``output`` is what the failing command printed."""

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.output = output


def sources(folder: str, suffix: str, ops: tuple[str, ...]) -> list[str]:
    return [f"csrc/{folder}/{op}{suffix}" for op in ops]


def run_command(command: list[str]) -> str:
    """Runs one compiler; returns what it printed, raises NativeBuildError where it fails or does not exist."""
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as error:
        raise NativeBuildError(f"{command[0]} could not be started: {error}") from error
    if result.returncode != 0:
        raise NativeBuildError(f"{command[0]} exited with status {result.returncode}: {shlex.join(command)}", result.stdout)
    return result.stdout


def version_lines(compiler: list[str]) -> list[str]:
    """What the compiler says of itself, a line at least; a wrapper may have nothing to say."""
    return run_command([*compiler, "--version"]).strip().splitlines() or [f"{shlex.join(compiler)}, of no known version"]


def link(command: list[str], target: str) -> None:
    """Writes the module; raises NativeBuildError also where the compiler does nothing and says nothing."""
    run_command([*command, "-o", target])
    if not Path(target).is_file():
        raise NativeBuildError(f"{command[0]} ended without an error and wrote no {Path(target).name}")


def run_parallel(commands: list[list[str]]) -> list[str]:
    """Runs the compilers, MAX_JOBS at a time; returns what each printed."""
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(max(jobs, 1)) as pool:
        futures = [pool.submit(run_command, command) for command in commands]
        try:
            return [future.result() for future in futures]
        except NativeBuildError:
            for future in futures:
                future.cancel()
            raise


def accepts(compiler: list[str], flags: list[str]) -> bool:
    """Whether the compiler knows these flags: those of AVX-512's later parts came with GCC 10 and clang 9."""
    try:
        run_command([*compiler, *flags, "-x", "c++", "-E", os.devnull])
    except NativeBuildError:
        return False
    return True


def include_flags() -> list[str]:
    return ["-Icsrc", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]


def find_cxx() -> list[str]:
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise NativeBuildError("no C++ compiler found: neither CXX nor g++, clang++ or c++ on PATH")


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    if home:
        nvcc = Path(home, "bin", "nvcc")
        if nvcc.exists():
            return str(nvcc)
        raise NativeBuildError(f"no nvcc at {nvcc} (from CUDA_HOME)")
    nvcc_on_path = shutil.which("nvcc")
    if nvcc_on_path is None:
        raise NativeBuildError("no nvcc found: CUDA_HOME is not set and nvcc is not on PATH")
    return nvcc_on_path


def cuda_arch_flags(nvcc: str) -> list[str]:
    """One -gencode per architecture; the lowest also as PTX, which newer GPUs than those listed compile when they load it."""
    requested = [arch for arch in os.environ.get("FASTBERT_CUDA_ARCHS", "").replace(",", ";").split(";") if arch]
    requested.sort(key=lambda arch: int(re.sub(r"\D", "", arch) or 0))
    known = run_command([nvcc, "--list-gpu-code"]).split()
    archs = requested or [arch for arch in CUDA_ARCHS if f"sm_{arch.rstrip('af')}" in known]
    if not archs:
        raise NativeBuildError(f"{nvcc} knows none of the architectures {', '.join(CUDA_ARCHS)}, only {', '.join(known)}")
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [f"-gencode=arch=compute_{archs[0]},code=[sm_{archs[0]},compute_{archs[0]}]", *flags[1:]]


def build_cpu(temp: Path, target: str) -> dict[str, object]:
    """Compiles csrc/cpu once per instruction set and links everything into one module; returns what the report says of it.

    No OpenMP runtime is linked: the module's one undefined symbol of OpenMP resolves, when it is imported, to the runtime that
    torch has loaded (fastbert/ops/native/extension.py sees to that).
    """
    if sys.platform != "linux" or platform.machine() not in INSTRUCTION_SETS:
        raise NativeBuildError(
            f"the C++ backend is for Linux on x86-64 and AArch64, this is {sys.platform} on {platform.machine()}"
        )
    cxx = find_cxx()
    version = version_lines(cxx)[0]
    flags = [*CPU_FLAGS, *include_flags()]
    sets = INSTRUCTION_SETS[platform.machine()]
    unknown = [name for name, isa_flags in sets.items() if not accepts(cxx, isa_flags)]
    units = [(source, "common", [f"-DFASTBERT_WITHOUT_{name}" for name in unknown]) for source in CPU_COMMON]
    for name, isa_flags in sets.items():
        if name not in unknown:
            units += [
                (source, name, [*isa_flags, f"-DFASTBERT_ISA={name}"]) for source in sources("cpu", ".cpp", OPS_OF.get(name, OPS))
            ]
    objects = [str(temp / f"{Path(source).stem}.{name}.o") for source, name, _ in units]
    commands = [[*cxx, *flags, *extra, "-c", source, "-o", obj] for (source, _, extra), obj in zip(units, objects)]
    # The slowest to compile come first: the bindings, and the sets of the widest vectors, which are the last.
    common, of_sets = commands[: len(CPU_COMMON)], commands[len(CPU_COMMON) :]
    run_parallel([*common, *reversed(of_sets)])
    link([*cxx, "-shared", *objects], target)
    return {"compiler": f"{version}; it knows no flags for {', '.join(unknown)}" if unknown else version}


def build_cuda(temp: Path, target: str) -> dict[str, object]:
    """Compiles csrc/cuda with nvcc, with the CUDA runtime linked statically; returns what the report says of it."""
    nvcc = find_nvcc()
    version = version_lines([nvcc])[-1]
    archs = cuda_arch_flags(nvcc)
    flags = [*CUDA_FLAGS, *PTXAS_FLAGS, *include_flags()]
    if any("sm_90a" in arch for arch in archs):  # what Hopper alone has, code for sm_90 may not use
        flags.append("-DFASTBERT_BUILT_FOR_HOPPER")
    objects = [str(temp / f"{Path(source).stem}.cuda.o") for source in CUDA_SOURCES]
    printed = run_parallel([[nvcc, *flags, *archs, "-c", source, "-o", obj] for source, obj in zip(CUDA_SOURCES, objects)])
    link([nvcc, "-shared", "-cudart=static", *archs, *objects], target)
    kernels = [kernel for source, text in zip(CUDA_SOURCES, printed) for kernel in ptxas_kernels(Path(source).stem, text)]
    return {
        "compiler": version,
        "requested_archs": os.environ.get("FASTBERT_CUDA_ARCHS") or None,
        "kernels": with_readable_names(kernels),
        "warnings": [line for text in printed for line in text.splitlines() if COMPLAINT.search(line)],
    }


def ptxas_kernels(source: str, printed: str) -> list[dict[str, object]]:
    """What ``-Xptxas -v`` says of each kernel for each architecture.

    A description goes to the next kernel's; spills may be those of a function that is called.
    """
    kernels = []
    for symbol, architecture, description in PTXAS_KERNEL.findall(printed):
        stack, stores, loads = (max(map(int, bytes_)) for bytes_ in zip(*PTXAS_SPILLS.findall(description)))
        shared = re.search(r"(\d+) bytes smem", description)
        kernels.append(
            {
                "source": source,
                "kernel": symbol,
                "symbol": symbol,
                "architecture": architecture,
                "registers": int(re.search(r"Used (\d+) registers", description).group(1)),
                "stack_bytes": stack,
                "spill_store_bytes": stores,
                "spill_load_bytes": loads,
                "shared_bytes": int(shared.group(1)) if shared else 0,
            }
        )
    return kernels


def with_readable_names(kernels: list[dict[str, object]]) -> list[dict[str, object]]:
    """The kernels named as C++ writes them, without namespaces and parameters, where binutils' c++filt is there to do it."""
    symbols = [str(kernel["symbol"]) for kernel in kernels]
    try:
        names = run_command(["c++filt", *symbols]).splitlines() if symbols else []
    except NativeBuildError:
        return kernels
    for kernel, name in zip(kernels, names):
        kernel["kernel"] = re.sub(r"\([^()]*\)$", "", re.sub(r"^void |\w+::|\(anonymous namespace\)::", "", name))
    return kernels


class BuildNative(build_ext):
    """build_ext with our own compiler calls, a report, and failures that do not end the installation."""

    def run(self) -> None:
        self.report: dict[str, dict[str, object]] = {}
        super().run()
        text = json.dumps({"python": platform.python_version(), "platform": platform.platform(), "modules": self.report}, indent=2)
        package_dirs = [Path(self.build_lib, "fastbert")]
        if self.inplace:
            package_dirs.append(Path(self.get_finalized_command("build_py").get_package_dir("fastbert")))
        for package_dir in package_dirs:
            package_dir.mkdir(parents=True, exist_ok=True)
            (package_dir / REPORT_NAME).write_text(text + "\n", encoding="utf-8")

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        cuda_mode = os.environ.get("FASTBERT_CUDA", "auto")
        if cuda_mode not in ("0", "1", "auto"):
            raise ValueError(f"FASTBERT_CUDA={cuda_mode!r}: it is 0, 1 or auto")
        target = Path(self.get_ext_fullpath(ext.name))
        temp = Path(self.build_temp, name)
        for folder in (target.parent, temp):
            folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        entry: dict[str, object] = {"built": True, "reason": None, "compiler": None, "output": ""}
        try:
            if name == "_cuda" and cuda_mode == "0":
                raise NativeBuildError("skipped: FASTBERT_CUDA=0")
            entry.update((build_cuda if name == "_cuda" else build_cpu)(temp, str(target)))
        except NativeBuildError as error:
            if name == "_cuda" and cuda_mode == "1":
                raise SystemExit(f"FASTBERT_CUDA=1, and {ext.name} cannot be built: {error}\n{error.output}") from error
            tail = "\n".join(error.output.splitlines()[-OUTPUT_TAIL_LINES:])
            entry.update(built=False, reason=str(error), output=tail)
            self.warn(f"{ext.name} was not built, fastbert works without it: {error}\n{tail}")
            self._remove_stale(ext)
        entry["seconds"] = round(time.monotonic() - started, 1)
        self.report[name] = entry

    def _remove_stale(self, ext: Extension) -> None:
        """An earlier build's module beside the sources would be imported in place of the one that was not built."""
        inplace_file, regular_file = self._get_inplace_equivalent(self.get_finalized_command("build_py"), ext)
        for path in (regular_file, *([inplace_file] if self.inplace else [])):
            Path(path).unlink(missing_ok=True)


def headers(*folders: str) -> list[str]:
    """Those in the folders: where one changes modules are built again, and they go into a source distribution."""
    return sorted(str(path) for folder in folders for pattern in ("*.h", "*.cuh") for path in Path(folder).glob(pattern))


setup(
    packages=[*find_packages(include=["fastbert", "fastbert.*"]), "fastbert_kernels"],
    package_dir={"fastbert_kernels": "kernels"},
    package_data={"fastbert.ops": ["measured_backends.json"]},
    ext_modules=[
        Extension(
            "fastbert._cpu",
            [*CPU_COMMON, *sources("cpu", ".cpp", OPS)],
            depends=headers("csrc", "csrc/cpu"),
            optional=True,
        ),
        Extension(
            "fastbert._cuda",
            [*CUDA_SOURCES],
            depends=headers("csrc", "csrc/cuda"),
            optional=True,
        ),
    ],
    cmdclass={"build_ext": BuildNative},
)
