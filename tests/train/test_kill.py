"""A run that SIGKILL ended at any moment and that ``--resume`` went on with is the run that was not, bit for bit."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from fastbert.train.checkpoint import checkpoint_folders, unfinished_folders
from fastbert.train.run_folder import RUN_NAME
from fastbert.train.settings import PretrainSettings

from .killed_run import Ended, Moment, run
from .runs import rows_without_speed

# Where a moment lies, by what is done to which file; from each some are drawn.
PLACES: dict[str, Callable[[Moment], bool]] = {
    "a checkpoint is written": lambda m: m.path.startswith(".unfinished-checkpoint") and m.event == "open",
    "it gets its name": lambda m: m.path.startswith(".unfinished-checkpoint") and m.event == "os.rename",
    "an old one goes": lambda m: m.path.startswith("checkpoint") and m.event == "os.rename",
    "what is left of it goes": lambda m: "deleted-" in m.path,
    "the final model is written": lambda m: m.path.startswith(".unfinished-files"),
    "the results are written": lambda m: m.path in (RUN_NAME, ".run.json.new"),
}
DRAWN = [
    (place, draw)
    for place in PLACES
    for draw in range(2 if place in ("a checkpoint is written", "the final model is written") else 1)
]


@pytest.fixture(scope="module")
def undisturbed(toy_corpus, tmp_path_factory) -> tuple[PretrainSettings, Ended]:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    settings = killed_settings(toy_corpus, output)
    ended = run(settings)
    assert ended.exit_code == 0, ended.text
    return settings, ended


def killed_settings(toy_corpus: Path, output: Path) -> PretrainSettings:
    return PretrainSettings(
        output=str(output), corpus=(str(toy_corpus),), vocab_size=200, model="tiny", num_hidden_layers=1, hidden_size=32,
        num_attention_heads=2, max_seq_length=32, tokens_per_batch=256, steps=12, log_steps=3, save_steps=2, keep_checkpoints=2,
        learning_rate=5e-3, held_out_fraction=0.2, device="cpu",
    )  # fmt: skip


def assert_ends_as(undisturbed: PretrainSettings, settings: PretrainSettings) -> str:
    """Goes on with the run of ``settings``, as its user would, and compares; returns what was printed."""
    output = Path(settings.output)
    if checkpoint_folders(output):
        ended = run(settings, words=f"fastbert pretrain --output {output} --resume")
    else:
        ended = run(settings, words=settings.command() + (" --overwrite" if (output / RUN_NAME).is_file() else ""))
    assert ended.exit_code == 0, ended.text
    weights = [(Path(folder) / "model.safetensors").read_bytes() for folder in (undisturbed.output, settings.output)]
    assert weights[0] == weights[1]
    assert rows_without_speed(undisturbed.output) == rows_without_speed(settings.output)
    names = [sorted(path.name for path in Path(folder).iterdir()) for folder in (undisturbed.output, settings.output)]
    assert names[0] == names[1]
    return ended.text


@pytest.mark.parametrize(("place", "draw"), DRAWN, ids=lambda value: str(value).replace(" ", "-"))
def test_killed_at_a_file(undisturbed, toy_corpus, tmp_path, place, draw):
    straight, ended = undisturbed
    moments = [moment for moment in ended.moments if PLACES[place](moment)]
    moment = random.Random(f"{place} {draw}").choice(moments)
    settings = killed_settings(toy_corpus, tmp_path / "run")
    assert run(settings, kill=moment).exit_code == -signal.SIGKILL, moment
    assert_ends_as(straight, settings)


@pytest.mark.parametrize("draw", range(3))
def test_killed_at_a_time(undisturbed, toy_corpus, tmp_path, draw):
    """During steps, or whatever the process does by then."""
    straight, ended = undisturbed
    settings = killed_settings(toy_corpus, tmp_path / "run")
    run(settings, kill_after=random.Random(draw).uniform(0, 0.25))
    assert_ends_as(straight, settings)


def test_killed_twice(undisturbed, toy_corpus, tmp_path):
    """The second time while the continued run writes a checkpoint that the first one had begun."""
    straight, _ = undisturbed
    settings = killed_settings(toy_corpus, tmp_path / "run")
    output = Path(settings.output)
    again = Moment("open", ".unfinished-checkpoint-6/manifest.json", 1)
    assert run(settings, kill=again).exit_code == -signal.SIGKILL
    assert [folder.name for folder in unfinished_folders(output)] == [".unfinished-checkpoint-6"]
    words = f"fastbert pretrain --output {output} --resume"
    assert run(settings, kill=again, words=words).exit_code == -signal.SIGKILL
    assert [folder.name for folder in checkpoint_folders(output)] == ["checkpoint-4", "checkpoint-2"]
    assert "Resuming" in assert_ends_as(straight, settings)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "name", "said"),
    [
        (truncate, "model.safetensors", "model.safetensors has"),
        (flip_a_bit, "optimizer.safetensors", "optimizer.safetensors is not what was written"),
        (Path.unlink, "rng.safetensors", "rng.safetensors is missing"),
    ],
)
def test_a_broken_checkpoint_is_said_and_the_one_before_taken(undisturbed, toy_corpus, tmp_path, damage, name, said):
    straight, _ = undisturbed
    settings = killed_settings(toy_corpus, tmp_path / "run")
    assert run(settings, kill=Moment("open", ".unfinished-checkpoint-8/manifest.json", 1)).exit_code == -signal.SIGKILL
    damage(Path(settings.output) / "checkpoint-6" / name)
    text = assert_ends_as(straight, settings)
    assert f"checkpoint-6 is broken and left out: {said}" in text and "after step 4" in text
