"""``fastbert finetune``: labelled data and a checkpoint in, a model with scores, predictions, pictures and a card out.

read, check and tokenize everything (:mod:`.prepared`) -> for each seed: model, training with transformers' Trainer on packed rows,
the best checkpoint -> the scores of all splits -> the output folder. It holds the model of the best seed with its tokenizer and
``task.json`` (what ``fastbert predict`` needs), ``run.json`` with settings and results, predictions, pictures and a model card.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from fastbert.data.sources import Source
from fastbert.data.splits import find_splits
from fastbert.data.tokenizer import save_tokenizer
from fastbert.runs import Say
from fastbert.runs.errors import SettingsError
from fastbert.runs.folder import check_outside, write_json
from fastbert.runs.full_disk import write_errors
from fastbert.runs.model import pick_device
from fastbert.runs.one_writer import one_writer
from fastbert.runs.torchrun import refuse_several_processes
from fastbert.runs.whole_file import whole_file
from fastbert.tasks.glue_data import find_glue_splits, glue_sources
from fastbert.tasks.glue_tasks import glue_task, is_glue_task
from fastbert.tasks.model import load_model, quiet_transformers
from fastbert.tasks.outputs import model_outputs
from fastbert.tasks.registry import save_task, task_for
from fastbert.tasks.sequence import MULTI
from fastbert.tasks.task import Outputs, Task

from .adapt import ADAPTATION_NAME, LONGEST, adapt, check_adaptation, check_corpus, effect
from .folder import CHECKPOINTS, RUN_NAME, check_folder, delete_folder, move_in, new_folder, read_run
from .modes import Tuning, autocast_dtype, check_packages, in_mode, prepare_mode
from .prepared import DEV, TRAIN, PreparedTask, Split, prepare_task
from .report import write_report
from .settings import FinetuneSettings
from .trainer import build_trainer

ADAPTED, WITHOUT_ADAPTATION = "adapted", "without-adaptation"


@dataclass(frozen=True)
class SeedResult:
    """One training. ``scores``: by split, then metric; ``steps``: optimizer steps; ``train_seconds``: without evaluation and
    checkpoints, and ``tokens_per_second`` in them, both of the process that ended it; ``log``: transformers' log_history."""

    seed: int
    scores: dict[str, dict[str, float]]
    best_step: int
    steps: int
    epochs: float
    train_seconds: float
    tokens_per_second: float
    log: list[dict[str, Any]]


@dataclass(frozen=True)
class FinetuneResult:
    """``scores``: of each split and metric the mean, the standard deviation over seeds and the single values; ``best_seed``: whose
    model lies in ``output``; ``adaptation``: with ``settings.adapt``, an :class:`~.adapt.Adaptation` and its ``effect``."""

    output: str
    task: str
    main_metric: str
    best_seed: int
    scores: dict[str, dict[str, dict[str, Any]]]
    seeds: list[dict[str, Any]]
    data: dict[str, Any]
    notes: list[str]
    adaptation: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


@one_writer
def finetune(settings: FinetuneSettings, say: Say = print) -> FinetuneResult:
    """Runs, or with ``settings.resume`` continues, a fine-tuning; ``say`` gets lines for people.

    Raises :class:`SettingsError` for what cannot be done as asked and DataError for bad data, both before anything is trained, and
    TrainingError for training that diverges and a disk that is full.
    """
    refuse_several_processes(settings.command_name)
    output = Path(settings.output)
    run = check_folder(output, settings.command_name, resume=settings.resume, overwrite=settings.overwrite)
    if run is not None:
        settings.refuse_changes(settings.output, settings.to_dict(), run["settings"])
    check_packages(settings.mode)
    if settings.overwrite:
        given = (settings.model, settings.data, settings.dev, settings.test, *settings.adapt)
        check_outside(output, [name for name in given if name is not None])
    device = pick_device(settings.device)
    _refuse_several_gpus(device)
    task = task_of(settings)
    main_metric(settings, task)  # one that the task cannot have is refused before its data are read
    prepared = prepare_task(task, sources_of(settings), settings, say)
    metric = main_metric(settings, prepared.task)
    data = {
        name: {**split.facts(prepared.task), "fingerprint": split.examples.fingerprint()} for name, split in prepared.splits.items()
    }
    if run is None:
        check_model(settings, prepared.task, prepared.max_seq_length)
    else:
        _refuse_other_data(output, run, data)
        if _is_adapted(output):
            check_corpus(output / ADAPTED, settings.model, settings.adapt, say)
    if settings.overwrite:
        delete_folder(output)
    document = (
        {**run, "data": data}
        if run is not None
        else {
            "command_name": settings.command_name,
            "command": settings.command(),
            "settings": settings.to_dict(),
            "data": data,
            "seeds": {},
            "notes": [],
        }
    )
    with write_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / RUN_NAME, document)
    trained, without = settings, None
    if settings.adapt:
        trained = replace(settings, model=str(adapted_model(settings, prepared, device, say)))
        without = train_without_adaptation(settings, say)
        say("Fine-tuning the adapted checkpoint:")
    for seed in settings.seeds:
        if str(seed) in document["seeds"]:
            say(f"Seed {seed}: done before")
            continue
        result, tuning = train_seed(trained, prepared, seed, device, say)
        best = best_seed(document["seeds"], metric)
        document["notes"] = list(tuning.whole.notes)
        if best is None or result.scores[DEV][metric] > document["seeds"][best]["scores"][DEV][metric]:
            with write_errors(output):
                save_model(tuning, prepared, output, settings)
        document["seeds"][str(seed)] = result.__dict__
        write_json(output / RUN_NAME, document)
        shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    return _finish(settings, prepared, document, without, say)


def check_model(settings: FinetuneSettings, task: Task, max_seq_length: int) -> None:
    """Raises SettingsError or CorpusError, before anything is deleted or written, where the checkpoint cannot be loaded, cannot
    train as ``settings.mode`` says, or cannot be adapted to ``settings.adapt``."""
    in_mode(load_model(settings.model, task).model, settings, task.family)
    if settings.adapt:
        check_adaptation(settings.model, settings.adapt, min(LONGEST, max_seq_length))


def train_without_adaptation(settings: FinetuneSettings, say: Say) -> FinetuneResult:
    """The same run on the checkpoint as it is, in a folder of its own: what the effect of adaptation is measured against."""
    folder = Path(settings.output) / WITHOUT_ADAPTATION
    say("Fine-tuning without adaptation, to compare with:")
    resume = settings.resume and read_run(folder) is not None
    return finetune(replace(settings, adapt=(), adapt_steps=None, output=str(folder), resume=resume, overwrite=False), say)


def adapted_model(settings: FinetuneSettings, prepared: PreparedTask, device: torch.device, say: Say) -> Path:
    """The folder of the checkpoint adapted to ``settings.adapt``. What a resumed run has there already is taken; where it was
    stopped before that, nothing depends on its corpus yet."""
    folder = Path(settings.output) / ADAPTED
    if not _is_adapted(Path(settings.output)):
        if settings.resume:
            say("The run was stopped before the checkpoint was adapted: that begins anew, with the corpus as it is now")
        length = min(LONGEST, prepared.max_seq_length)
        options = {"steps": settings.adapt_steps, "max_seq_length": length, "seed": settings.seeds[0], "dtype": settings.dtype}
        adapt(settings.model, settings.adapt, folder, **options, device=device, say=say)
    return folder


def _is_adapted(output: Path) -> bool:
    return (output / ADAPTED / ADAPTATION_NAME).is_file()


def task_of(settings: FinetuneSettings) -> Task:
    """The task that ``settings`` name, with their columns."""
    names = {"text": settings.text_column, "text_pair": settings.text_pair_column, "label": ",".join(settings.label_column) or None}
    task = task_for(settings.task)
    if task.family == "words":
        names = {"words": settings.text_column, "tags": names["label"]}
    # Another separator than the usual one: only a task whose texts have several labels in a cell has any.
    options = {} if settings.label_separator == FinetuneSettings.label_separator else {"label_separator": settings.label_separator}
    if options and getattr(task, "problem", None) != MULTI:
        raise SettingsError(f"--label-separator is for --task multi-label-classification, not for --task {task.name}")
    return replace(task, columns={field: name for field, name in names.items() if name is not None}, **options)


def sources_of(settings: FinetuneSettings) -> dict[str, Source]:
    """The splits; those of a task of GLUE as its download calls them, the diagnostic set beside MNLI included."""
    if is_glue_task(settings.task) and Path(settings.data).is_dir():
        found = glue_sources(find_glue_splits(glue_task(settings.task), Path(settings.data)))
        given = {"dev": settings.dev, "test": settings.test}
        return {**found, **{name: Source(path=Path(path)) for name, path in given.items() if path is not None}}
    return find_splits(settings.data, dev=settings.dev, test=settings.test)


def main_metric(settings: FinetuneSettings, task: Task) -> str:
    """What chooses the best checkpoint. Raises SettingsError for a score that the task has not."""
    if settings.metric is not None and settings.metric not in task.metric_names:
        raise SettingsError(f"--metric {settings.metric} is no score of {task.name}; it has {', '.join(task.metric_names)}")
    return settings.metric or task.main_metric


def train_seed(
    settings: FinetuneSettings,
    prepared: PreparedTask,
    seed: int,
    device: torch.device,
    say: Say,
    *,
    fast: bool = True,
    **changes: Any,
) -> tuple[SeedResult, Tuning]:
    """Trains one model and scores its best checkpoint; ``fast`` False: transformers' own model, on padded batches. ``changes``: to
    transformers' TrainingArguments."""
    set_seed(seed)
    loaded = load_model(settings.model, prepared.task, fast=fast)
    loaded.model.to(device)
    say(f"Seed {seed}: {type(loaded.model).__name__}, {'packed rows' if loaded.packed else 'padded batches'}, on {device}")
    for note in loaded.notes:
        say(f"  {note}")
    metric, family = main_metric(settings, prepared.task), prepared.task.family
    rows = {name: split.features.rows for name, split in prepared.splits.items()}
    tuning = prepare_mode(loaded, rows, settings, family=family, say=say)

    def score() -> dict[str, float]:
        dev = prepared.dev
        return prepared.task.scores(outputs_of(dev, tuning, prepared, settings), dev.features, dev.examples)

    checkpoints = Path(settings.output) / CHECKPOINTS / f"seed-{seed}"
    trainer = build_trainer(
        tuning.trained, tuning.rows[TRAIN], settings, seed, metric=metric, score=score, folder=checkpoints, say=say, **changes
    )
    newest = _resumable(checkpoints) if settings.resume else None
    started = time.perf_counter()
    with quiet_transformers():
        if newest is None or not trainer.finish_from(newest):
            trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    seconds = time.perf_counter() - started - trainer.aside_seconds
    state = trainer.state
    scored = [split for name, split in prepared.splits.items() if split.labelled and name != TRAIN]
    tuning = replace(tuning, outputs={split.name: outputs_of(split, tuning, prepared, settings) for split in scored})
    scores = {split.name: prepared.task.scores(tuning.outputs[split.name], split.features, split.examples) for split in scored}
    result = SeedResult(
        seed=seed,
        scores=scores,
        best_step=state.best_global_step or state.global_step,
        steps=state.global_step,
        epochs=float(state.epoch or 0),
        train_seconds=seconds,
        tokens_per_second=prepared.train.tokens * (float(state.epoch or 0) - trainer.start.epoch) / seconds,
        log=state.log_history,
    )
    return result, tuning


def outputs_of(split: Split, tuning: Tuning, prepared: PreparedTask, settings: FinetuneSettings) -> Outputs:
    """The logits of a split, of the model as it is."""
    rows = tuning.rows[split.name]
    return model_outputs(tuning.trained, rows, family=prepared.task.family, autocast=autocast_dtype(settings))


def _resumable(checkpoints: Path) -> Path | None:
    """The newest checkpoint that the Trainer finished writing."""
    finished = [path.parent for path in checkpoints.glob("checkpoint-*/trainer_state.json") if _is_json(path)]
    return max(finished, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_json(path: Path) -> bool:
    """Whether the Trainer came to the end of the last file that it writes."""
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except ValueError:
        return False


def save_model(tuning: Tuning, prepared: PreparedTask, output: Path, settings: FinetuneSettings) -> None:
    """Model, tokenizer, task and the predictions of every split but the training data, moved into ``output`` when all are there."""
    new = new_folder(output)
    for name, split in prepared.splits.items():
        if name != TRAIN:
            outputs = tuning.outputs[name] if name in tuning.outputs else outputs_of(split, tuning, prepared, settings)
            predictions = prepared.task.predictions(outputs, split.features, split.examples)
            write_jsonl(new / f"predictions_{name}.jsonl", split.examples.with_places(predictions))
    with quiet_transformers():
        final = tuning.finish(new)
        final.model.save_pretrained(new)
        save_tokenizer(final.tokenizer, new)
    save_task(prepared.task, prepared.max_seq_length, new)
    move_in(new, output)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    with whole_file(path) as beside, beside.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def best_seed(seeds: dict[str, Any], metric: str) -> str | None:
    return max(seeds, key=lambda seed: seeds[seed]["scores"][DEV][metric], default=None)


def summary(seeds: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """By split and metric: mean, std (of a sample; None for one seed) and the values of all seeds."""
    scores: dict[str, dict[str, dict[str, Any]]] = {}
    for split, metrics in seeds[0]["scores"].items():
        scores[split] = {}
        for name in metrics:
            values = [seed["scores"][split][name] for seed in seeds]
            spread = statistics.stdev(values) if len(values) > 1 else None
            scores[split][name] = {"mean": statistics.fmean(values), "std": spread, "values": values}
    return scores


def _finish(
    settings: FinetuneSettings, prepared: PreparedTask, document: dict[str, Any], without: FinetuneResult | None, say: Say
) -> FinetuneResult:
    metric = main_metric(settings, prepared.task)
    seeds = [document["seeds"][str(seed)] for seed in settings.seeds]
    adaptation = None
    if without is not None:
        adaptation = json.loads((Path(settings.output) / ADAPTED / ADAPTATION_NAME).read_text(encoding="utf-8"))
        adaptation["effect"] = effect(without.scores, summary(seeds), say)
    result = FinetuneResult(
        output=settings.output,
        task=prepared.task.name,
        main_metric=metric,
        best_seed=int(best_seed(document["seeds"], metric)),
        scores=summary(seeds),
        seeds=[{key: value for key, value in seed.items() if key != "log"} for seed in seeds],
        data=document["data"],
        notes=document["notes"],
        adaptation=adaptation,
    )
    write_json(Path(settings.output) / RUN_NAME, {**document, "results": result.to_dict()})
    write_report(settings, prepared, document["seeds"], result.to_dict(), say)
    for split, metrics in result.scores.items():
        say(f"{split}: " + ", ".join(_score_text(name, score) for name, score in metrics.items()))
    say(f"Model, tokenizer, predictions and scores: {settings.output}")
    return result


def _score_text(name: str, score: dict[str, Any]) -> str:
    return f"{name} {score['mean']:.4f}" + ("" if score["std"] is None else f" +- {score['std']:.4f}")


def _refuse_several_gpus(device: torch.device) -> None:
    """Raises SettingsError where transformers' Trainer would take all GPUs, whichever ``device`` is, and multiply batches by their
    number; torch.nn.DataParallel cannot divide packed rows, which would end the run when everything is read and training begins."""
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if count > 1:
        raise SettingsError(
            f"this process sees {count} GPUs, among which transformers' Trainer would divide every batch (torch.nn.DataParallel); "
            "fine-tuning takes one: make it the only visible one, as in CUDA_VISIBLE_DEVICES=0 fastbert finetune ... --device cuda"
        )


def _refuse_other_data(output: Path, run: dict[str, Any], data: dict[str, Any]) -> None:
    """Raises SettingsError for examples that are not those the run began with. Where no training has ended, nothing depends on the
    other splits than train and dev yet."""
    names = dict.fromkeys((*run["data"], *data)) if run["seeds"] else (TRAIN, DEV)
    changed = [name for name in names if run["data"].get(name, {}).get("fingerprint") != data.get(name, {}).get("fingerprint")]
    if changed:
        raise SettingsError(
            f"cannot resume {output}: the examples of {', '.join(changed)} are not those that the run began with; --overwrite "
            "starts it anew"
        )
