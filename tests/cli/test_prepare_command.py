"""``fastbert prepare`` from the command line: exit codes, JSON, Ctrl-C, going on with --resume alone, --verify."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastbert.cli.main import app
from fastbert.data.shards import open_shards
from fastbert.data.tokenizer import train_wordpiece

from ..data.helpers import story


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_wordpiece(["the quiet sea before dawn", "a tall ship near the pier"] * 3, 200).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def corpora(tmp_path: Path) -> list[str]:
    """Two files of 30 documents."""
    paths = []
    for name, first in (("a.txt", 0), ("b.txt", 30)):
        documents = ["\n".join(story(number, paragraphs=3).paragraphs) for number in range(first, first + 30)]
        (tmp_path / name).write_text("\n\n".join(documents), encoding="utf-8")
        paths.append(str(tmp_path / name))
    return paths


def prepare(*words: str):
    return CliRunner().invoke(app, ["prepare", *words])


def last_line(stdout: str) -> dict:
    return json.loads(stdout.splitlines()[-1])


def test_a_run_its_report_and_the_refusal_to_write_over_it(corpora: list[str], tokenizer: str, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    words = ["--corpus", *corpora, "--tokenizer", tokenizer, "--output", output, "--tokens-per-shard", "1000", "--workers", "1"]
    run = prepare(*words, "--held-out-fraction", "0.2", "--json")
    assert run.exit_code == 0, run.output
    assert len(run.stdout.splitlines()) == 1
    document = last_line(run.stdout)
    shards = open_shards(output)
    assert (document["command"], document["exit_code"], document["documents"]) == ("prepare", 0, 60)
    assert document["tokens"] == document["new_tokens"] == shards.num_tokens + shards.held_out.num_tokens
    assert document["shards"] == len(shards) + len(shards.held_out) and document["duplicates"] == 0
    assert (document["fingerprint"], document["tokenizer_fingerprint"]) == (shards.fingerprint, shards.tokenizer_fingerprint)
    assert document["bytes"] == sum(path.stat().st_size for path in Path(output).iterdir())
    assert "60 documents" in run.stderr and "0 duplicates dropped" in run.stderr

    again = prepare(*words)
    assert again.exit_code == 2 and "--overwrite makes it anew" in again.stderr
    assert prepare(*words, "--overwrite").exit_code == 0


def test_verify_reads_every_shard(corpora: list[str], tokenizer: str, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    assert prepare("--corpus", *corpora, "--tokenizer", tokenizer, "--output", output, "--workers", "1").exit_code == 0
    run = prepare("--output", output, "--verify", "--json")
    assert run.exit_code == 0 and last_line(run.stdout)["fingerprint"] == open_shards(output).fingerprint
    path = Path(output) / "train-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    run = prepare("--output", output, "--verify")
    assert run.exit_code == 1 and "train-00000.safetensors: this shard was changed" in run.stderr
    assert prepare("--output", output, "--verify", "--workers", "2").exit_code == 2


def test_wrong_usage_is_exit_code_2_and_bad_data_exit_code_1(corpora: list[str], tokenizer: str, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    for words, message in (
        ([], "--corpus"),
        (["--corpus", *corpora, "--held-out-fraction", "2"], "--held-out-fraction is 2.0"),
        (["--resume"], "there is nothing to resume"),
    ):
        run = prepare("--output", output, *words)
        assert run.exit_code == 2 and message in run.stderr
    run = prepare("--corpus", str(tmp_path / "none.txt"), "--output", output)
    assert run.exit_code == 1 and "none.txt: no such file or folder" in run.stderr
    assert not Path(output).exists()


def test_bad_text_says_how_to_go_on_without_it(corpora: list[str], tokenizer: str, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    Path(corpora[1]).write_bytes(Path(corpora[1]).read_bytes() + b"\n\nA bad \xff byte.")
    run = prepare("--corpus", *corpora, "--tokenizer", tokenizer, "--output", output, "--tokens-per-shard", "500", "--workers", "1")
    assert run.exit_code == 1
    assert "b.txt, line " in run.stderr and "not UTF-8 (byte 0xff" in run.stderr
    assert f"fastbert prepare --output {output} --resume --skip-bad-text" in run.stderr
    run = prepare("--output", output, "--resume", "--skip-bad-text", "--json")
    assert run.exit_code == 0, run.stderr
    document = last_line(run.stdout)
    assert (document["bad_text"], document["documents"]) == (1, 60) and document["new_tokens"] < document["tokens"]


def test_ctrl_c_says_how_to_go_on(corpora: list[str], tokenizer: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = ["--corpus", *corpora, "--tokenizer", tokenizer, "--output", str(output), "--tokens-per-shard", "500", "--json"]
    script = (
        "import fastbert.prepare.workers as w, time\n"
        "original = w.encode_documents\n"
        "def slow(*arguments):\n"
        "    time.sleep(0.1)\n"
        "    return original(*arguments)\n"
        "w.encode_documents = slow\n"
        "from fastbert.cli.main import main\n"
        "main()"
    )
    command = [sys.executable, "-c", script, "prepare", *words, "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (output / "train-00000.safetensors").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert last_line(stdout)["exit_code"] == 130
    assert f"interrupted; the finished shards are in {output}" in stderr and "--resume" in stderr
    run = prepare("--output", str(output), "--resume", "--json")
    assert run.exit_code == 0, run.stderr
    assert last_line(run.stdout)["documents"] == 60
