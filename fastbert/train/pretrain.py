"""``fastbert pretrain``: text in, a BERT that transformers loads out.

corpus and tokenizer (``prepare``) -> model -> held-out scores -> training (``loop``) -> held-out scores, filled-in words ->
the output folder. It holds the final model and tokenizer, ``metrics.jsonl``, ``loss.png``, a model card, ``run.json`` with
settings and results, ``compare.json`` with ``--compare``, and the newest checkpoints.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from fastbert.data.tokenizer import save_tokenizer
from fastbert.runs import Say
from fastbert.runs.errors import SettingsError, TrainingError
from fastbert.runs.folder import write_json
from fastbert.runs.model import pick_device
from fastbert.runs.one_writer import one_writer
from fastbert.runs.torchrun import Launch, launch

from .checkpoint import checkpoint_folders, checkpoint_step, latest_checkpoint, set_aside, unfinished_folders
from .compare import Comparison, ComparisonReport
from .distributed import Processes, check_shares, joined, local_device
from .evaluate import evaluate
from .fill_in import FilledMask, fill_in_examples
from .inputs import PreparedData, build_model, check_model, prepare_data
from .interrupt import StopRequest, stop_on_signals
from .learner import MODEL_NAME, Learner, save_model
from .loop import TrainingLoop
from .metrics import MetricsFile, read_metrics
from .model_card import model_card
from .optimizer import check_optimizer_backend
from .plot import plot_losses
from .run_facts import device_name, versions
from .run_folder import (
    CARD_NAME,
    COMPARISON_NAME,
    METRICS_NAME,
    PLOT_NAME,
    RUN_NAME,
    check_folders,
    delete_run,
    read_run,
    whole_files,
)
from .run_state import RunState, load_run
from .settings import PretrainSettings
from .telemetry import Telemetry, measured_rate, summary
from .trackers import Trackers, check_trackers, new_run_name


@dataclass(frozen=True)
class PretrainResult:
    """A finished run. ``held_out_start`` and ``held_out``: scores on the held-out text before and after training (losses in
    nats); ``phases``: steps and longest sequence of each; ``skipped``: the steps that were left out, see ``RunState``;
    ``tokens``: real tokens trained on; ``fill``: the share of the batches' token budget that they are; ``tokens_per_second``: over
    training steps and their data; ``telemetry``: see ``telemetry.summary``; ``data``: counts of the corpus; ``comparison``: the
    summary of ``--compare`` or None, with ``agree`` False where the losses differ.
    """

    output: str
    device: str
    parameters: int
    steps: int
    phases: list[dict[str, int]]
    skipped: list[dict[str, Any]]
    tokens: int
    fill: float
    seconds: float
    tokens_per_second: float
    telemetry: dict[str, Any]
    data: dict[str, Any]
    held_out_start: dict[str, float]
    held_out: dict[str, float]
    examples: list[FilledMask]
    comparison: dict[str, Any] | None
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def pretrain(settings: PretrainSettings, say: Say = print) -> PretrainResult:
    """Runs, or with ``settings.resume`` continues, a pretraining; ``say`` gets lines for people.

    SIGINT and SIGTERM end it after the step with a checkpoint: :class:`~fastbert.runs.errors.TrainingInterrupted`. Raises
    :class:`SettingsError` for what cannot be done as asked, before anything is written; ``CorpusError`` for unusable text;
    :class:`TrainingError` where training fails.
    """
    return _pretrain(settings, launch(), say)


@one_writer
def _pretrain(settings: PretrainSettings, started: Launch | None, say: Say) -> PretrainResult:
    check_trackers(settings.report_to)
    with joined(started) as processes:
        settings = PretrainSettings.from_dict(processes.of_main(lambda: _settings_to_run(settings, started).to_dict()))
        device = local_device(pick_device(settings.device), started)
        check_optimizer_backend(settings.optimizer_backend, device)
        check_shares(settings.batches_per_step, processes.count)
        if settings.compare and processes.count > 1:
            raise SettingsError("--compare trains in one process: leave torchrun out")
        with stop_on_signals() as stop:
            return _run(settings, device, processes, stop, say)


def _run(settings: PretrainSettings, device: torch.device, processes: Processes, stop: StopRequest, say: Say) -> PretrainResult:
    output = Path(settings.output)
    checkpoint, state = find_run(output, settings, processes, say) if settings.resume else (None, None)
    if processes.count > 1:
        say(_processes_text(settings, device, processes, state))
    if checkpoint is None:
        check_model(settings)
    data = prepare_data(settings, say, checkpoint)
    _check_same_everywhere(data, processes)
    torch.manual_seed(settings.seed)
    model = build_model(settings, data.tokenizer, checkpoint).to(device)
    # It is saved with the model, for whoever says truncation=True: one that was trained here knows no limit.
    data.tokenizer.model_max_length = min(data.tokenizer.model_max_length, model.config.max_position_embeddings)
    if state is not None:
        _check_same_data(state, data)
    elif processes.is_main:
        _start_folder(output, settings, data)
    return _train(settings, data, model, checkpoint, state, processes, stop, say)


def _settings_to_run(settings: PretrainSettings, started: Launch | None) -> PretrainSettings:
    """``settings``, checked against the output folder; with ``resume`` where torchrun has started the run anew.

    A run that is there with the same settings is the run that failed: it goes on from its newest checkpoint, or from the beginning
    where there is none yet. Raises as ``check_folders`` does.
    """
    output = Path(settings.output)
    # torchrun counts restarts after failures, not those after machines came or went.
    again = started is not None and (started.restarts > 0 or (started.may_restart and not settings.overwrite))
    if again and not settings.resume and (output / RUN_NAME).is_file():
        try:
            settings.refuse_changes(settings.output, settings.to_dict(), read_run(output)["settings"])
        except SettingsError:
            pass  # another run's folder: what was asked for counts
        else:
            settings = replace(settings, resume=True, overwrite=False)
    check_folders(settings)
    return settings


def _processes_text(settings: PretrainSettings, device: torch.device, processes: Processes, state: RunState | None) -> str:
    each = settings.batches_per_step // processes.count
    text = f"{processes.count} processes over {'NCCL' if device.type == 'cuda' else 'gloo'}, {each} batches of a step for each"
    if state is not None and state.processes != processes.count:
        text += f"; the run had {state.processes} so far: the same steps, summed up in another order"
    return text


def _check_same_everywhere(data: PreparedData, processes: Processes) -> None:
    """All processes read the same files: they must make the same tokens of them."""
    expected = processes.of_main(lambda: data.facts["fingerprint"])
    if data.facts["fingerprint"] != expected:
        raise TrainingError(
            f"the text that this process reads is not that of process 0: it has {data.facts['documents']:,} documents and "
            f"{data.facts['tokens']:,} tokens; the same files and versions must be on all machines"
        )


def find_run(output: Path, settings: PretrainSettings, processes: Processes, say: Say) -> tuple[Path, RunState] | tuple[None, None]:
    """The newest sound checkpoint in ``output`` and its state; broken newer ones are named, and go with the next checkpoint.

    None of both for a run that was stopped before its first checkpoint. What a crash has left of checkpoints is deleted. Process 0
    looks for all.

    Raises :class:`SettingsError` naming what ``settings`` ask for differently, :class:`TrainingError` where no checkpoint is
    sound, or a line of the metrics is none.
    """
    if not checkpoint_folders(output):
        settings.refuse_changes(settings.output, settings.to_dict(), read_run(output)["settings"])
        say(f"{output} was stopped before its first checkpoint: the run begins anew")
        return None, None
    broken: list[Path] = []

    def on_broken(folder: Path, defect: str) -> None:
        say(f"{folder} is broken and left out: {defect}")
        broken.append(folder)

    def newest() -> str:
        checkpoint = latest_checkpoint(output, on_broken)
        if checkpoint is None:
            raise TrainingError(f"none of the checkpoints in {output} is sound: nothing to resume")
        if (output / METRICS_NAME).is_file():
            read_metrics(output / METRICS_NAME)  # whose damage is named before the text is read
        return str(checkpoint)

    checkpoint = Path(processes.of_main(newest))
    state = RunState.read(checkpoint)
    settings.refuse_changes(settings.output, settings.to_dict(), state.settings)
    state.settings = settings.to_dict()  # what may be changed counts from now on
    if processes.is_main:
        for folder in unfinished_folders(output):
            shutil.rmtree(folder)
    for folder in broken:  # none but in process 0
        set_aside(folder)
    say(f"Resuming {output} after step {checkpoint_step(checkpoint):,}")
    return checkpoint, state


def _check_same_data(state: RunState, data: PreparedData) -> None:
    if data.facts["fingerprint"] != state.data["fingerprint"]:
        had, has = (f"{facts['documents']:,} documents and {facts['tokens']:,} tokens" for facts in (state.data, data.facts))
        has = "as many, but other ones or held out otherwise" if has == had else has
        raise SettingsError(f"cannot resume with another text: the corpus had {had}, it now has {has}")


def _start_folder(output: Path, settings: PretrainSettings, data: PreparedData) -> None:
    if settings.overwrite or settings.resume:
        delete_run(output)
    output.mkdir(parents=True, exist_ok=True)
    _write_run(output, settings, data.facts, results=None)


def _write_run(output: Path, settings: PretrainSettings, data: dict[str, Any], results: dict[str, Any] | None) -> None:
    document = {"command": settings.command(), "settings": settings.to_dict(), "data": data, "results": results}
    write_json(output / RUN_NAME, document)


def _train(
    settings: PretrainSettings,
    data: PreparedData,
    model: PreTrainedModel,
    checkpoint: Path | None,
    state: RunState | None,
    processes: Processes,
    stop: StopRequest,
    say: Say,
) -> PretrainResult:
    output = Path(settings.output)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(f"Model: {_model_text(model)}, {parameters / 1e6:.1f} M parameters, on {model.device}")
    step, run_name = (None, new_run_name(output)) if state is None else (state.step, state.run_name)
    # The first process keeps the record; what is counted over all is the same in every one.
    record, trackers_named = (output / METRICS_NAME, settings.report_to) if processes.is_main else (Path(os.devnull), ())
    with (
        Trackers(trackers_named, output, run_name, step, settings.to_dict(), say) as trackers,
        MetricsFile(record, step if processes.is_main else None, trackers.log) as metrics,
    ):
        if state is None:
            state = RunState(settings.to_dict(), data.facts, _held_out_scores(settings, model, data), run_name)
            metrics.write({"step": 0, "held_out": state.held_out_start})
        say(f"Held-out text before training: {_scores_text(state.held_out_start)}")
        matmul_rate = _matmul_rate_of_all(model.device, settings, processes, say)
        learner = Learner(model, settings, state.step, processes=processes)
        comparison = _comparison(settings, model, data, state, say)
        if checkpoint is not None:
            load_run(checkpoint, state, learner, comparison)
        state.processes = processes.count
        telemetry = Telemetry(settings, model.config, matmul_rate)
        TrainingLoop(settings, state, learner, data, comparison, metrics, telemetry, say, processes).run(stop)
        if not state.tokens:
            raise TrainingError(f"all {state.step} steps were left out, so nothing was trained; {METRICS_NAME} says why")
        scores = _held_out_scores(settings, model, data)
        metrics.write({"step": state.step, "held_out": scores})
    examples = fill_in_examples(model, data.held_out[0].to(model.device), data.tokenizer)
    budget = (state.step - len(state.skipped)) * settings.batches_per_step * settings.tokens_per_batch
    report = None if state.comparison is None else ComparisonReport.from_state(state.comparison)
    result = PretrainResult(
        output=str(output),
        device=device_name(model.device),
        parameters=parameters,
        steps=state.step,
        phases=[{"steps": phase.steps, "max_seq_length": phase.max_seq_length} for phase in settings.phases],
        skipped=state.skipped,
        tokens=state.tokens,
        fill=state.tokens / budget,
        seconds=state.seconds,
        tokens_per_second=state.tokens / state.seconds,
        telemetry=summary(read_metrics(record), matmul_rate),
        data=data.facts,
        held_out_start=state.held_out_start,
        held_out=scores,
        examples=examples,
        comparison=None if report is None else report.summary(),
        versions=versions(),
    )
    if processes.is_main:
        _write_results(settings, result, model, data, report, say)
    _say_results(result, report, say)
    return result


def _matmul_rate_of_all(device: torch.device, settings: PretrainSettings, processes: Processes, say: Say) -> float | None:
    """FLOP/s of all processes together: the first measures while the others wait, and all have such a device."""
    rate = processes.of_main(lambda: measured_rate(device, settings.dtype, say))
    return None if rate is None else rate * processes.count


def _held_out_scores(settings: PretrainSettings, model: PreTrainedModel, data: PreparedData) -> dict[str, float]:
    scores = evaluate(model, data.held_out, dtype=settings.dtype)
    if not math.isfinite(scores["loss"]):
        raise TrainingError(f"the loss on the held-out text is {scores['loss']}: the weights of the model are spoilt")
    return scores


def _comparison(
    settings: PretrainSettings, model: PreTrainedModel, data: PreparedData, state: RunState, say: Say
) -> Comparison | None:
    """The comparison that is still to be run, if there is one."""
    if not settings.compare or state.step >= settings.effective_compare_steps:
        return None
    say(
        f"Comparing the first {settings.effective_compare_steps:,} of {settings.steps:,} steps with transformers' "
        "BertForPreTraining (sdpa, float32) on the same weights and batches, dropout 0 in both"
    )
    return Comparison(model, settings, data.tokenizer.pad_token_id, state.step)


def _write_results(
    settings: PretrainSettings,
    result: PretrainResult,
    model: PreTrainedModel,
    data: PreparedData,
    report: ComparisonReport | None,
    say: Say,
) -> None:
    output = Path(settings.output)
    with whole_files(output, last=MODEL_NAME) as folder:
        save_model(model, folder)
        save_tokenizer(data.tokenizer, folder)
        (folder / CARD_NAME).write_text(model_card(settings, result, model.config), encoding="utf-8", errors="backslashreplace")
    if report is not None:
        write_json(output / COMPARISON_NAME, report.to_dict())
    if importlib.util.find_spec("matplotlib"):
        phase_starts = [phase.first_step for phase in settings.phases[1:]]
        plot_losses(read_metrics(output / METRICS_NAME), output / PLOT_NAME, phase_starts)
    else:
        say(f"No {PLOT_NAME}: matplotlib is not installed (pip install matplotlib)")
    _write_run(output, settings, result.data, result.to_dict())


def _say_results(result: PretrainResult, report: ComparisonReport | None, say: Say) -> None:
    mfu = result.telemetry["mfu"]
    speed = f"{result.tokens_per_second:,.0f} tokens/s" + ("" if mfu is None else f", MFU {mfu:.1%}")
    say(f"\nTrained {result.steps:,} steps on {result.tokens:,} tokens, {speed}")
    if result.skipped:
        say(f"Steps left out: {len(result.skipped)}, named in {METRICS_NAME}")
    say(f"Held-out text before: {_scores_text(result.held_out_start)}")
    say(f"Held-out text after:  {_scores_text(result.held_out)}")
    if result.examples:
        say("\nHeld-out words filled in:")
    for example in result.examples:
        say(f"  {example.line()}")
    if report is not None:
        say("\n" + "\n".join(report.lines()))
    say(f"\nModel, tokenizer, metrics and model card: {result.output}")


def _scores_text(scores: dict[str, float]) -> str:
    text = f"MLM loss {scores['mlm_loss']:.3f}, MLM accuracy {scores['mlm_accuracy']:.1%}"
    return f"{text}, NSP accuracy {scores['nsp_accuracy']:.1%}" if "nsp_accuracy" in scores else text


def _model_text(model: PreTrainedModel) -> str:
    config = model.config
    return f"{config.num_hidden_layers} layers, {config.hidden_size} hidden, {config.num_attention_heads} heads"
