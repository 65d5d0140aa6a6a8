"""``fastbert predict``: a fine-tuned folder on lines of text or a file."""

from __future__ import annotations

import contextlib
import csv
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fastbert.runs.errors import SettingsError
from fastbert.runs.folder import check_place
from fastbert.runs.one_writer import writing_to
from fastbert.runs.whole_file import whole_file

from .app import app
from .command import CommandResult, DebugOption, JsonOption, Say, prints_unicode, run_command

_FORMATS = (".jsonl", ".csv")


@app.command()
def predict(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts, in place of --input.", show_default=False)] = None,
    model: Annotated[str, typer.Option(help="A folder that fastbert finetune wrote.")] = "runs/finetune",
    input_file: Annotated[
        str | None,
        typer.Option("--input", help="A file like those of training, .txt with a text in each line, or - for lines on stdin."),
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Of the text, or of the words.  [default: as in training]", show_default=False)
    ] = None,
    text_pair_column: Annotated[
        str | None, typer.Option(help="Of the second text of a pair.  [default: as in training]", show_default=False)
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="A .jsonl or .csv file.  [default: JSON lines on stdout]", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or int8.  [default: float32, or the int8 that it was saved in]", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda, cuda:1.")] = "auto",
    max_seq_length: Annotated[
        int | None, typer.Option(min=8, help="Tokens of a sequence at most.  [default: as in training]", show_default=False)
    ] = None,
    tokens_per_batch: Annotated[int, typer.Option(min=1, help="Tokens that are computed at once.")] = 4096,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file.")] = False,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Predict with a fine-tuned model: labels with probabilities, entities as spans, tags, answers."""

    def body(say: Say) -> CommandResult:
        if bool(texts) == (input_file is not None):
            raise SettingsError("give either texts or --input FILE")
        for option, column in (("--text-column", text_column), ("--text-pair-column", text_pair_column)):
            if column is not None and input_file in (None, "-"):
                raise SettingsError(f"{option} {column} is for a file with columns: give --input FILE, or leave {option} out")
        if not model:
            raise SettingsError("--model is empty: give a value, or leave the option out")
        if output is None and sys.stdout is None:
            raise SettingsError("standard output is closed: give --output FILE")
        target = None if output is None else check_output(Path(output), overwrite)
        if target is not None and input_file is not None and target.resolve() == Path(input_file).resolve():
            raise SettingsError(f"--output {output} is the input; give another name")
        for number, text in enumerate(texts or (), 1):
            if any("\ud800" <= character <= "\udfff" for character in text):  # what Python makes of bytes that are no UTF-8
                raise SettingsError(f"text {number} is not UTF-8")
        if input_file not in (None, "-") and not Path(input_file).is_file():
            found = "a folder, expected a file" if Path(input_file).is_dir() else "no such file"
            raise SettingsError(f"--input {input_file}: {found}")
        from fastbert.data.tables import read_stdin
        from fastbert.tasks.predictor import Predictor

        predictor = Predictor.from_pretrained(
            model, dtype=dtype, device=device, max_seq_length=max_seq_length, tokens_per_batch=tokens_per_batch
        )
        if input_file is None or input_file == "-":
            lines = texts or [row["text"] for row in read_stdin().rows]
            examples = predictor.task.examples_from(lines)
        else:
            examples = predictor.read(input_file, text_column=text_column, text_pair_column=text_pair_column)
        predictions = predictor.predict(
            examples, progress="predict" if sys.stderr.isatty() else None, say=lambda line: print(line, file=sys.stderr)
        )
        rows = examples.with_places(predictions)
        document: dict[str, Any] = {"model": model, "task": predictor.task.name, "predictions": len(rows)}
        if target is None:
            for row in rows:
                say(json.dumps(row, ensure_ascii=not prints_unicode()))
            document["results"] = rows
        else:
            write_predictions(target, rows)
            document["output"] = str(target)
            say(f"{len(rows):,} predictions: {target}")
        return CommandResult(document)

    def alone(say: Say) -> CommandResult:
        with contextlib.nullcontext() if output is None else writing_to(output):
            return body(say)

    run_command("predict", alone, json_output=json_output, debug=debug)


def check_output(path: Path, overwrite: bool) -> Path:
    """Raises SettingsError or PermissionError, before any work, for a file that must not or cannot be written."""
    if path.suffix not in _FORMATS:
        raise SettingsError(f"--output {path}: the name must end in {' or '.join(_FORMATS)}")
    if path.is_dir():
        raise SettingsError(f"--output {path} is a folder; give the name of a file")
    if path.exists() and not overwrite:
        raise SettingsError(f"--output {path} is there already; --overwrite replaces it")
    check_place(path)
    return path


def write_predictions(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines, or CSV, whose cells are JSON where a value is a list or an object. Whole, or not at all: raises OSError naming
    ``path`` where the disk is full."""
    try:
        with whole_file(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
            if path.suffix == ".jsonl":
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            else:
                writer = csv.DictWriter(file, list(rows[0]) if rows else ["input"])
                writer.writeheader()
                for row in rows:
                    writer.writerow({key: _cell(value) for key, value in row.items()})
    except OSError as error:
        raise OSError(f"--output {path} cannot be written: {error.strerror or error}") from error


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value
