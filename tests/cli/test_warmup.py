"""``fastbert warmup``: refusals, kernels for a GPU that is not here, a second run that compiles nothing, and nothing forgotten."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastbert.cli.main import app
from fastbert.gpus import GPUS

from ..test_aot import pytestmark as needs_a_compiler
from ..test_aot import run_compiling


def warmup(*words: str, interpreted: bool = False):
    return CliRunner().invoke(app, ["warmup", *words], env={"TRITON_INTERPRET": "1" if interpreted else "0"})


def test_help_names_the_targets():
    done = warmup("--help")
    assert done.exit_code == 0 and all(name in done.stdout for name in GPUS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_target_must_be_named():
    done = warmup("--json")
    assert done.exit_code == 2
    assert "--target sm_90" in json.loads(done.stdout.splitlines()[-1])["error"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--target sm_90 sm_95", "--target sm_95 is not known; known are sm_80"),
        ("--target sm_90 --dtype half", "--dtype half is not known; known are bfloat16"),
        ("--target sm_90 --jobs 0", "--jobs"),
        ("--target sm_90 --max-seq-length 0", "--max-seq-length"),
    ],
)
def test_wrong_usage(words, message):
    done = warmup(*words.split())
    assert done.exit_code == 2 and message in done.stderr


def test_an_interpreter_compiles_nothing():
    done = warmup("--target", "sm_90", interpreted=True)
    assert done.exit_code == 2 and "TRITON_INTERPRET=1" in done.stderr


def test_triton_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = warmup("--target", "sm_90")
    assert done.exit_code == 1 and "pip install triton" in done.stderr


@needs_a_compiler
def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file/cache"))
    done = warmup("--target", "sm_90", "--model", "tiny")
    assert done.exit_code == 1 and "file/cache cannot be made (Not a directory); TRITON_CACHE_DIR names another" in done.stderr


def test_a_checkpoint_of_another_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    done = warmup("--target", "sm_90", "--model", str(tmp_path))
    assert done.exit_code == 1 and "'gpt2'" in done.stderr


CONFIG = {
    "model_type": "bert",
    "num_hidden_layers": 1,
    "hidden_size": 48,
    "num_attention_heads": 2,
    "intermediate_size": 80,
    "vocab_size": 101,
    "max_position_embeddings": 40,
}


@pytest.fixture
def checkpoint(tmp_path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return str(tmp_path)


@needs_a_compiler
def test_the_second_run_finds_everything(tmp_path):
    cache = tmp_path / "cache"
    command = ["-m", "fastbert.cli", "warmup", "--model", "tiny", "--max-seq-length", "16", "--target", "sm_90"]
    command += ["--inference", "--json"]
    first, files = last_line(run_compiling([*command, "--jobs", "1"], cache)), files_of(cache)
    assert first["kernels"] >= 4 and first["cache_folder"] == str(cache)
    assert (first["compiled"], first["found"], first["failures"]) == (first["kernels"], 0, [])
    assert len([path for path in files if path.suffix == ".cubin"]) == first["kernels"]

    second = last_line(run_compiling([*command, "--jobs", "2"], cache))
    assert (second["kernels"], second["compiled"], second["found"]) == (first["kernels"], 0, first["kernels"])
    assert files_of(cache) == files


# Every op of the model goes to its Triton launcher, as it does on a GPU; what the launches would write stays uninitialised.
TRAINING_STEP = """
import json, sys
import torch, fastbert
from fastbert.cli.warmup import model_shape
from fastbert.ops import backends, launches, offline

shape, target = model_shape(sys.argv[1]), offline.target_of("sm_90")
backends.AUTO_ORDER["cpu"], backends._triton_interprets = backends.AUTO_ORDER["cuda"], lambda: True
backends.select.cache_clear()
config = fastbert.BertConfig.from_pretrained(sys.argv[1])
model = fastbert.BertForPreTraining(config).to(torch.bfloat16)

def batch(rows, length):
    torch.manual_seed(0)
    ids = torch.randint(1, config.vocab_size, (rows, length))
    mask = torch.arange(length) < torch.arange(length, length - rows, -1).clamp(min=1)[:, None]
    return {"input_ids": ids, "attention_mask": mask, "labels": ids, "next_sentence_label": torch.zeros(rows, dtype=torch.int64)}

def steps():
    for rows, length in ((1, 1), (4, 16), (3, 23), (16, 40)):
        model.train()(**batch(rows, length)).loss.backward()
        with torch.no_grad():
            model.eval()(**batch(rows, length)).prediction_logits

launched = offline.launched_by(steps, target)
cases = launches.model_cases(shape, ["bfloat16"], 512, inference=False)
warm = {(kernel.name, kernel.key) for case in cases for kernel in offline.kernels_of(case, target)}
print(json.dumps({"launched": len(launched), "cold": [name for name, key in launched if (name, key) not in warm]}))
"""


@needs_a_compiler
def test_training_and_evaluation_launch_nothing_else(checkpoint, tmp_path):
    done = run_compiling(["-c", TRAINING_STEP, checkpoint], tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["launched"] >= 12 and found["cold"] == []
    assert not files_of(tmp_path / "cache"), "listing compiles nothing"


def last_line(done) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def files_of(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}
