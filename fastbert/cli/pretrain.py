"""``fastbert pretrain``: the options of the command line to settings, errors to exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastbert.runs.errors import TrainingError, TrainingInterrupted
from fastbert.runs.torchrun import launch, only_main_speaks
from fastbert.train.checkpoint import checkpoint_folders, latest_checkpoint
from fastbert.train.run_folder import check_folders, check_output_folder, read_run, read_state
from fastbert.train.settings import (
    DTYPES,
    MASKINGS,
    MODEL_PRESETS,
    OBJECTIVES,
    OPTIMIZER_BACKENDS,
    OPTIMIZERS,
    SCHEDULES,
    TRACKERS,
    PretrainSettings,
)

from .app import app
from .command import (
    DONE,
    FAILED,
    INTERRUPTED,
    CommandFailure,
    CommandResult,
    DebugOption,
    JsonOption,
    Say,
    SeveralValuesCommand,
    given_options,
    run_command,
)  # fmt: skip

S = PretrainSettings


@app.command(cls=SeveralValuesCommand)
def pretrain(
    ctx: typer.Context,
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            help="Files (.txt, .txt.gz, .jsonl, .jsonl.gz, .parquet), folders of them, or a Hugging Face dataset name; several may "
            "follow; or one folder of fastbert prepare. Left out: English prose that comes with Python and its packages.",
            metavar="PATH...",
            show_default=False,
        ),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column of the text in JSONL, Parquet and datasets.")] = S.text_column,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer folder or Hub name. Left out: trained on the corpus.")
    ] = S.tokenizer,
    vocab_size: Annotated[int | None, typer.Option(help="Largest size of a trained vocabulary.  [default: 30522]")] = S.vocab_size,
    output: Annotated[str, typer.Option(help="Folder of the run.")] = S.output,
    model: Annotated[
        str, typer.Option(help=f"{', '.join(MODEL_PRESETS)}, or a checkpoint (folder or Hub name) to continue from.")
    ] = S.model,
    num_hidden_layers: Annotated[int | None, typer.Option(help="Instead of the preset's.")] = None,
    hidden_size: Annotated[int | None, typer.Option(help="Instead of the preset's.")] = None,
    num_attention_heads: Annotated[int | None, typer.Option(help="Instead of the preset's.")] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="Instead of the preset's.")] = None,
    max_seq_length: Annotated[
        int, typer.Option(help="Tokens of a sentence pair at most, [CLS] and [SEP] included.")
    ] = S.max_seq_length,
    tokens_per_batch: Annotated[int, typer.Option(help="Real tokens of a batch at most.")] = S.tokens_per_batch,
    batches_per_step: Annotated[
        int, typer.Option(help="Batches whose gradients make a step, over all processes together.")
    ] = S.batches_per_step,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = S.steps,
    second_phase_steps: Annotated[int, typer.Option(help="The last of --steps, on longer sequences.")] = S.second_phase_steps,
    second_phase_seq_length: Annotated[int, typer.Option(help="Tokens of theirs at most.")] = S.second_phase_seq_length,
    second_phase_learning_rate: Annotated[
        float | None, typer.Option(help="Their peak, with a warmup of their own.  [default: the schedule goes on]")
    ] = S.second_phase_learning_rate,
    objective: Annotated[
        str, typer.Option(help=f"{' or '.join(OBJECTIVES)}: masked words with or without next sentences.")
    ] = S.objective,
    masking: Annotated[str, typer.Option(help=f"What is masked together: {', '.join(MASKINGS)}.")] = S.masking,
    mlm_probability: Annotated[float, typer.Option(help="Share of the tokens that are masked.")] = S.mlm_probability,
    static_pairs: Annotated[
        bool, typer.Option("--static-pairs", help="The same sentence pairs in every epoch, under new masks.")
    ] = False,
    optimizer: Annotated[str, typer.Option(help=f"{' or '.join(OPTIMIZERS)}.")] = S.optimizer,
    optimizer_backend: Annotated[
        str,
        typer.Option(help=f"{' or '.join(OPTIMIZER_BACKENDS)}: whose kernels take its steps."),
    ] = S.optimizer_backend,
    schedule: Annotated[str, typer.Option(help=f"Of the learning rate, after its warmup: {', '.join(SCHEDULES)}.")] = S.schedule,
    learning_rate: Annotated[float, typer.Option(help="Peak of the schedule.")] = S.learning_rate,
    warmup_steps: Annotated[int | None, typer.Option(help="Steps of warmup.  [default: a tenth of --steps]")] = S.warmup_steps,
    weight_decay: Annotated[float, typer.Option(help="The optimizer's, not for biases and LayerNorm.")] = S.weight_decay,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are clipped to it.")] = S.max_grad_norm,
    loss_spike: Annotated[
        float, typer.Option(help="A step whose loss is above this many times the running mean is left out (0: never).")
    ] = S.loss_spike,
    max_skipped_steps: Annotated[int, typer.Option(help="Steps left out, after which the run stops.")] = S.max_skipped_steps,
    dtype: Annotated[str, typer.Option(help=f"{' or '.join(DTYPES)} (autocast).")] = S.dtype,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations again instead of keeping them.")
    ] = False,
    cuda_graph: Annotated[
        bool,
        typer.Option("--cuda-graph", help="Record the training step once and repeat it, for a fast GPU."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of weights, data order, masks and dropout.")] = S.seed,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.")] = S.save_steps,
    keep_checkpoints: Annotated[int, typer.Option(help="How many of the newest stay.")] = S.keep_checkpoints,
    log_steps: Annotated[int, typer.Option(help="Steps between lines of metrics.jsonl.")] = S.log_steps,
    report_to: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Where metrics go beside metrics.jsonl: {', '.join(TRACKERS)}; several may follow.",
            metavar="NAME...",
            show_default=False,
        ),
    ] = None,
    dropout: Annotated[
        float | None, typer.Option(help="Of hidden states and attention.  [default: 0.1; 0 with --compare]")
    ] = S.dropout,
    held_out_fraction: Annotated[
        float | None,
        typer.Option(help="Share of the text that is kept for evaluation.  [default: 0.05; a prepared corpus has its own]"),
    ] = S.held_out_fraction,
    workers: Annotated[int, typer.Option(help="Processes that make batches (0: the training process).")] = S.workers,
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda, cuda:1.")] = S.device,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Also train transformers' BERT on the same weights and batches; print both."),
    ] = False,
    compare_steps: Annotated[int | None, typer.Option(help="Compare the first steps only.  [default: all]")] = S.compare_steps,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in the output folder; its settings need not be repeated.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run in the output folder first.")] = False,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Pretrain a BERT (masked words and next sentences) on your text, from tokenizer to model card."""
    given = given_options(ctx)
    with only_main_speaks():
        run_command("pretrain", lambda say: run(given, say), json_output=json_output, debug=debug)


def run(given: dict[str, Any], say: Say) -> CommandResult:
    """Runs the command with the options ``given`` by name.

    Raises :class:`CommandFailure`; other errors are left to ``run_command``.
    """
    settings = settings_from_options(given)
    # Before torch and transformers are imported: a refusal comes at once. Several processes ask the first of them, later.
    if launch() is None:
        check_folders(settings)
    from fastbert.runs.memory import keep_freed_memory
    from fastbert.train.pretrain import pretrain as train

    output = Path(settings.output)
    keep_freed_memory()  # this process does nothing else; where it cannot be, training is a little slower
    try:
        result = train(settings, say)
    except TrainingInterrupted as stop:
        raise CommandFailure(f"{stop}\nTo go on: {resume_command(output)}", INTERRUPTED) from stop
    except KeyboardInterrupt as interrupt:
        raise CommandFailure(f"interrupted; {_what_is_left(output)}", INTERRUPTED) from interrupt
    except (TrainingError, OSError) as error:
        if isinstance(error, OSError) and not (output.is_dir() and checkpoint_folders(output)):
            raise
        raise CommandFailure(f"{error}; {_what_is_left(output)}") from error
    agree = result.comparison is None or result.comparison["agree"]
    return CommandResult(result.to_dict(), DONE if agree else FAILED)


def settings_from_options(given: dict[str, Any]) -> PretrainSettings:
    """Settings with defaults for the options that are not given; with ``--resume``, those of the run instead.

    Raises :class:`SettingsError` for values that cannot work, and for options that differ from those of a resumed run.
    """
    if not given.get("resume"):
        return PretrainSettings(**given)
    output = given.get("output", PretrainSettings.output)
    check_output_folder(Path(output), resume=True, overwrite=False)
    if checkpoint_folders(Path(output)):
        checkpoint = latest_checkpoint(Path(output), lambda folder, defect: None)
        if checkpoint is None:
            return PretrainSettings(output=output, resume=True)
        run_settings = read_state(checkpoint)["settings"]
    else:  # stopped before the first one
        run_settings = read_run(Path(output))["settings"]
    PretrainSettings.refuse_changes(output, given, run_settings)
    return PretrainSettings.from_dict({**run_settings, "overwrite": False, **given, "output": output})


def resume_command(output: Path) -> str:
    return PretrainSettings(output=str(output)).command() + " --resume"


def _what_is_left(output: Path) -> str:
    checkpoints = checkpoint_folders(output) if output.is_dir() else []
    if not checkpoints:
        return "there is no checkpoint yet"
    return f"the last checkpoint is {checkpoints[0]}, and this goes on from it: {resume_command(output)}"
