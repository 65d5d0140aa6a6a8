"""Pictures: which are made, what they show, and that their metadata say of which rows they are."""

from __future__ import annotations

import json

import pytest
from matplotlib.colors import to_hex

from benchmarks.reports import pictures, plots
from benchmarks.reports.rows import rows_of

from . import toy_documents as toys

FASTBERT = "#d55e00"


def made_of(document: dict) -> set[str]:
    return set(pictures.pictures(document, "toy"))


def shown_in(name: str, document: dict) -> tuple[plots.Plot, list]:
    plot = plots.PLOTS[name]
    return plot, plot.shown(rows_of(document))


@pytest.mark.parametrize(
    ("document", "names"),
    [
        (toys.inference(), {"ratios", "roofline", "memory", "profile"}),
        (toys.inference(toys.EQUAL), {"by-length", "ratios", "roofline", "memory", "profile"}),
        (toys.inference(("1 x 8", "2 x 8", "4 x 8")), {"by-sequences", "ratios", "roofline", "memory", "profile"}),
        (toys.inference(("1 x 8", "2 x 8", "novels, padded to 8")), {"ratios", "roofline", "memory", "profile"}),
        (toys.finetune(), {"ratios", "roofline", "memory"}),
        (toys.earlier_race(), {"ratios", "memory"}),
        (toys.earlier_inference(), {"ratios"}),
        (toys.earliest_inference(), {"ratios"}),
        (toys.inference(seconds={"OpenVINO": {"float32": 0.1}}), {"roofline", "memory", "profile"}),
        (toys.ops(), set()),
    ],
)
def test_a_picture_is_made_where_there_are_rows_for_it(document, names):
    assert made_of(document) == {f"toy-{name}.png" for name in names}


def test_curves_are_of_batches_that_differ_in_one_thing():
    _, shown = shown_in("by-length", toys.inference((*toys.EQUAL, "4 x 16", "novels, padded to 8")))
    assert {row.batch for row in shown} == set(toys.EQUAL)
    _, shown = shown_in("by-sequences", toys.inference(("1 x 8", "2 x 8", "4 x 8", "4 x 16", "2 x 16")))
    assert {row.batch for row in shown} == {"1 x 8", "2 x 8", "4 x 8"}


@pytest.mark.parametrize("name", pictures.NAMES)
def test_a_picture_carries_the_digest_of_what_it_shows(name, tmp_path):
    document = toys.inference(toys.EQUAL if name == "by-length" else ("1 x 8", "2 x 8", "4 x 8"))
    path = tmp_path / "toy.png"
    pictures.pictures(document, "toy")[f"toy-{name}.png"].save(path)
    assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 5000
    assert len(pictures.digest_in(path)) == 64

    def digest_now() -> str:
        return pictures.pictures(json.loads(json.dumps(document)), "toy")[f"toy-{name}.png"].digest

    assert pictures.digest_in(path) == digest_now()
    for measured in document["results"].values():
        measured["contenders"]["fastbert float32"]["rounds"] += 1
    assert (pictures.digest_in(path) == digest_now()) == (name == "profile")
    next(iter(document["profile"].values()))["fastbert float32"]["parts"]["linear"] += 0.001
    assert pictures.digest_in(path) != digest_now()


@pytest.mark.parametrize("name", plots.PLOTS)
def test_panels_are_dtypes_and_axes_say_what_they_show(name):
    batches = toys.EQUAL if name == "by-length" else ("1 x 8", "2 x 8", "4 x 8")
    plot, shown = shown_in(name, toys.inference(batches))
    figure = plot.draw(shown)
    assert [axes.get_title() for axes in figure.axes] == ["float32", "bfloat16", "int8"]
    units = {
        "by-length": ("tokens of each sequence", "real tokens per second"),
        "by-sequences": ("sequences in a batch", "real tokens per second"),
        "ratios": ("times as fast as transformers", ""),
        "roofline": ("FLOPs per byte", "GFLOP/s"),
        "memory": ("GB", ""),
    }
    for axes in figure.axes:
        assert units[name][0] in axes.get_xlabel() and units[name][1] in axes.get_ylabel()
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert set(legend) == {row.contender for row in shown} and "fastbert" in legend


def test_lines_are_the_rows():
    plot, shown = shown_in("by-length", toys.inference(toys.EQUAL))
    lines = {to_hex(line.get_color()): line for line in plot.draw(shown).axes[0].get_lines()}
    assert list(lines[FASTBERT].get_xdata()) == [4, 8, 16, 32] and list(lines[FASTBERT].get_ydata()) == pytest.approx([320] * 4)
    assert len(lines) == 3


def test_ratios_have_quartiles_for_bars():
    plot, shown = shown_in("ratios", toys.inference(("4 x 8", "1 x 32")))
    # transformers in bfloat16 is what the others of that panel are set beside, not one of them.
    assert {row.contender for row in shown} == {"ONNX Runtime", "OpenVINO", "fastbert"}
    figure = plot.draw(shown)
    panel = dict(zip(("float32", "bfloat16", "int8"), figure.axes, strict=True))["float32"]
    ours = [bar for bar in panel.containers if to_hex(bar.lines[0].get_color()) == FASTBERT]
    assert [bar.lines[0].get_xdata()[0] for bar in ours] == pytest.approx([4.0, 4.0])
    (segment,) = ours[0].lines[2][0].get_segments()
    assert [segment[0][0], segment[1][0]] == pytest.approx([3.6, 4.4])
    assert [text.get_text() for text in panel.texts] == ["4.00x", "4.00x"]
    # int8 stands beside float32, and says so.
    assert [axes.get_xlabel().count("float32") for axes in figure.axes] == [0, 0, 1]


def test_the_roof_is_the_lower_of_both():
    plot, shown = shown_in("roofline", toys.inference())
    panel = plot.draw(shown).axes[0]
    roof = panel.get_lines()[0]
    at = dict(zip(roof.get_xdata(), roof.get_ydata(), strict=True))
    assert at == pytest.approx({10 / 3: 1 / 3, 10.0: 1.0, 60.0: 1.0})
    points = {to_hex(line.get_color()): line for line in panel.get_lines() if len(line.get_xdata()) == 1}
    assert (points[FASTBERT].get_xdata()[0], points[FASTBERT].get_ydata()[0]) == pytest.approx((20.0, 0.1))


def test_batches_of_one_intensity_share_a_name():
    plot, shown = shown_in("roofline", toys.inference(("4 x 8", "1 x 32", "2 x 16")))
    assert "4 x 8 and 2 more" in [text.get_text() for text in plot.draw(shown).axes[0].texts]


def test_fastbert_has_one_colour_and_no_other_has_it():
    names = ["fastbert", "transformers", "Somebody", "Somebody else", *plots.styles([])]
    styles = plots.styles(names)
    assert {styles[name][0].lower() for name in styles if name.startswith("fastbert")} == {FASTBERT}
    assert FASTBERT not in {styles[name][0].lower() for name in styles if not name.startswith("fastbert")}
    assert len(set(styles["Somebody"])) == 2 and styles["Somebody"] != styles["Somebody else"]
    by_race = [name for name in styles if "micro-batches" not in name]  # that one is training's sorted
    assert len({styles[name] for name in by_race}) == len(by_race)


def test_a_name_with_dollars_is_no_formula(tmp_path):
    document = toys.inference(("4 x 8", "$x$, padded to 8"))
    document["model"] = "a$b$c"
    for name, picture in pictures.pictures(document, "toy").items():
        picture.save(tmp_path / name)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: None)
    assert pictures.why_not() == "matplotlib is not installed (pip install 'fastbert[viz]')"
