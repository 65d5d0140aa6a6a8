"""``fastbert glue``: a model fine-tuned on each task of GLUE with each seed, scores beside published ones, files for GLUE's server.

read and check all files -> :func:`fastbert.finetune.run.finetune` for each task and seed, each into a folder of its own, MNLI
first -> ``run.json`` with all scores, ``report.md``, ``scores.png``, and ``submission.zip`` by the seed that is best on dev. These
are made of what lies in the folders of the tasks and seeds, so a run that was stopped goes on from there and makes them again.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastbert.data.errors import DataError
from fastbert.data.sources import Source
from fastbert.finetune.folder import RUN_NAME, check_folder, delete_folder, read_run
from fastbert.finetune.modes import check_packages, in_mode
from fastbert.finetune.prepared import drawn
from fastbert.finetune.run import finetune
from fastbert.runs import Say
from fastbert.runs.errors import SettingsError
from fastbert.runs.folder import check_outside, write_json
from fastbert.runs.full_disk import write_errors
from fastbert.runs.model import pick_device
from fastbert.runs.one_writer import one_writer
from fastbert.runs.torchrun import refuse_several_processes
from fastbert.runs.whole_file import whole_file
from fastbert.tasks.glue_data import (
    GlueSplits,
    find_folders,
    find_glue_splits,
    finetune_names,
    glue_text_task,
    read_glue,
    read_index,
)
from fastbert.tasks.glue_tasks import GLUE_TASKS, SUBMISSION_NAMES, glue_task
from fastbert.tasks.model import check_length, load_config, load_model, load_task_tokenizer, longest_sequence
from fastbert.tasks.predictor import Predictor

from .document import Results, glue_document
from .picture import plot_scores
from .report import markdown_report, terminal_table
from .settings import GlueSettings
from .submission import ZIP_NAME, submission_text, write_submission, zip_submission

REPORT_NAME, PICTURE_NAME, SUBMISSION_FOLDER = "report.md", "scores.png", "submission"
# The tasks that start from the MNLI model where there is one (Phang et al. 2018, https://arxiv.org/abs/1811.01088; after them
# RoBERTa and ALBERT). With --mode head its encoder is the one that all start from.
_FROM_MNLI = ("mrpc", "stsb", "rte")

# What a run needs at its end, and the extra that brings it: to be missed at its beginning.
_NEEDED = {"sklearn": "eval", "scipy": "eval", "matplotlib": "train"}


@one_writer
def glue(settings: GlueSettings, say: Say = print) -> dict[str, Any]:
    """Runs, or with ``settings.resume`` continues, a GLUE run; ``say`` gets lines for people.

    Returns the document of ``run.json`` (:func:`fastbert.glue.document.glue_document`). It tells of all tasks and seeds in
    the output folder, those of the runs that this one continues among them.

    Raises SettingsError for what cannot be done as asked, and DataError for bad files and where no task can be run, before any
    training.
    """
    refuse_several_processes(settings.command_name)
    _check_installed()
    check_packages(settings.mode)
    output = Path(settings.output)
    run = check_folder(output, settings.command_name, resume=settings.resume, overwrite=settings.overwrite)
    if run is not None:
        settings.refuse_changes(settings.output, settings.to_dict(), run["settings"])
    if settings.overwrite:
        check_outside(output, (settings.data, settings.model))
    _check_model(settings)
    results = _finished(output) if settings.resume else {}
    asked = set(settings.tasks or (task.name for task in GLUE_TASKS))
    found, left_out, notes = _read_all(Path(settings.data), asked | set(results))
    results = {name: by_seed for name, by_seed in results.items() if name in found}
    _refuse_other_data(settings, found, results)
    for line in [f"{glue_task(name).title} is left out: {reason}" for name, reason in left_out.items()]:
        say(line)
    for line in [note for of_task in notes.values() for note in of_task]:
        say(line)
    if settings.overwrite:
        delete_folder(output)
    with write_errors(output):
        output.mkdir(parents=True, exist_ok=True)

    def document(submission: dict[str, Any]) -> dict[str, Any]:
        made = glue_document(settings, results, notes=notes, left_out=left_out, submission=submission)
        with write_errors(output):
            write_json(output / RUN_NAME, made)
        return made

    current = document(no_submission("the run has not come to its end"))
    pairs = [(name, seed) for name in found if name in asked for seed in settings.seeds]
    for number, (name, seed) in enumerate(pairs, 1):
        say(f"{glue_task(name).title}, seed {seed} ({number} of {len(pairs)})")
        if seed in results.get(name, {}):
            say("  done before")
            continue
        start = _start(settings, name, current["tasks"].get("mnli"))
        results.setdefault(name, {})[seed] = _finetune(settings, found[name], seed, start, lambda line: say(f"  {line}"))
        current = document(current["submission"])
    current = document(_submit(settings, found, results, current))
    write_report(current, output)
    say(terminal_table(current))
    say(f"Report, picture, models and predictions: {output}")
    return current


def write_report(document: dict[str, Any], output: Path) -> None:
    """``report.md`` and ``scores.png`` of a run's document, in its folder."""
    plot_scores(document, output / PICTURE_NAME)
    report = markdown_report(document, PICTURE_NAME)
    with whole_file(output / REPORT_NAME) as beside:
        beside.write_text(report, encoding="utf-8", errors="backslashreplace")


def pair_folder(output: Path, name: str, seed: int) -> Path:
    """Where the model of a task and seed lies, as ``fastbert predict`` loads it."""
    return output / name / f"seed-{seed}"


def _check_installed() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        extras = ",".join(sorted({_NEEDED[name] for name in missing}))
        raise SettingsError(f"fastbert glue needs {', '.join(missing)}: pip install 'fastbert[{extras}]'")


def _check_model(settings: GlueSettings) -> None:
    """Raises SettingsError for a model, a mode, a length or a device that no task could be trained with."""
    pick_device(settings.device)
    config, task = load_config(settings.model), glue_text_task("cola")
    tokenizer = load_task_tokenizer(settings.model, config, task)
    check_length(settings.max_seq_length, longest_sequence(config, tokenizer), settings.model)
    pair = settings.of_pair(glue_task("cola"), 0, model=settings.model, data=Path(settings.data), output=Path(settings.output))
    in_mode(load_model(settings.model, task).model, pair, task.family)


def _finished(output: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """What fine-tuning wrote for each task and seed that it has finished."""
    results: dict[str, dict[int, dict[str, Any]]] = {}
    for task in GLUE_TASKS:
        for folder in (output / task.name).glob("seed-*"):
            if not folder.name.removeprefix("seed-").isdecimal():  # somebody's copy
                continue
            run = read_run(folder)
            if run is not None and "results" in run:
                results.setdefault(task.name, {})[int(folder.name.removeprefix("seed-"))] = run
    return results


def _read_all(root: Path, asked: set[str]) -> tuple[dict[str, GlueSplits], dict[str, str], dict[str, list[str]]]:
    """The files of the tasks that can be run, MNLI's first; the others with the reason; notes on the files of each.

    Everything is read once, so that a bad file ends a run before it begins. Raises DataError for it, and where no task is left.
    """
    folders = find_folders(root)
    found: dict[str, GlueSplits] = {}
    left_out: dict[str, str] = {}
    notes: dict[str, list[str]] = {}
    for task in sorted(GLUE_TASKS, key=lambda task: task.name != "mnli"):
        if task.name not in asked:
            continue
        if task.name not in folders:
            left_out[task.name] = f"{root} holds no folder {task.title}"
            continue
        splits = find_glue_splits(task, folders[task.name])
        if splits.why_not is not None:
            left_out[task.name] = splits.why_not
            continue
        found[task.name] = splits
        notes[task.name] = [*splits.notes, *(f"{task.title}: {missing}" for missing in splits.missing.values())]
        for split, path in splits.files.items():
            notes[task.name] += read_glue(task, Source(path=path)).notes
            if split in task.submissions:
                read_index(task, Source(path=path))
    if not found:
        reasons = "; ".join(f"{glue_task(name).title}: {reason}" for name, reason in left_out.items())
        raise DataError(f"{root}: no task can be run: {reasons}")
    return found, left_out, notes


def _refuse_other_data(settings: GlueSettings, found: dict[str, GlueSplits], results: Results) -> None:
    """Raises SettingsError where a task's train or dev examples are not those of its seeds that are done: the scores of seeds make
    no mean then."""
    for name, by_seed in results.items():
        task, splits = glue_task(name), found[name]
        for split in ("train", *task.dev):
            now = None
            if split in splits.files:
                examples = glue_text_task(name).read(Source(path=splits.files[split]))
                now = (examples if settings.limit is None else drawn(examples, settings.limit)).fingerprint()
            changed = [seed for seed, run in by_seed.items() if _fingerprint(run, finetune_names(task)[split]) != now]
            if changed:
                path = splits.files.get(split, splits.folder / f"{split}.tsv")
                raise SettingsError(
                    f"cannot resume {settings.output}: {task.title}: the examples of {path} are not those that seed "
                    f"{min(changed)} began with; put the old file back, or start anew with --overwrite"
                )


def _fingerprint(run: Mapping[str, Any], split: str) -> str | None:
    """Of the examples that a fine-tuning had in a split; None where it had no such split."""
    return run["data"].get(split, {}).get("fingerprint")


def _start(settings: GlueSettings, name: str, mnli: dict[str, Any] | None) -> str:
    """The checkpoint that a task starts from; ``mnli``: the entry of MNLI, where it was trained."""
    if name in _FROM_MNLI and mnli is not None and settings.mode != "head":
        return str(pair_folder(Path(settings.output), "mnli", mnli["best_seed"]))
    return settings.model


def _finetune(settings: GlueSettings, splits: GlueSplits, seed: int, start: str, say: Say) -> dict[str, Any]:
    """Fine-tunes one task with one seed, from where an earlier run stopped; returns the document in its folder."""
    folder = pair_folder(Path(settings.output), splits.task.name, seed)
    pair = settings.of_pair(splits.task, seed, model=start, data=splits.folder, output=folder)
    before = read_run(folder)
    if before is not None and before["settings"]["model"] == start:
        pair = dataclasses.replace(pair, resume=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finetune(pair, say)
    return read_run(folder)


def _submit(settings: GlueSettings, found: dict[str, GlueSplits], results: Results, document: dict[str, Any]) -> dict[str, Any]:
    """Writes the submission's files and zip; returns ``files``, ``missing`` (what GLUE's server wants besides) and ``zip``."""
    if settings.limit is not None:
        return no_submission("--limit cuts the test sets")
    output = Path(settings.output)
    files = []
    for name, entry in document["tasks"].items():
        task, folder = glue_task(name), pair_folder(output, name, entry["best_seed"])
        names = finetune_names(task)
        for split, file_name in task.submissions.items():
            if split in found[name].files:
                source = Source(path=found[name].files[split])
                index = read_index(task, source)
                examples = glue_text_task(name).read(source)
                known = examples.fingerprint() == _fingerprint(results[name][entry["best_seed"]], names[split])
                predictions = _read_predictions(folder / f"predictions_{names[split]}.jsonl") if known else []
                if len(predictions) != len(index):  # the file is a new one since the model was trained
                    predictor = Predictor.from_pretrained(folder, device=settings.device)
                    predictions = [_answer(row) for row in predictor.predict(examples)]
                write_submission(output / SUBMISSION_FOLDER, file_name, submission_text(task, index, predictions))
                files.append(file_name)
    if not files:
        return no_submission("no task that was run has a test file")
    missing = zip_submission(output / SUBMISSION_FOLDER, files, output / ZIP_NAME)
    return {"files": files, "missing": missing, "zip": ZIP_NAME, "why_none": None}


def no_submission(reason: str) -> dict[str, Any]:
    return {"files": [], "missing": list(SUBMISSION_NAMES), "zip": None, "why_none": reason}


def _read_predictions(path: Path) -> list[str | float]:
    """Label or number of each row, out of what fine-tuning wrote; none where it wrote nothing, or the file is damaged."""
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8") as file:
            return [_answer(json.loads(line)) for line in file]
    except (ValueError, KeyError, TypeError):
        return []


def _answer(prediction: dict[str, Any]) -> str | float:
    return prediction["label"] if "label" in prediction else prediction["score"]
