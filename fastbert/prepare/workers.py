"""Batches encoded by several processes, in the order of the batches, while this process reads on.

A process gets a batch when it is free. Processes talk through one pipe each: when this process is gone, even killed, its workers
find theirs closed and end. What is read ahead and what waits for an earlier batch is bounded, and so is memory.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from fastbert.data.encoding import SentenceEncoder

from .encode import Encoded, encode_documents
from .reader import Batch

_BATCHES_PER_WORKER = 3

EncodedBatch = tuple[Batch, Encoded, Encoded]


class WorkerDied(RuntimeError):
    """A process ended by itself; perhaps the system took its memory."""


def encode_in_order(batches: Iterator[Batch], tokenizer_json: str, vocab_size: int, workers: int) -> Iterator[EncodedBatch]:
    """Yields each batch with its training and its held-out documents encoded. With one worker it is this process.

    tokenizer_json, vocab_size: those of :meth:`SentenceEncoder.from_json`. Raises WorkerDied, and what reading raises.
    """
    if workers == 1:
        encoder = SentenceEncoder.from_json(tokenizer_json, vocab_size)
        for batch in batches:
            yield batch, encode_documents(encoder, batch.train), encode_documents(encoder, batch.held_out)
        return
    processes: dict[Connection, Any] = {}
    try:
        context = multiprocessing.get_context("spawn")  # a fork would copy this process's threads in whatever state they are
        for _ in range(workers):
            ours, theirs = context.Pipe()
            # No tokenizer among its arguments: of more than a pipe holds, start() would wait for a process that may have died.
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            processes[ours] = process
        try:
            for connection in processes:
                connection.send((tokenizer_json, vocab_size))
            yield from _follow(batches, list(processes))
        except (EOFError, ConnectionError) as error:
            raise WorkerDied("a process that encodes ended by itself; perhaps the system has no more memory") from error
    finally:
        for connection, process in processes.items():
            connection.close()
            process.terminate()
        for process in processes.values():
            process.join()


def _follow(batches: Iterator[Batch], idle: list[Connection]) -> Iterator[EncodedBatch]:
    most_ahead, most_open = len(idle), _BATCHES_PER_WORKER * len(idle)
    read: deque[Batch] = deque()
    busy: dict[Connection, tuple[int, Batch]] = {}
    done: dict[int, EncodedBatch] = {}
    sent = yielded = 0
    is_read = False
    while True:
        while idle and sent - yielded < most_open and (read or not is_read):
            batch = read.popleft() if read else next(batches, None)
            if batch is None:
                is_read = True
                break
            connection = idle.pop()
            connection.send((batch.train, batch.held_out))
            busy[connection] = (sent, batch)
            sent += 1
        while yielded in done:
            yield done.pop(yielded)
            yielded += 1
        if not busy:
            if is_read and not read:
                return
            continue
        reads_on = not is_read and len(read) < most_ahead
        finished = wait(list(busy), timeout=0 if reads_on else None)
        for connection in finished:
            number, batch = busy.pop(connection)
            done[number] = (batch, *connection.recv())
            idle.append(connection)
        if reads_on and not finished:
            batch = next(batches, None)
            if batch is None:
                is_read = True
            else:
                read.append(batch)


def _work(connection: Connection) -> None:
    """A process: the tokenizer comes in, then documents, and their ids go out, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the parent ends this one
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have processes of their own
    with contextlib.suppress(EOFError, ConnectionError):
        encoder = SentenceEncoder.from_json(*connection.recv())
        while True:
            parts = connection.recv()
            connection.send(tuple(encode_documents(encoder, documents) for documents in parts))
