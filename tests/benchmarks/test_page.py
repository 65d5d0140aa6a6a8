"""docs/performance.md, its machines' pages and pictures and README.md's tables are what benchmarks/results gives: no figure is
edited by hand."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from benchmarks.reports import page, readme
from benchmarks.reports.documents import ReportError
from benchmarks.reports.page import Places

from . import toy_documents as toys


def test_the_page_is_what_the_results_give():
    """Where this fails: python -m benchmarks.reports.page."""
    places = Places()
    assert list(page.check(page.made(places), places)) == []


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    """A repository of two machines, with its page."""
    repository = tmp_path_factory.mktemp("repository")
    places = Places(repository, repository / "benchmarks" / "results")
    results = {
        readme.MACHINE: [toys.inference(("32 x 128", "1 x 32")), toys.ops()],
        "xeon": [toys.earliest_inference(), {"benchmark": "embed", "command": "python -m benchmarks.embed"}],
        "empty": [{"benchmark": "embed", "command": "python"}],
    }
    for machine, documents in results.items():
        (places.results / machine).mkdir(parents=True)
        for document in documents:
            (places.results / machine / f"{document['benchmark']}.json").write_text(json.dumps(document))
    places.readme.write_text("Speed:\n<!-- from benchmarks/results: inference -->\nold\n<!-- end -->\nrest\n")
    page.write(page.made(places), places)
    return places


@pytest.fixture
def places(made_once, tmp_path):
    """A copy of it."""
    shutil.copytree(made_once.repository, tmp_path / "copy")
    return Places(tmp_path / "copy", tmp_path / "copy" / "benchmarks" / "results")


def differences(places: Places) -> list[str]:
    return list(page.check(page.made(places), places))


def test_what_was_written_is_up_to_date(places):
    assert differences(places) == []
    pictures = {path.name for path in places.machines.glob("*.png")}
    assert f"{readme.MACHINE}-inference-ratios.png" in pictures and "xeon-inference-ratios.png" in pictures
    text = "".join(path.read_text() for path in places.machines.glob("*.md"))
    assert {f"]({name})" in text for name in pictures} == {True}
    files = [places.page, places.readme, *places.machines.glob("*.md")]
    before = [path.read_bytes() for path in files]
    page.write(page.made(places), places)
    assert [path.read_bytes() for path in files] == before


def test_what_the_pages_have(places):
    text = places.page.read_text()
    for heading in ("## How to read this", "## When fastbert does not help", "## Measure it"):
        assert f"\n{heading}" in text
    link = f"[{readme.MACHINE}](performance/{readme.MACHINE}.md)"
    assert f"| {link} | inference, bert-base | 32 x 128 | 4.00x (3.60-4.40) | 3.75x (3.38-4.12) | 6.67x" in text
    assert {path.name for path in places.machines.glob("*.md")} == {f"{readme.MACHINE}.md", "xeon.md"}
    machine = (places.machines / f"{readme.MACHINE}.md").read_text()
    assert f"[inference.json](../../benchmarks/results/{readme.MACHINE}/inference.json). Made by `fastbert bench" in machine
    assert "| **fastbert native** | backward |" in machine and "| linear | 75.0 | 75.0 | 50.0 | 1.50 |" in machine
    other = "[embed.json](../../benchmarks/results/xeon/embed.json) | `python -m benchmarks.embed` |"
    assert other in (places.machines / "xeon.md").read_text()


def test_documents_of_one_suite_are_told_apart(places):
    document = toys.inference(("32 x 128", "1 x 32"))
    (places.results / readme.MACHINE / "inference-by-length.json").write_text(json.dumps(document))
    made = page.made(places)
    for name in ("inference, bert-base", "inference, bert-base (inference-by-length)"):
        assert f"| {name} | 32 x 128 |" in made.text and f"\n## {name}\n" in made.machines[f"{readme.MACHINE}.md"]


def test_when_it_does_not_help_comes_from_the_results(places):
    section = places.page.read_text().partition("## When fastbert does not help")[2].partition("\n## ")[0]
    assert f"| {readme.MACHINE} | inference | base | 1 x 32 | fastbert int8 | 60.0 | OpenVINO int8 | 50.0 |" in section
    assert "on batches of models (2)" in section and "| xeon |" not in section
    assert "| add_layer_norm 8 rows, 64, dropout 0.1, bfloat16 | backward | torch eager | 0.3 | 0.80x (0.72-0.88) |" in section
    assert "GPUs: not measured yet" in section
    document = toys.finetune()
    document["machine"] = {**toys.MACHINE, "gpu": "Abacus 100"}
    (places.results / "xeon" / "finetune.json").write_text(json.dumps(document))
    assert "not measured yet" not in page.made(places).text
    for suite in ("inference", "ops"):
        (places.results / readme.MACHINE / f"{suite}.json").unlink()
    places.readme.write_text("no tables")
    assert "Of the batches of models that were measured: none." in page.made(places).text


@pytest.mark.parametrize(
    ("file", "figure"),
    [
        ("docs/performance.md", "4.00x (3.60-4.40)"),
        (f"docs/performance/{readme.MACHINE}.md", "4.00x (3.60-4.40)"),
        ("README.md", "400 / 300"),
    ],
)
def test_a_number_edited_by_hand_is_found(places, file, figure):
    path = places.repository / file
    text = path.read_text()
    assert figure in text
    path.write_text(text.replace(figure, "9.99x", 1))
    found = differences(places)
    assert found[0].startswith("--- ") and any("9.99x" in line for line in found) and any(figure in line for line in found)


def test_other_results_are_found_in_text_and_pictures(places):
    document = toys.inference(("32 x 128", "1 x 32"))
    for ratio in document["results"]["1 x 32"]["ratios"]["fastbert float32"].values():
        ratio["median"] *= 1.001
    (places.results / readme.MACHINE / "inference.json").write_text(json.dumps(document))
    # Too little for the tables, not for the pictures.
    names = (f"docs/performance/{readme.MACHINE}-inference-{plot}.png" for plot in ("ratios", "roofline", "memory"))
    assert differences(places) == [f"{name} shows other figures than benchmarks/results has" for name in names]


def test_files_that_are_missing_or_left_over_are_found(places):
    mine = places.machines / "xeon-inference-ratios.png"
    shutil.copy(mine, places.machines / "vax-inference-ratios.png")
    mine.unlink()
    (places.machines / "vax.md").touch()
    assert differences(places) == [
        "docs/performance/xeon-inference-ratios.png is missing",
        "docs/performance/vax-inference-ratios.png belongs to no result",
        "docs/performance/vax.md belongs to no result",
    ]
    page.write(page.made(places), places)
    assert differences(places) == []


def test_the_command(places, monkeypatch, capsys):
    monkeypatch.setattr(page, "Places", lambda: places)
    places.page.write_text("mine")
    monkeypatch.setattr(sys, "argv", ["page", "--check"])
    with pytest.raises(SystemExit) as end:
        page.main()
    assert end.value.code == 1 and "+# Performance" in capsys.readouterr().out and places.page.read_text() == "mine"
    monkeypatch.setattr(sys, "argv", ["page"])
    page.main()
    monkeypatch.setattr(sys, "argv", ["page", "--check"])
    with pytest.raises(SystemExit) as end:
        page.main()
    assert end.value.code == 0 and "are what the results give" in capsys.readouterr().out


def test_readmes_tables():
    documents = {"inference": toys.inference(("32 x 128", "1 x 32")), "finetune": toys.finetune(), "pretrain": toys.pretrain()}
    inference, training = (f"<!-- from benchmarks/results: {name} -->\nold\n<!-- end -->\n" for name in ("inference", "training"))
    text, by_machine = f"a\n{inference}b\n{training}", {readme.MACHINE: documents}
    assert readme.rendered(text, by_machine).splitlines() == [
        "a",
        "<!-- from benchmarks/results: inference -->",
        "",
        "| | 32 x 128, no padding | 1 x 32 |",
        "|---|---|---|",
        "| transformers 5.23 (sdpa), float32 / bfloat16 | 400 / 300 | 400 / 300 |",
        "| ONNX Runtime, float32 | 200 | 200 |",
        "| OpenVINO, bfloat16 / int8 | 150 / 50.0 | 150 / 50.0 |",
        "| **fastbert**, float32 / bfloat16 / int8 | **100 / 80.0 / 60.0** | **100 / 80.0 / 60.0** |",
        "| float32 against transformers, share of the matmul rate | **4.0x**, 10% | **4.0x**, 10% |",
        "",
        "<!-- end -->",
        "b",
        "<!-- from benchmarks/results: training -->",
        "",
        "| bert-base | transformers | padded to the longest, oneDNN | fastbert | ratio |",
        "|---|---|---|---|---|",
        "| classification, 32 of MNLI's lengths (transformers: padded to 128), float32 "
        "| 800, 0.8 GB | 400, 0.4 GB | **200**, 0.2 GB | **4.0x** |",
        "| the same, bfloat16 autocast | 800, 0.8 GB | 400, 0.4 GB | **200**, 0.2 GB | **4.0x** |",
        "| MLM + NSP, 16 x 128, no padding, float32 | 800, 0.8 GB | 400, 0.4 GB | **200**, 0.2 GB | **4.0x** |",
        "| the same, bfloat16 autocast | 800, 0.8 GB | 400, 0.4 GB | **200**, 0.2 GB | **4.0x** |",
        "",
        "<!-- end -->",
    ]
    assert readme.rendered(readme.rendered(text, by_machine), by_machine) == readme.rendered(text, by_machine)
    assert readme.rendered("no tables", {}) == "no tables"


def test_readmes_machines():
    gpu = {**toys.finetune(), "machine": {**toys.MACHINE, "gpu": "Abacus 100"}}
    machines = {
        "new": {"inference": toys.inference(("32 x 128", "1 x 32")), "finetune": toys.finetune(), "pretrain": toys.pretrain()},
        "old": {"inference": toys.inference(("1 x 32",))},
        "with-a-gpu": {"finetune": gpu},
    }
    text = readme.rendered("<!-- from benchmarks/results: machines -->\nold\n<!-- end -->\n", machines)
    assert text.splitlines()[2:-2] == [
        "|  | 32 x 128 | MNLI lengths, padded to 128 | 8 x 512 | 1 x 32 "
        "| fine-tuning, MNLI lengths, padded to 128 | pretraining, 16 x 128 |",
        "|---|---|---|---|---|---|---|",
        "| [new](docs/performance/new.md) | 4.0x / 3.8x / 6.7x | - | - | 4.0x / 3.8x / 6.7x | 4.0x / 4.0x | 4.0x / 4.0x |",
        "| [old](docs/performance/old.md) | - | - | - | 4.0x / 3.8x / 6.7x | - | - |",
    ]


def test_tables_that_cannot_be_made():
    with pytest.raises(ReportError, match="asks for the table 'speed' .* there are inference, training, machines"):
        readme.rendered("<!-- from benchmarks/results: speed -->\n<!-- end -->", {})
    with pytest.raises(ReportError, match="README.md's table 'training' needs finetune.json, pretrain.json in benchmarks/results/"):
        readme.rendered("<!-- from benchmarks/results: training -->\n<!-- end -->", {})
