"""The table and the picture of a profile, from a document made by hand."""

from __future__ import annotations

import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from benchmarks.parts import PARTS
from benchmarks.reports import profile_plot
from benchmarks.reports.profile_plot import COLOURS, profile_picture, profile_table, profiles_of


def entry(dtype: str, **parts: float) -> dict:
    parts = {name.replace("_and_", " + ").replace("_", " "): seconds for name, seconds in parts.items()}
    return {"dtype": dtype, "seconds": sum(parts.values()), "parts": parts, "operators": {}}


INFERENCE = {
    "profile": {
        "1 x 32": {
            "transformers float32": entry("float32", linear=0.030, gelu=0.004, attention=0.002, layer_norm=0.001, outside=0.003),
            "fastbert float32": entry("float32", linear_and_gelu=0.016, attention=0.001, linear=0.001, outside=0.002),
            "fastbert int8": entry("int8", linear_and_gelu=0.008, layer_norm_and_copies=0.001, outside=0.001),
        }
    },
    "floors": {
        "1 x 32": {
            "float32": {"linear": 0.010, "attention": 0.0005, "layer norm": 0.0002},
            "int8": {"linear": 0.004, "layer norm": 0.0002},
        }
    },
}
TRAINING = {
    "runs": {
        dtype: {
            "profile": {"8 x 16": {"transformers": entry(dtype, linear=2.0, optimizer=1.0), "fastbert": entry(dtype, linear=1.0)}},
            "floors": {"8 x 16": {dtype: {"linear": 0.5, "optimizer": 0.25}}},
        }
        for dtype in ("float32", "bfloat16")
    }
}


def cells(table: str, title: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {title} |")]
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


def test_profiles_of_both_kinds_of_documents():
    found = profiles_of(INFERENCE)
    assert [(p.batch, p.dtype, list(p.libraries)) for p in found] == [
        ("1 x 32", "float32", ["transformers", "fastbert"]),
        ("1 x 32", "int8", ["fastbert"]),
    ]
    assert [(p.batch, p.dtype) for p in profiles_of(TRAINING)] == [("8 x 16", "float32"), ("8 x 16", "bfloat16")]
    assert profiles_of({"results": {}}) == profiles_of({"runs": {"float32": {}}}) == []
    before = {"profile": {"1 x 32": {"fastbert float32": {"seconds": 1.0, "shares": {"gemm": 1.0}}}}}
    assert profiles_of(before) == []


def test_a_table_has_one_row_for_what_is_one_pass():
    float32, int8, legend = (profile_table(INFERENCE) + "\n").replace("\n\n-", "\n\n**-").split("\n\n**")
    assert cells(float32, "linear + gelu") == ["34.0", "17.0", "10.0", "1.70"]
    assert cells(float32, "attention") == ["2.000", "1.000", "0.500", "2.00"]
    assert cells(float32, "layer norm") == ["1.000", "–", "0.200", "–"]
    assert cells(float32, "outside") == ["3.000", "2.000", "–", "–"]
    assert cells(float32, "**together**") == ["40.0", "20.0", "10.7", "1.87"]
    assert not any(line.startswith(("| linear |", "| gelu |")) for line in float32.splitlines())
    assert cells(int8, "linear + gelu") == ["–", "8.000", "4.000", "2.00"]
    assert cells(int8, "layer norm + copies") == ["–", "1.000", "0.200", "5.00"]
    assert [line.split(":")[0] for line in legend.strip().splitlines()][-1] == "- outside"


def test_rows_and_the_last_line_agree():
    for profiles, table in zip(profiles_of(TRAINING), profile_table(TRAINING).split("**8 x 16")[1:], strict=True):
        for column, library in enumerate(("transformers", "fastbert")):
            rows = [line.split("|") for line in table.splitlines() if line.startswith("| ") and "together" not in line][1:]
            values = [float(row[2 + column].replace(",", "")) for row in rows if row[2 + column].strip() != "–"]
            assert sum(values) == pytest.approx(profiles.libraries[library]["seconds"] * 1e3)


def test_without_a_profile():
    assert profile_table({"results": {}}) == ""
    with pytest.raises(ValueError, match="fastbert bench makes one with --profile"):
        profile_picture({"results": {}}, None)


@pytest.mark.parametrize("document", [INFERENCE, TRAINING])
def test_picture(document, tmp_path, monkeypatch):
    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k)))
    profile_picture(document, tmp_path / "profile.png")
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1
    (figure,) = figures
    found = profiles_of(document)
    assert len(figure.axes) == len(found)
    for axes, profiles in zip(figure.axes, found, strict=True):
        assert [label.get_text() for label in axes.get_yticklabels()] == [*profiles.libraries, "floor"]
        for height, parts in enumerate([*(e["parts"] for e in profiles.libraries.values()), profiles.floors]):
            pieces = [p for p in axes.patches if p.get_y() < height < p.get_y() + p.get_height()]
            assert sum(p.get_width() for p in pieces) == pytest.approx(1e3 * sum(parts.values()))
            # A part has its colour wherever it is, at its place in the order.
            expected = [to_rgb(COLOURS[part.split(" + ")[0]]) for part in profile_plot.in_order(parts)]
            assert [p.get_facecolor()[:3] for p in sorted(pieces, key=lambda p: p.get_x())] == expected
            assert any(text.get_text() == f"{profile_plot._short(1e3 * sum(parts.values()))} ms" for text in axes.texts)


def test_every_part_has_a_colour_of_its_own():
    assert set(COLOURS) == set(PARTS) and len(set(COLOURS.values())) == len(PARTS)
