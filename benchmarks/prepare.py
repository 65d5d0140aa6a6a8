"""fastbert prepare beside the tokenizers library alone, and beside what transformers' run_mlm.py does with the datasets library.

    python -m benchmarks.prepare --data FOLDER [--rounds 3] [--parts speed memory format seen] [--save FOLDER]

--data holds the folders pretrain/wikipedia and pretrain/books (text, a paragraph a line) and vocab/bert-base-uncased.

speed   "tokenizers" is ``encode_batch`` on the corpus's sentences, which are in memory and split already, on all cores: the floor.
        "prepare" is the whole command in a process of its own, from its start to its end: Python, imports, reading, duplicates,
        sentences, ids, files. "prepare, work" is that without the start: the seconds that the command reports. "datasets" is a
        process, too: load_dataset of the text, ``map`` with the tokenizer and then with the grouping into blocks of 512, both on
        all cores. They take turns. Below, what the steps of prepare take one after the other on one core.
memory  the peak of the command's process and of its largest worker, for the corpus, 4 and 16 times of it, each time with its
        letters moved on in the alphabet, so that no document is a duplicate and most words are new.
format  shards as they are, and the same documents as nested lists in Arrow files of the datasets library: writing, bytes, and the
        ids of 1,000 random documents, read by a new process.
seen    digests of documents that the database of duplicates takes a second.

The last line of stdout is one JSON document; --save keeps it in benchmarks/results/FOLDER.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fastbert.data.corpus import corpus_parts, read_documents
from fastbert.data.encoding import SentenceEncoder
from fastbert.data.sentences import split_sentences
from fastbert.data.shards import open_shards, write_shard
from fastbert.data.tokenizer import load_tokenizer
from fastbert.prepare.encode import encode_documents
from fastbert.prepare.reader import CorpusReader, Position
from fastbert.prepare.seen import SeenDocuments
from fastbert.prepare.settings import PrepareSettings

from .harness import interleaved, paired_ratio, summary, write_results
from .machine import installed, machine

PARTS = ("speed", "memory", "format", "seen")
SENTENCES_AT_ONCE = 10_000
COPIES = (1, 4, 16)
RANDOM_DOCUMENTS = 1000

RUN_MLM = """
import sys
from transformers import AutoTokenizer
from benchmarks.run_mlm import grouped_blocks

vocabulary, cache, cores, *files = sys.argv[1:]
grouped_blocks(AutoTokenizer.from_pretrained(vocabulary), files, cache=cache, cores=int(cores), block=512)
"""

READ_SHARDS = """
import sys, time
import numpy as np
from fastbert.data.shards import open_shards
from fastbert.data.tokens import TokenizedCorpus
start = time.perf_counter()
shards = open_shards(sys.argv[1])
ends = np.cumsum([shard.documents for shard in shards.shards])
tokens = 0
for document in np.random.default_rng(0).integers(0, ends[-1], int(sys.argv[2])):
    index = int(np.searchsorted(ends, document, side="right"))
    corpus = shards[index]
    first, last = corpus.sentence_offsets[corpus.document_offsets[document - (ends[index - 1] if index else 0) :][:2]]
    tokens += len(np.array(corpus.ids[first:last]))
print(time.perf_counter() - start, tokens)
"""

READ_ARROW = """
import sys, time
import datasets
import numpy as np
start = time.perf_counter()
column = datasets.load_from_disk(sys.argv[1]).data.column("sentences")
tokens = 0
for document in np.random.default_rng(0).integers(0, len(column), int(sys.argv[2])):
    tokens += len(np.array(column[int(document)].values.flatten()))
print(time.perf_counter() - start, tokens)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--digests", type=int, default=1_000_000)
    parser.add_argument("--save", metavar="FOLDER")
    given = parser.parse_args()

    corpus = [str(given.data / "pretrain" / name) for name in ("wikipedia", "books")]
    vocabulary = str(given.data / "vocab" / "bert-base-uncased")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for part in given.parts:
            measure: Callable[[], dict[str, Any]] = {
                "speed": lambda: speed(corpus, vocabulary, work, given.rounds),
                "memory": lambda: memory(corpus, vocabulary, work),
                "format": lambda: formats(corpus, vocabulary, work, given.rounds),
                "seen": lambda: seen(work, given.digests),
            }[part]
            results[part] = measure()
    versions = {name: installed(name) for name in ("tokenizers", "datasets", "pyarrow", "safetensors")}
    load = os.getloadavg()
    write_results("prepare", {"machine": machine(), "versions": versions, "load_average": load, "results": results}, given.save)


def cores() -> int:
    return len(os.sched_getaffinity(0))


def prepare(corpus: list[str], vocabulary: str, output: Path) -> dict[str, Any]:
    """What the command prints as JSON, with the peaks of memory of its process and of its largest worker."""
    options = ["--corpus", *corpus, "--tokenizer", vocabulary, "--output", str(output), "--overwrite", "--json"]
    command = [sys.executable, "-m", "fastbert.cli", "prepare", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        peaks: dict[int, int] = {}
        while process.poll() is None:
            for number in [process.pid, *children(process.pid)]:
                peaks[number] = max(peaks.get(number, 0), peak_bytes(number))
            time.sleep(0.05)
        document = json.loads(process.stdout.read())
    own = peaks.pop(process.pid)
    return {**document, "peak_bytes": own, "worker_peak_bytes": max(peaks.values())}


def children(process: int) -> list[int]:
    try:
        return list(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))
    except OSError:  # it has ended
        return []


def peak_bytes(process: int) -> int:
    """VmHWM, and not getrusage's maximum, which a child begins with its parent's memory."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def speed(corpus: list[str], vocabulary: str, work: Path, rounds: int) -> dict[str, Any]:
    sentences = [
        sentence
        for document in read_documents(corpus)
        for paragraph in document.paragraphs
        for sentence in split_sentences(paragraph)
    ]
    tokenizer = Tokenizer.from_file(f"{vocabulary}/tokenizer.json")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    files = [str(part) for part in corpus_parts(corpus)]
    reported: list[float] = []

    def floor() -> None:
        for start in range(0, len(sentences), SENTENCES_AT_ONCE):
            for encoding in tokenizer.encode_batch(sentences[start : start + SENTENCES_AT_ONCE], add_special_tokens=False):
                encoding.ids  # noqa: B018 (what whoever encodes takes out)

    def ours() -> None:
        reported.append(prepare(corpus, vocabulary, work / "speed")["seconds"])

    def theirs() -> None:
        with tempfile.TemporaryDirectory(dir=work) as cache:
            command = [sys.executable, "-c", RUN_MLM, vocabulary, cache, str(cores()), *files]
            environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
            subprocess.run(command, capture_output=True, check=True, env=environment)

    contenders = {"tokenizers": floor, "prepare": ours, "datasets": theirs}
    seconds = interleaved(contenders, rounds, uncounted_rounds=0)
    seconds["prepare, work"] = reported
    facts = open_shards(work / "speed").facts
    figures = {}
    for name, taken in seconds.items():
        figures[name] = {
            **summary(taken),
            "tokens_per_second": facts["tokens"] / float(np.median(taken)),
            "of_tokenizers": paired_ratio(taken, seconds["tokenizers"]),
        }
        ratio = figures[name]["of_tokenizers"]["median"]
        print(f"{name:<16}{figures[name]['median_s']:>8.1f} s{figures[name]['tokens_per_second']:>12,.0f} tokens/s{ratio:>7.2f}x")
    counts = {name: facts[name] for name in ("documents", "sentences", "words", "characters", "tokens")}
    return {**counts, "cores": cores(), "contenders": figures, "steps_s": steps(corpus, vocabulary, work)}


def steps(corpus: list[str], vocabulary: str, work: Path) -> dict[str, float]:
    """Seconds of CPU of each step, one after the other in this process."""
    tokenizer = load_tokenizer(vocabulary)
    settings = PrepareSettings(corpus=tuple(corpus), output="", keep_duplicates=True)
    found, marks = {}, [time.process_time()]

    def mark(name: str) -> None:
        marks.append(time.process_time())
        found[name] = marks[-1] - marks[-2]

    batches = list(CorpusReader(list(corpus_parts(corpus)), settings, None, Position.start()).batches())
    mark("read and digest")
    documents = [document for batch in batches for document in batch.train + batch.held_out]
    for document in documents:
        for paragraph in document:
            split_sentences(paragraph)
    mark("split into sentences")
    encoder = SentenceEncoder(tokenizer)
    encoded = [encode_documents(encoder, batch.train + batch.held_out) for batch in batches]
    mark("split and encode")
    found["encode"] = found.pop("split and encode") - found["split into sentences"]
    arrays = [np.concatenate([getattr(part, name) for part in encoded]) for name in ("ids", "sentence_lengths", "document_lengths")]
    write_shard(work, "steps.safetensors", *arrays)
    mark("write")
    for name, taken in found.items():
        print(f"  {name:<22}{taken:>6.2f} s on one core")
    return found


def memory(corpus: list[str], vocabulary: str, work: Path) -> dict[str, Any]:
    copies = work / "copies"
    copies.mkdir()
    texts = [gzip.decompress(part.path.read_bytes()).decode() for part in corpus_parts(corpus)]
    for number in range(max(COPIES)):
        table = str.maketrans(ascii_lowercase, ascii_lowercase[number:] + ascii_lowercase[:number])
        for index, text in enumerate(texts):
            (copies / f"{number:02d}-{index:03d}.txt").write_text(text.translate(table), encoding="utf-8")
    del texts
    found = {}
    for count in COPIES:
        name, sources = str(count), [str(path) for path in sorted(copies.iterdir()) if int(path.name[:2]) < count]
        result = prepare(sources, vocabulary, work / "memory")
        kept = ("documents", "tokens", "duplicates", "workers", "seconds", "tokens_per_second", "peak_bytes", "worker_peak_bytes")
        found[name] = {key: result[key] for key in kept}
        print(
            f"{name} x the corpus: {result['tokens']:,} tokens, {result['tokens_per_second']:,.0f} tokens/s; peak "
            f"{result['peak_bytes'] / 1e6:,.0f} MB, of a worker {result['worker_peak_bytes'] / 1e6:,.0f} MB"
        )
    return found


def formats(corpus: list[str], vocabulary: str, work: Path, rounds: int) -> dict[str, Any]:
    import datasets
    import pyarrow

    folder, arrow = work / "shards", work / "arrow"
    prepare(corpus, vocabulary, folder)
    parts = [
        (part.ids, np.diff(part.sentence_offsets), np.diff(part.document_offsets), part.sentence_offsets, part.document_offsets)
        for part in open_shards(folder)
    ]

    def write_shards() -> None:
        for number, part in enumerate(parts):
            write_shard(folder, f"again-{number}.safetensors", np.array(part[0]), part[1], part[2])

    def write_arrow() -> None:
        lists = []
        for ids, _, _, sentence_offsets, document_offsets in parts:
            sentences = pyarrow.ListArray.from_arrays(sentence_offsets.astype(np.int32), np.array(ids))
            lists.append(pyarrow.ListArray.from_arrays(document_offsets.astype(np.int32), sentences))
        table = pyarrow.table({"sentences": pyarrow.chunked_array(lists)})
        datasets.disable_progress_bars()
        datasets.Dataset(table).save_to_disk(str(arrow))
        for path in arrow.glob("*.arrow"):  # on the disk, as a shard is
            with path.open("rb+") as file:
                os.fsync(file.fileno())

    seconds = interleaved({"shards": write_shards, "arrow": write_arrow}, max(3, rounds))
    found: dict[str, Any] = {}
    for name, reader, place, pattern in (
        ("shards", READ_SHARDS, folder, "again-*.safetensors"),
        ("arrow", READ_ARROW, arrow, "*.arrow"),
    ):
        read = []
        for _ in range(max(3, rounds)):
            command = [sys.executable, "-c", reader, str(place), str(RANDOM_DOCUMENTS)]
            read.append(list(map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())))
        found[name] = {
            "write": summary(seconds[name]),
            "bytes": sum(path.stat().st_size for path in place.glob(pattern)),
            "read_s": float(np.median([row[0] for row in read])),
            "read_tokens": int(read[0][1]),
        }
        print(
            f"{name:<8}write {found[name]['write']['median_s']:.2f} s, {found[name]['bytes'] / 1e6:.1f} MB, "
            f"{RANDOM_DOCUMENTS:,} random documents in {found[name]['read_s']:.3f} s"
        )
    if found["shards"]["read_tokens"] != found["arrow"]["read_tokens"]:
        raise SystemExit("the two formats gave different documents")
    return {"documents": RANDOM_DOCUMENTS, "of": sum(len(part[2]) for part in parts), **found}


def seen(work: Path, digests: int) -> dict[str, float]:
    database = SeenDocuments(work / "seen.sqlite", 0)
    draw = np.random.default_rng(0)
    start = time.perf_counter()
    for number in range(digests // 1000):
        block = draw.bytes(16 * 1000)
        for place in range(0, len(block), 16):
            database.add(block[place : place + 16], number)
        if number % 25 == 24:  # as many as a shard of Wikipedia has
            database.commit()
    database.commit()
    taken = time.perf_counter() - start
    database.close()
    print(f"{digests:,} digests in {taken:.1f} s, {(work / 'seen.sqlite').stat().st_size / digests:.1f} bytes each on disk")
    return {"digests": digests, "seconds": taken, "bytes": (work / "seen.sqlite").stat().st_size}


if __name__ == "__main__":
    main()
