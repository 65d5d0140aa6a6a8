"""Python programs in processes of their own, without the seven seconds of one core in which torch and transformers are imported.

They are forked from a server that has imported them: each has its own arguments, environment, folder, streams and signals. What
that cannot show is what the imports do, and what they read of the environment: such a test starts Python itself.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

REPOSITORY = Path(__file__).resolve().parent.parent
# Imported once, by the process that all others are forked from. It runs nothing: no thread of torch may exist where one forks.
PRELOADED = ["fastbert.train.pretrain", "fastbert.finetune.run", "fastbert.cli.main", "matplotlib.pyplot", "sklearn.metrics"]


def server() -> Any:
    """multiprocessing's context whose processes are forked from the server; the first process starts it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class ForkedModule:
    """``subprocess.Popen`` for ``[python, "-m", module, ...]`` and ``[python, "-c", code, ...]``, with files for its output.

    As there, ``wait`` gives the exit code, negative for a signal, or raises TimeoutExpired.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path | str = REPOSITORY,
        env: dict[str, str] | None = None,
        stdout: IO[Any],
        stderr: IO[Any],
        stdin: int = subprocess.DEVNULL,
        start_new_session: bool = False,
    ) -> None:
        if command[0] != sys.executable or command[1] not in ("-m", "-c") or stdin != subprocess.DEVNULL:
            raise ValueError(f"{command} is no module or code of this Python without an input")
        self.args = list(command)
        streams = stdout.name, stderr.name
        environment = dict(os.environ if env is None else env)
        self._process = server().Process(target=_run, args=(self.args[1:], str(cwd), environment, streams, start_new_session))
        self._process.start()
        self.pid = self._process.pid

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_python(
    *arguments: str, env: dict[str, str] | None = None, cwd: Path | str = REPOSITORY
) -> subprocess.CompletedProcess[str]:
    """``python -m ...`` or ``python -c ...`` to its end, with what it printed."""
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        process = ForkedModule([sys.executable, *arguments], cwd=cwd, env=env, stdout=out, stderr=err)
        try:
            code = process.wait()
        finally:
            process.kill()
        printed, complained = (Path(file.name).read_text(encoding="utf-8", errors="replace") for file in (out, err))
    return subprocess.CompletedProcess(process.args, code, printed, complained)


def rough_savefig(_figure: Any, path: Path, **_options: Any) -> None:
    """Instead of matplotlib's ``Figure.savefig``: no more than what a PNG begins with."""
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n")


def _run(arguments: list[str], folder: str, environment: dict[str, str], streams: tuple[str, str], new_session: bool) -> None:
    if new_session:
        os.setsid()
    for descriptor, path in zip((1, 2), streams, strict=True):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    # As in a Python that was started: the server's own streams may be no text, or be closed.
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), encoding="utf-8", line_buffering=True)
    sys.stderr = sys.__stderr__ = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), encoding="utf-8", line_buffering=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    os.environ.clear()
    os.environ.update(environment)
    _read_again(environment)
    os.chdir(folder)
    sys.path.insert(0, folder)
    kind, program, *rest = arguments
    if kind == "-c":
        sys.argv = ["-c", *rest]
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [program, *rest]
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def _read_again(environment: dict[str, str]) -> None:
    """What torch has read of the environment when it was imported."""
    import torch
    import torch._dynamo.config

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    torch._dynamo.config.disable = environment.get("TORCH_COMPILE_DISABLE", "0") == "1"
