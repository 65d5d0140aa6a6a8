"""``fastbert glue``: the options of the command line to settings, errors to exit codes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fastbert.finetune.settings import DTYPES, MODES
from fastbert.glue.settings import GlueSettings
from fastbert.tasks.glue_tasks import GLUE_TASKS

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


@app.command(cls=SeveralValuesCommand)
def glue(
    ctx: typer.Context,
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder laid out as GLUE's own download: CoLA/train.tsv, MNLI/dev_matched.tsv, ...  [required]", show_default=False
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Checkpoint: folder or Hub name.  [required]", show_default=False)] = None,
    output: Annotated[str, typer.Option("--output", "--output-dir", help="Folder of the run.")] = GlueSettings.output,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(task.name for task in GLUE_TASKS)}; several may follow. Left out: all whose files are there.",
            metavar="TASK...",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[
        list[int] | None,
        typer.Option("--seeds", "--seed", help="A model of each task for each.  [default: 0]", metavar="N...", show_default=False),
    ] = None,
    mode: Annotated[
        str, typer.Option(help=f"What trains: {', '.join(MODES)} (head: the output layer only; top-k: the upper layers).")
    ] = GlueSettings.mode,
    top_k_layers: Annotated[int | None, typer.Option(help="Of --mode top-k.  [default: 2]", show_default=False)] = None,
    lora_r: Annotated[int | None, typer.Option(help="Rank, of --mode lora.  [default: 8]", show_default=False)] = None,
    lora_alpha: Annotated[int | None, typer.Option(help="Scale, of --mode lora.  [default: 16]", show_default=False)] = None,
    epochs: Annotated[
        float, typer.Option("--epochs", "--num-train-epochs", help="Passes over the training data.")
    ] = GlueSettings.epochs,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "--per-device-train-batch-size", help="Examples of a step on a device.")
    ] = GlueSettings.batch_size,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak.  [default: 5e-5; lora 5e-4, head 1e-3]", show_default=False)
    ] = None,
    max_seq_length: Annotated[
        int, typer.Option(help="Tokens of a text or pair at most, [CLS] and [SEP] included.")
    ] = GlueSettings.max_seq_length,
    dtype: Annotated[str, typer.Option(help=f"{' or '.join(DTYPES)} (autocast).")] = GlueSettings.dtype,
    limit: Annotated[
        int | None, typer.Option(help="Examples of each split that are used, for a quick look.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda, cuda:1.")] = GlueSettings.device,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue the run in the output folder; tasks and seeds that are done stay, others may be added."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run in the output folder first.")] = False,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Fine-tune a model on the tasks of GLUE; scores beside published ones, a report, and files for GLUE's server."""
    given = given_options(ctx)
    run_command("glue", lambda say: run_glue(given, say), json_output=json_output, debug=debug)


def run_glue(given: dict[str, Any], say: Say) -> CommandResult:
    """Runs the command with the options ``given`` by name."""
    settings = settings_from_options(given)
    from fastbert.glue.run import glue as run
    from fastbert.runs.memory import keep_freed_memory

    keep_freed_memory()  # this process does nothing else; where it cannot be, training is a little slower
    try:
        document = run(settings, say)
    except KeyboardInterrupt as interrupt:
        message = f"interrupted; what is done stays, and this goes on from it: {settings.command()} --resume"
        raise CommandFailure(message, INTERRUPTED) from interrupt
    # "command" is the command's name in what --json prints, and the whole command line in run.json.
    return CommandResult({name: value for name, value in document.items() if name not in ("command", "command_name")})


def settings_from_options(given: dict[str, Any]) -> GlueSettings:
    """Settings with defaults for the options that are not given; with ``--resume``, those of the run in the output folder instead.

    Raises :class:`SettingsError` for values that cannot work and for options that a continued run cannot change.
    """
    from fastbert.finetune.folder import with_those_of_the_run

    return GlueSettings.from_dict(with_those_of_the_run(GlueSettings, given, ("data", "model")))
