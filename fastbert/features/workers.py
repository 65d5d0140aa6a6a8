"""The chunks of a run on several processes, each with a model of its own and its share of the threads.

A process takes a chunk when it is free, so that the slowest chunk holds up nobody; a chunk's bytes do not depend on who makes it.
(One thing could make them: the fastest matmul is measured for each number of threads, and another one may round otherwise;
FASTBERT_CALIBRATION=off always takes the same one. On the CPUs seen so far it is only bfloat16 that differs.) Processes talk
through one pipe each: when the parent is gone, even killed, its workers find theirs closed and end.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import transformers

from fastbert.runs.memory import keep_freed_memory

from .embedder import Embedder, TextError
from .parts import write_part


@dataclass(frozen=True)
class Chunk:
    """``texts`` (and their ``pairs``) of chunk ``index``, whose embeddings go to ``path``; ``names``: with the tokens' names."""

    index: int
    texts: Sequence[Any]
    pairs: Sequence[str] | None
    path: Path
    names: bool


@dataclass(frozen=True)
class Done:
    index: int
    tokens: int


class WorkerDied(RuntimeError):
    """A process of the run ended by itself; perhaps the system took its memory."""


def make_chunk(embedder: Embedder, chunk: Chunk) -> Done:
    """Computes and writes one chunk. Raises TextError, and OSError where it cannot be written."""
    embedded = embedder.embed(chunk.texts, chunk.pairs, names=chunk.names)
    write_part(chunk.path, embedded)
    return Done(chunk.index, embedded.tokens)


def make_chunks(
    model: str, settings: dict[str, Any], chunks: Iterator[Chunk], num_processes: int, threads: int
) -> Iterator[Done | tuple[Chunk, Exception]]:
    """Yields what becomes of each chunk, in the order in which they are finished: Done, or the chunk and its error.

    model, settings: those of ``Embedder.from_pretrained``; threads: of each process. Raises WorkerDied.
    """
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, Any] = {}
    busy: dict[Connection, Chunk] = {}
    try:
        for _ in range(num_processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, model, settings, threads), daemon=True)
            _start(process)
            theirs.close()
            workers[ours] = process
        free = list(workers)
        while True:
            while free and (chunk := next(chunks, None)) is not None:
                connection = free.pop()
                connection.send(chunk)
                busy[connection] = chunk
            if not busy:
                return
            for connection in wait(list(busy)):
                chunk = busy.pop(connection)
                try:
                    result = connection.recv()
                except (EOFError, ConnectionError) as error:
                    workers[connection].join()
                    code = workers[connection].exitcode
                    raise WorkerDied(f"a process of the run ended with code {code}; memory may have been too small") from error
                free.append(connection)
                yield result if isinstance(result, Done) else (chunk, result)
    finally:
        for connection, process in workers.items():
            connection.close()
            if connection in busy:
                process.terminate()
            process.join()


def _start(process: Any) -> None:
    """Ctrl-C, which reaches the whole group, does not reach a process before it ignores it, nor is it lost here."""
    mask = getattr(signal, "pthread_sigmask", None)
    before = mask(signal.SIG_BLOCK, {signal.SIGINT}) if mask else ()
    try:
        process.start()
    finally:
        if mask:
            mask(signal.SIG_SETMASK, before)


def _work(connection: Connection, model: str, settings: dict[str, Any], threads: int) -> None:
    """A process: chunks come in, what became of them goes out, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    torch.set_num_threads(threads)
    transformers.logging.disable_progress_bar()
    keep_freed_memory()
    embedder = Embedder.from_pretrained(model, **settings)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            chunk = connection.recv()
            try:
                result: Done | Exception = make_chunk(embedder, chunk)
            except (TextError, OSError) as error:
                result = error
            connection.send(result)
