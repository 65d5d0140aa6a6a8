"""``fastbert embed``: texts and a checkpoint in, one file of embeddings out, chunk by chunk.

read and check all texts -> load the model -> for each chunk: tokenize, sort, pack, compute, write a part -> the file, put together
from the parts. Memory holds the texts and one chunk per process; a run that was stopped goes on from the parts that it left.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from fastbert.runs import Say
from fastbert.runs.errors import TrainingError
from fastbert.runs.one_writer import one_writer
from fastbert.runs.torchrun import refuse_several_processes

from .embedder import Embedder, TextError
from .files import check_format, has_offsets, write_output
from .parts import Parts
from .sentence_transformers_settings import checkpoint_hint
from .settings import EmbedSettings, check_output, offsets_of
from .texts import Texts, read_texts
from .workers import Chunk, Done, WorkerDied, make_chunk, make_chunks

Outcomes = Generator[Done | tuple[Chunk, Exception], None, None]
_FORMAT = 2


class EmbeddingStopped(TrainingError):
    """The run could not go on; its message says why and what is finished."""


@dataclass(frozen=True)
class EmbedResult:
    """files: that were written. sequences, tokens (special ones included), truncated: of all texts. rows, dim: of the output.

    seconds, tokens_per_second, sequences_per_second: of the chunks that this run has made itself (None where there were none), with
    tokenizing and writing them, without loading the model. chunks, resumed_chunks: all, and those that were there already.
    """

    model: str
    files: list[str]
    sequences: int
    tokens: int
    truncated: int
    rows: int
    dim: int
    pooling: str | None
    level: str
    normalize: bool
    dtype: str
    max_seq_length: int
    tokens_per_batch: int
    processes: int
    threads: int
    chunks: int
    resumed_chunks: int
    seconds: float
    tokens_per_second: float | None
    sequences_per_second: float | None
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@one_writer
def embed(settings: EmbedSettings, say: Say) -> EmbedResult:
    """Makes the output of ``settings``.

    Raises SettingsError for what cannot work, DataError for texts that cannot be embedded, both before any embedding is computed
    but for a text that turns out bad then, and :class:`EmbeddingStopped` where computing or writing failed.
    """
    refuse_several_processes("embed")
    check_output(settings)
    check_format(settings.output)
    texts = read_texts(
        settings.input,
        text_column=settings.text_column,
        text_pair_column=settings.text_pair_column,
        words_column=settings.words_column,
        split=settings.split,
    )
    embedder = Embedder.from_pretrained(settings.model, **settings.embedder_settings())
    for note in embedder.notes:
        say(f"Not at full speed: {note}")
    notes = list(embedder.notes)
    if (hint := checkpoint_hint(settings.model, embedder)) is not None:
        say(hint)
        notes.append(hint)
    try:
        embedder.check_texts(texts.texts, texts.pairs)
    except TextError as error:
        raise texts.error(error.index, f"the text {error.problem}") from error
    bounds = embedder.chunk_bounds(texts.texts, texts.pairs)
    manifest = {
        "format": _FORMAT,
        "settings": settings.deciding(),
        "model": embedder.fingerprint(),
        "device": embedder.device.type,
        "input": texts.fingerprint(),
        "chunks": bounds,
    }
    parts = Parts(settings.output, manifest, len(bounds) - 1)
    try:
        missing = parts.open(resume=settings.resume)
    except OSError as error:
        with contextlib.suppress(OSError):  # of files
            parts.folder.rmdir()
        raise OSError(f"{parts.folder} cannot be written: {error.strerror or error}") from error
    if settings.resume:
        say(f"{parts.count - len(missing)} of {parts.count} chunks are there already")
    processes = max(1, min(settings.num_processes, len(missing)))
    threads = max(1, torch.get_num_threads() // processes)
    say(f"{len(texts):,} texts; {processes} process{'es' if processes > 1 else ''} with {threads} thread{'s' * (threads > 1)}")

    by_token = settings.level == "token"
    named = by_token and settings.output.suffix.lower() != ".npy"
    chunks = (_chunk(texts, bounds, index, parts, named) for index in missing)
    start = time.perf_counter()
    dim, dtype, longest = embedder.dim, embedder.dtype, embedder.max_seq_length
    if processes > 1:
        del embedder  # the workers have models of their own
        results = make_chunks(settings.model, settings.embedder_settings(), chunks, processes, threads)
    else:
        results = _in_this_process(embedder, chunks)
    new_tokens = _follow(results, texts, bounds, missing, parts)
    seconds = time.perf_counter() - start

    try:
        outdated = has_offsets(settings.output) and not by_token
        write_output(settings.files, parts, bounds, texts, dim=dim, by_token=by_token)
        if outdated:
            offsets_of(settings.output).unlink()
        totals = [parts.totals(index) for index in range(parts.count)]
        parts.delete()
    except OSError as error:
        raise _stopped(f"{settings.output} cannot be written ({error})", parts) from error
    new_texts = sum(bounds[index + 1] - bounds[index] for index in missing)
    return EmbedResult(
        model=settings.model,
        files=[str(path) for path in settings.files],
        sequences=len(texts),
        tokens=sum(total.tokens for total in totals),
        truncated=sum(total.truncated for total in totals),
        rows=sum(total.rows for total in totals),
        dim=dim,
        pooling=settings.pooling,
        level=settings.level,
        normalize=settings.normalize,
        dtype=dtype,
        max_seq_length=longest,
        tokens_per_batch=settings.tokens_per_batch,
        processes=processes,
        threads=threads,
        chunks=parts.count,
        resumed_chunks=parts.count - len(missing),
        seconds=seconds,
        tokens_per_second=new_tokens / seconds if missing else None,
        sequences_per_second=new_texts / seconds if missing else None,
        notes=notes,
    )


def _chunk(texts: Texts, bounds: list[int], index: int, parts: Parts, names: bool) -> Chunk:
    piece = slice(bounds[index], bounds[index + 1])
    pairs = None if texts.pairs is None else texts.pairs[piece]
    return Chunk(index, texts.texts[piece], pairs, parts.path(index), names)


def _in_this_process(embedder: Embedder, chunks: Iterator[Chunk]) -> Outcomes:
    for chunk in chunks:
        try:
            yield make_chunk(embedder, chunk)
        except (TextError, OSError) as error:
            yield chunk, error


def _follow(results: Outcomes, texts: Texts, bounds: list[int], missing: list[int], parts: Parts) -> int:
    """Shows the progress of the run, and returns its tokens."""
    tokens = 0
    total = sum(bounds[index + 1] - bounds[index] for index in missing)
    start = time.perf_counter()
    # Only where somebody watches: a log file wants no bar.
    with closing(results), tqdm(total=total, unit="text", disable=None, smoothing=0.1) as bar:
        try:
            for result in results:
                if not isinstance(result, Done):
                    chunk, error = result
                    if isinstance(error, TextError):
                        raise texts.error(bounds[chunk.index] + error.index, f"the text {error.problem}")
                    raise _stopped(f"a chunk cannot be written ({error})", parts) from error
                tokens += result.tokens
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):,.0f} tokens/s", refresh=False)
                bar.update(bounds[result.index + 1] - bounds[result.index])
        except WorkerDied as error:
            raise _stopped(str(error), parts) from error
    return tokens


def _stopped(problem: str, parts: Parts) -> EmbeddingStopped:
    return EmbeddingStopped(f"{problem}; {parts.progress()}")
