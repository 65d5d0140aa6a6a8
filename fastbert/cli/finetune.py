"""``fastbert finetune``: the options of the command line."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from fastbert.finetune.settings import DTYPES, MODES, FinetuneSettings

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

S = FinetuneSettings
TASKS = (
    "text-classification (sentiment), multi-label-classification, regression, ner, pos, token-classification, "
    "question-answering, multiple-choice, or a task of GLUE (cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli)"
)


@app.command(cls=SeveralValuesCommand)
def finetune(
    ctx: typer.Context,
    task: Annotated[str | None, typer.Option(help=TASKS + ".  [required]", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help="A checkpoint: folder or Hub name.  [required]", show_default=False)] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A folder with train, dev and test files, a file to train on, or a Hugging Face dataset. TSV as GLUE has it, CSV, "
            "JSONL, Parquet; CoNLL, CoNLL-U; SQuAD's JSON; each text file also with .gz.  [required]",
            show_default=False,
        ),
    ] = None,
    dev: Annotated[str | None, typer.Option(help="A file, in place of the folder's.")] = S.dev,
    test: Annotated[str | None, typer.Option(help="A file, in place of the folder's.")] = S.test,
    output: Annotated[str, typer.Option("--output", "--output-dir", help="Folder of the run.")] = S.output,
    text_column: Annotated[str | None, typer.Option(help="Of the text, or of the words.  [default: found by its name]")] = None,
    text_pair_column: Annotated[str | None, typer.Option(help="Of the second text of a pair.")] = None,
    label_column: Annotated[
        list[str] | None,
        typer.Option(
            help="Of the label, the score or the tags; several: a label each, with 0 or 1.  [default: found by its name]",
            metavar="NAME...",
            show_default=False,
        ),
    ] = None,
    label_separator: Annotated[str, typer.Option(help="Between the labels of a text (multi-label).")] = S.label_separator,
    mode: Annotated[
        str, typer.Option(help=f"What trains: {', '.join(MODES)} (head: the output layer only; top-k: the upper layers).")
    ] = S.mode,
    top_k_layers: Annotated[int | None, typer.Option(help="Of --mode top-k.  [default: 2]")] = S.top_k_layers,
    lora_r: Annotated[int | None, typer.Option(help="Rank, of --mode lora.  [default: 8]")] = S.lora_r,
    lora_alpha: Annotated[int | None, typer.Option(help="Scale, of --mode lora.  [default: 16]")] = S.lora_alpha,
    epochs: Annotated[float, typer.Option("--epochs", "--num-train-epochs", help="Passes over the data.")] = S.epochs,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = S.max_steps,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "--per-device-train-batch-size", help="Examples of a step on a device.")
    ] = S.batch_size,
    gradient_accumulation_steps: Annotated[int, typer.Option(help="Batches of an optimizer step.")] = S.gradient_accumulation_steps,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak.  [default: 5e-5; lora 5e-4, head 1e-3]", show_default=False)
    ] = S.learning_rate,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which the learning rate rises.")] = S.warmup,
    weight_decay: Annotated[float, typer.Option(help="AdamW's, not for biases and LayerNorm.")] = S.weight_decay,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are clipped to it.")] = S.max_grad_norm,
    max_seq_length: Annotated[
        int | None, typer.Option(help="Tokens of a sequence at most.  [default: what the model takes; question answering 384]")
    ] = S.max_seq_length,
    seeds: Annotated[
        list[int] | None,
        typer.Option("--seeds", "--seed", help="A training each; scores get a mean and a spread.  [default: 0]", metavar="N..."),
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"{' or '.join(DTYPES)} (autocast).")] = S.dtype,
    metric: Annotated[str | None, typer.Option(help="That chooses the best checkpoint.  [default: the task's]")] = S.metric,
    eval_steps: Annotated[int | None, typer.Option(help="Steps between evaluations.  [default: an epoch]")] = S.eval_steps,
    early_stopping: Annotated[
        int | None, typer.Option(help="Evaluations without a better score after which training ends.  [default: never]")
    ] = S.early_stopping,
    dev_fraction: Annotated[float, typer.Option(help="Held out of the training data without dev data.")] = S.dev_fraction,
    limit: Annotated[int | None, typer.Option(help="Examples of each split, for a quick look.  [default: all]")] = S.limit,
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda, cuda:1.")] = S.device,
    adapt: Annotated[
        list[str] | None,
        typer.Option(
            help="Raw text of the domain (files, folders, a dataset): the masked language model goes on with it first, and the "
            "effect is reported.",
            metavar="PATH...",
            show_default=False,
        ),
    ] = None,
    adapt_steps: Annotated[int | None, typer.Option(help="Steps of --adapt.  [default: an epoch]")] = S.adapt_steps,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder, with its settings.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run in the output folder first.")] = False,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Fine-tune a checkpoint: text classification, regression, NER, POS tagging, question answering, multiple choice."""
    given = given_options(ctx)

    def body(say: Say) -> CommandResult:
        settings = settings_from_options(given)
        from fastbert.finetune.folder import read_run
        from fastbert.finetune.run import finetune as run
        from fastbert.runs.memory import keep_freed_memory

        keep_freed_memory()  # this process does nothing else; where it cannot be, training is a little slower
        try:
            return CommandResult(run(settings, say).to_dict())
        except KeyboardInterrupt as interrupt:
            if read_run(Path(settings.output)) is None:
                raise
            command = shlex.join(["fastbert", "finetune", "--output", settings.output, "--resume"])
            raise CommandFailure(
                f"interrupted; what is done stays, and this goes on from it: {command}", INTERRUPTED
            ) from interrupt

    run_command("finetune", body, json_output=json_output, debug=debug)


def settings_from_options(given: dict[str, Any]) -> FinetuneSettings:
    """Settings with defaults for the options that are not given; with ``--resume``, those of the run in the output folder instead.

    Raises :class:`SettingsError` for values that cannot work and for options that are missing.
    """
    from fastbert.finetune.folder import with_those_of_the_run

    return FinetuneSettings.from_dict(with_those_of_the_run(FinetuneSettings, given, ("task", "model", "data")))
