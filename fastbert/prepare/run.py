"""``fastbert prepare``: text in, a folder of token shards out, which any number of pretraining runs read.

The tokenizer (loaded, or trained on the beginning of the corpus) -> batches of documents -> ids, on all cores -> shards in the
order of the corpus. The same text and settings give the same files whatever the number of processes is and however often the run
was stopped.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from fastbert.data.corpus import CorpusPart, Reading, check_enough, corpus_parts, read_part
from fastbert.data.errors import CorpusError
from fastbert.data.shards import open_shards, tokenizer_fingerprint
from fastbert.data.tokenizer import load_tokenizer, save_tokenizer, train_wordpiece
from fastbert.runs import Say
from fastbert.runs.errors import TrainingError
from fastbert.runs.one_writer import one_writer
from fastbert.runs.torchrun import refuse_several_processes
from fastbert.train.interrupt import stop_on_signals

from .folder import SEEN, PreparedFolder, check_output
from .reader import CorpusReader, check_inputs, inputs, make_reading
from .seen import SeenDocuments
from .settings import DEFAULT_VOCAB_SIZE, PrepareSettings
from .workers import EncodedBatch, WorkerDied, encode_in_order
from .writer import ShardWriter, folder_bytes

# Characters from the corpus's beginning that a vocabulary is trained on: with more of them hardly one of its entries changes, and
# all of them are in memory.
TOKENIZER_CHARACTERS = 200_000_000


class PreparationStopped(TrainingError):
    """The run could not go on; its message says why."""


@dataclass(frozen=True)
class PrepareResult:
    """facts: counts of the whole corpus. bytes: of the folder. new_tokens, seconds, tokens_per_second: of this run alone, from the
    first document to the last file (the tokenizer is there before). notes: what whoever trains on it should know.
    """

    output: str
    facts: dict[str, Any]
    shards: int
    bytes: int
    fingerprint: str
    tokenizer_fingerprint: str
    workers: int
    new_tokens: int
    seconds: float
    tokens_per_second: float
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, the facts beside the others."""
        values = asdict(self)
        return {"output": values.pop("output"), **values.pop("facts"), **values}


@one_writer
def prepare(settings: PrepareSettings, say: Say = print) -> PrepareResult:
    """Prepares a corpus, or with ``settings.resume`` goes on with one.

    Raises SettingsError for what cannot work, before anything is written; CorpusError for text that cannot be used and
    TokenizerError for a tokenizer, naming the file; :class:`PreparationStopped` where a file cannot be written; KeyboardInterrupt
    on SIGINT and SIGTERM. Shards that are finished stay.
    """
    refuse_several_processes(settings.command_name)
    check_output(settings)
    with stop_on_signals():
        parts = list(corpus_parts(settings.corpus))
        found = inputs(parts)
        try:
            if settings.resume:
                folder = PreparedFolder.resume(settings)
                check_inputs(found, folder.inputs())
                say(f"Resuming {settings.output} behind {folder.num_shards:,} shards, {folder.facts['tokens']:,} tokens")
            else:
                # Where one of them is not there, nothing is deleted or begun.
                _check_beginnings(settings, parts)
                if settings.tokenizer is not None:
                    load_tokenizer(settings.tokenizer)
                folder = PreparedFolder.begin(settings, found)
            tokenizer = _tokenizer(settings, parts, folder, say)
            start, tokens_before = time.perf_counter(), folder.facts["tokens"]
            workers = settings.workers or _cores()
            _make_shards(settings, parts, folder, tokenizer, workers)
        except (sqlite3.Error, OSError) as error:
            raise PreparationStopped(f"{settings.output} cannot be written ({error})") from error
        except WorkerDied as error:
            raise PreparationStopped(str(error)) from error
        shards = open_shards(folder.path)
    seconds, new_tokens = time.perf_counter() - start, shards.facts["tokens"] - tokens_before
    return PrepareResult(
        output=settings.output,
        facts=shards.facts,
        shards=folder.num_shards,
        bytes=folder_bytes(folder.path),
        fingerprint=shards.fingerprint,
        tokenizer_fingerprint=shards.tokenizer_fingerprint,
        workers=workers,
        new_tokens=new_tokens,
        seconds=seconds,
        tokens_per_second=new_tokens / seconds,
        notes=_notes(settings, shards.facts),
    )


def _check_beginnings(settings: PrepareSettings, parts: Sequence[CorpusPart]) -> None:
    """Reads the beginning of each Hugging Face dataset (a mistyped file name may look like the name of one) and of each Parquet
    file (whose column may be another, and which nothing reads without pyarrow). Raises CorpusError."""
    for part in parts:
        if part.dataset is not None or (part.path is not None and part.path.suffix == ".parquet"):
            next(read_part(part, Reading(settings.text_column, 1, skip_bad_text=True)), None)


def _cores() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _make_shards(
    settings: PrepareSettings, parts: Sequence[CorpusPart], folder: PreparedFolder, tokenizer: PreTrainedTokenizerFast, workers: int
) -> None:
    position = folder.position
    seen = None if settings.keep_duplicates else SeenDocuments(folder.path / SEEN, position.batch)
    reader = CorpusReader(parts, settings, seen, position)
    writer = ShardWriter(folder)

    def write_shards() -> None:
        if seen is not None:
            seen.commit()  # first: what a shard holds must be known as seen, and the rest is forgotten by a run that goes on
        writer.write(position)

    try:
        encoded = encode_in_order(reader.batches(), tokenizer.backend_tokenizer.to_str(), len(tokenizer), workers)
        for batch, train, held_out in _shown(encoded, len(parts)):
            writer.add(train, held_out)
            position = batch.end
            if writer.tokens >= settings.tokens_per_shard:
                write_shards()
        if writer.tokens or position != folder.position:
            write_shards()
    finally:
        if seen is not None:
            seen.close()
    counted = reader.position.left_out
    facts = {**folder.facts, "empty": folder.facts["empty"] + counted["empty"]}
    check_enough(facts["documents"], settings.corpus, duplicates=counted["duplicates"])
    if facts["train_documents"] < 2:
        raise CorpusError(
            f"{facts['held_out_documents']:,} of {facts['documents']:,} documents were held out (--held-out-fraction "
            f"{settings.held_out_fraction}), which leaves fewer than two to train on: a smaller fraction, with --overwrite"
        )
    others = {name: count for name, count in counted.items() if name != "empty"}
    folder.finish({**facts, **others, "vocab_size": len(tokenizer), "sources": reader.position.sources})


def _shown(encoded: Iterator[EncodedBatch], parts: int) -> Iterator[EncodedBatch]:
    """A bar of documents with the rate of tokens, only where somebody watches: a log file wants none."""
    documents = tokens = 0
    start = time.perf_counter()
    with tqdm(desc="prepare", unit="document", disable=None) as bar:
        for item in encoded:
            yield item
            documents += sum(len(part.document_lengths) for part in item[1:])
            tokens += sum(len(part.ids) for part in item[1:])
            where = f", file {item[0].end.part + 1:,} of {parts:,}" if parts > 1 else ""
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):,.0f} tokens/s{where}", refresh=False)
            bar.update(documents - bar.n)


def _tokenizer(settings: PrepareSettings, parts: Sequence[CorpusPart], folder: PreparedFolder, say: Say) -> PreTrainedTokenizerFast:
    """The one that the folder has already, or the one that is asked for, saved there."""
    made = folder.manifest["tokenizer"]
    if made is not None:
        tokenizer = load_tokenizer(folder.path)
    elif settings.tokenizer is not None:
        tokenizer = load_tokenizer(settings.tokenizer)
    else:
        tokenizer = _train_tokenizer(settings, parts, say)
    found = {
        "name": settings.tokenizer or "trained on its beginning",
        "vocab_size": len(tokenizer),
        "fingerprint": tokenizer_fingerprint(tokenizer),
    }
    if made is None:
        save_tokenizer(tokenizer, folder.path)
        folder.manifest["tokenizer"] = found
        folder.write()
    elif made != found:
        raise PreparationStopped(f"the tokenizer in {folder.path} was changed since the run began; --overwrite begins anew")
    return tokenizer


def _train_tokenizer(settings: PrepareSettings, parts: Sequence[CorpusPart], say: Say) -> PreTrainedTokenizerFast:
    vocab_size = settings.vocab_size or DEFAULT_VOCAB_SIZE
    texts: list[str] = []
    characters = 0
    for paragraph in _paragraphs(settings, parts):
        texts.append(paragraph)
        characters += len(paragraph)
        if characters >= TOKENIZER_CHARACTERS:
            break
    say(
        f"Training a WordPiece vocabulary of at most {vocab_size:,} entries on {characters / 1e6:,.1f} M characters "
        f"({'the beginning of the corpus' if characters >= TOKENIZER_CHARACTERS else 'the whole corpus'}) ..."
    )
    return train_wordpiece(texts, vocab_size)


def _paragraphs(settings: PrepareSettings, parts: Sequence[CorpusPart]) -> Iterator[str]:
    for part in parts:
        for document in read_part(part, make_reading(settings)):
            yield from document.paragraphs


def _notes(settings: PrepareSettings, facts: dict[str, Any]) -> list[str]:
    if facts["held_out_documents"] >= 2:
        return []
    return [
        f"only {facts['held_out_documents']} of {facts['documents']:,} documents were held out (--held-out-fraction "
        f"{settings.held_out_fraction}), too few for fastbert pretrain, which scores every run on them: a larger fraction, with "
        "--overwrite"
    ]
