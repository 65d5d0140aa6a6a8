"""``fastbert embed``: the options of the command line to settings, the result to a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastbert.features.settings import TOKENS_PER_BATCH, EmbedSettings, check_output, parts_folder
from fastbert.runs.errors import TrainingError

from .app import app
from .command import (
    INTERRUPTED,
    CommandFailure,
    CommandResult,
    DebugOption,
    JsonOption,
    Say,
    SeveralValuesCommand,
    run_command,
)

if TYPE_CHECKING:
    from fastbert.features.run import EmbedResult


@app.command(cls=SeveralValuesCommand)
def embed(
    model: Annotated[str, typer.Option(help="Checkpoint: a folder, or a name on the Hugging Face hub.")],
    input_: Annotated[
        list[str],
        typer.Option(
            "--input",
            help="Texts: .txt (one a line), .tsv, .csv, .jsonl, .json (each also with .gz), .parquet, - for standard input, or a "
            "Hugging Face dataset name; several may follow.",
            metavar="FILE...",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            help="OUT.npy (float32; with --level token also OUT.offsets.npy), OUT.parquet or OUT.jsonl (both with row and text)."
        ),
    ],
    pooling: Annotated[
        str | None,
        typer.Option(
            help="mean or max over all tokens of a text ([CLS] and [SEP] included), cls (the last layer's [CLS]), or last-4 (the "
            "last four layers side by side; with --level sequence their mean).  [default: mean; with --level token the last layer]",
            show_default=False,
        ),
    ] = None,
    level: Annotated[
        str, typer.Option(help="sequence: a row per text; token: a row per token, or per word with --words-column.")
    ] = "sequence",
    normalize: Annotated[bool, typer.Option("--normalize", help="Rows of length 1.")] = False,
    text_column: Annotated[
        str | None, typer.Option(help="Column of the text.  [default: text, or the only one]", show_default=False)
    ] = None,
    text_pair_column: Annotated[
        str | None, typer.Option(help="Column of a second text, read together with the first.", show_default=False)
    ] = None,
    words_column: Annotated[
        str | None,
        typer.Option(
            help="Column of texts in words (lists, or with spaces between); with --level token each word gets the row of its first "
            "piece.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Of Hugging Face datasets.")] = "train",
    max_seq_length: Annotated[
        int | None,
        typer.Option(help="Tokens of a text at most; longer ones are cut.  [default: what the model takes]", show_default=False),
    ] = None,
    tokens_per_batch: Annotated[int, typer.Option(help="Tokens that go through the model together.")] = TOKENS_PER_BATCH,
    num_processes: Annotated[int, typer.Option(help="Processes, each with a model and its share of the threads.")] = 1,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or int8 (CPUs).  [default: float32; int8 where saved so]", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda, cuda:1.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what a run that was stopped left in OUT.parts.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make the output anew; an old one stays until then.")] = False,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Turn texts into embeddings (features of BERT as it is), one file out of as many texts as you have."""
    options = {
        "model": model, "input": tuple(input_), "output": output, "pooling": pooling, "level": level, "normalize": normalize,
        "text_column": text_column, "text_pair_column": text_pair_column, "words_column": words_column, "split": split,
        "max_seq_length": max_seq_length, "tokens_per_batch": tokens_per_batch, "num_processes": num_processes, "dtype": dtype,
        "device": device, "resume": resume, "overwrite": overwrite,
    }  # fmt: skip
    run_command("embed", lambda say: _body(options, say), json_output=json_output, debug=debug)


def _body(options: dict[str, Any], say: Say) -> CommandResult:
    settings = EmbedSettings(**options)
    # Before torch and transformers are imported: a refusal comes at once.
    check_output(settings)
    from fastbert.features.run import embed as run
    from fastbert.runs.memory import keep_freed_memory

    keep_freed_memory()  # this process does nothing else; where it cannot be, it is a little slower
    try:
        result = run(settings, say)
    except TrainingError as error:
        raise CommandFailure(str(error)) from error
    except KeyboardInterrupt as interrupt:
        folder = parts_folder(settings.output)
        left = f"what is finished is in {folder}, and the same command with --resume goes on from there"
        raise CommandFailure(f"interrupted; {left if folder.exists() else 'nothing was written'}", INTERRUPTED) from interrupt
    say(_report(result))
    return CommandResult(result.to_dict())


def _report(result: EmbedResult) -> str:
    pooling = "the last layer" if result.pooling is None else result.pooling
    rows = f"{result.rows:,} rows of {result.dim} ({pooling}{', normalized' if result.normalize else ''}) in {result.files[0]}"
    cut = f", {result.truncated:,} texts cut to {result.max_seq_length} tokens" if result.truncated else ""
    lines = [f"{result.sequences:,} texts, {result.tokens:,} tokens{cut}: {rows}"]
    if result.tokens_per_second is not None:
        lines.append(
            f"{result.tokens_per_second:,.0f} tokens/s, {result.sequences_per_second:,.1f} texts/s in {result.seconds:,.1f} s "
            f"({result.dtype})"
        )
    return "\n".join(lines)
