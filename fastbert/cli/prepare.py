"""``fastbert prepare``: the options of the command line to settings, the result to a report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastbert.prepare.settings import DEFAULT_VOCAB_SIZE, PrepareSettings
from fastbert.runs.errors import SettingsError, TrainingError

from .app import app
from .command import (
    INTERRUPTED,
    CommandFailure,
    CommandResult,
    DebugOption,
    JsonOption,
    Say,
    SeveralValuesCommand,
    given_options,
    run_command,
)

if TYPE_CHECKING:
    from fastbert.prepare.run import PrepareResult

S = PrepareSettings


@app.command(cls=SeveralValuesCommand)
def prepare(
    ctx: typer.Context,
    output: Annotated[str, typer.Option(help="Folder of the shards; pretrain --corpus takes it.")],
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            help="Files (.txt, .txt.gz, .jsonl, .jsonl.gz, .parquet), folders of them, or Hugging Face dataset names (wikipedia, "
            "bookcorpus, NAME:CONFIG), which are streamed; several may follow.",
            metavar="PATH...",
            show_default=False,
        ),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column of the text in JSONL, Parquet and datasets.")] = S.text_column,
    rows_per_document: Annotated[
        int | None,
        typer.Option(
            help="Consecutive rows of JSONL, Parquet and datasets that make a document.  [default: 1; 1000 of bookcorpus, whose "
            "rows are sentences]",
            show_default=False,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer folder or Hub name. Left out: trained on the corpus's first 200 MB.")
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(help=f"Largest size of a trained vocabulary.  [default: {DEFAULT_VOCAB_SIZE}]", show_default=False),
    ] = None,
    held_out_fraction: Annotated[
        float, typer.Option(help="Share of the documents that is kept for evaluation, by their digest; pretrain needs some.")
    ] = S.held_out_fraction,
    tokens_per_shard: Annotated[int, typer.Option(help="A shard ends where it has as many.")] = S.tokens_per_shard,
    keep_duplicates: Annotated[
        bool, typer.Option("--keep-duplicates", help="Keep documents that are there already, letter by letter.")
    ] = False,
    skip_bad_text: Annotated[
        bool, typer.Option("--skip-bad-text", help="Leave out documents that are no UTF-8 or no JSON, and count them.")
    ] = False,
    workers: Annotated[int | None, typer.Option(help="Processes that encode.  [default: one per core]", show_default=False)] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Only check the shards in the output folder against their checksums.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a run that was stopped was; its settings need not be repeated.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the prepared corpus in the output folder first.")] = False,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Turn a corpus of any size into token shards on disk, once, for pretrain --corpus."""
    given = given_options(ctx)
    run_command("prepare", lambda say: run(given, say), json_output=json_output, debug=debug)


def run(given: dict[str, Any], say: Say) -> CommandResult:
    """Runs the command with the options ``given`` by name.

    Raises :class:`CommandFailure`; other errors are left to ``run_command``.
    """
    if given.pop("verify", False):
        return _verify(given, say)
    from fastbert.prepare.folder import check_output, settings_of

    output = given["output"]
    run_settings = settings_of(output) if given.get("resume") else {}
    if run_settings:
        PrepareSettings.refuse_changes(output, given, run_settings)
    elif given.get("resume"):
        raise SettingsError(f"{output} holds no prepared corpus: there is nothing to resume (leave out --resume to begin one)")
    settings = PrepareSettings(**{"corpus": (), **run_settings, **given})
    check_output(settings)  # before transformers is imported: a refusal comes at once
    from fastbert.data.corpus import BadTextError
    from fastbert.prepare.run import prepare as body

    try:
        result = body(settings, say)
    except BadTextError as error:
        left = _what_is_left(output, "--skip-bad-text")
        raise CommandFailure(f"{error}\nTo leave such documents out, and count them: {left}") from error
    except TrainingError as error:
        raise CommandFailure(f"{error}; {_what_is_left(output)}") from error
    except KeyboardInterrupt as interrupt:
        raise CommandFailure(f"interrupted; {_what_is_left(output)}", INTERRUPTED) from interrupt
    say(_report(result))
    return CommandResult(result.to_dict())


def _what_is_left(output: str, *options: str) -> str:
    from fastbert.data.shards import is_prepared, read_manifest

    if not is_prepared(output) or read_manifest(Path(output))["complete"]:
        return "nothing was begun"
    command = shlex.join(["fastbert", "prepare", "--output", output, "--resume", *options])
    return f"the finished shards are in {output}, and this goes on behind them: {command}"


def _verify(given: dict[str, Any], say: Say) -> CommandResult:
    if len(given) > 1:
        raise SettingsError("--verify only checks what is in the output folder: leave the other options out")
    from fastbert.data.shards import open_shards

    shards = open_shards(Path(given["output"]))
    found = [shard.bytes for shard in shards.verify()]
    shards.load_tokenizer()
    say(f"{given['output']}: {len(found):,} shards and the tokenizer are as they were written ({sum(found) / 1e6:,.1f} MB)")
    return CommandResult({"output": given["output"], "shards": len(found), "bytes": sum(found), "fingerprint": shards.fingerprint})


def _report(result: PrepareResult) -> str:
    facts = result.facts
    lines = [
        f"{facts['documents']:,} documents, {facts['sentences']:,} sentences, {facts['words']:,} words, {facts['tokens']:,} tokens "
        f"(vocabulary of {facts['vocab_size']:,})",
        f"Held out: {facts['held_out_documents']:,} documents, {facts['held_out_tokens']:,} tokens",
    ]
    told = {
        "duplicates": "duplicates dropped",
        "empty": "empty documents left out",
        "bad_text": "documents of bad text left out",
        "cut_lines": "long lines divided",
        "cut_documents": "long documents divided",
        "cut_sentences": "long sentences divided",
    }
    lines.append(", ".join(f"{facts[name]:,} {text}" for name, text in told.items() if facts[name] or name == "duplicates"))
    lines += result.notes
    lines.append(
        f"{result.new_tokens:,} tokens in {result.seconds:,.1f} s, {result.tokens_per_second:,.0f} tokens/s with {result.workers} "
        f"process{'es' if result.workers > 1 else ''}; {result.shards:,} shards, {result.bytes / 1e6:,.1f} MB: {result.output}"
    )
    return "\n".join(lines)
