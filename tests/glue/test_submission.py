"""The files that GLUE's server takes."""

from __future__ import annotations

import zipfile

from fastbert.glue.submission import submission_text, write_submission, zip_submission
from fastbert.tasks.glue_tasks import SUBMISSION_NAMES, glue_task


def test_the_format_of_a_file():
    assert submission_text(glue_task("cola"), ["0", "1"], ["1", "0"]) == "index\tprediction\n0\t1\n1\t0\n"
    assert submission_text(glue_task("qqp"), ["390964"], ["0"]) == "index\tprediction\n390964\t0\n"
    words = submission_text(glue_task("rte"), ["0"], ["not_entailment"])
    assert words == "index\tprediction\n0\tnot_entailment\n"


def test_numbers_stay_on_the_scale_of_sts_b():
    text = submission_text(glue_task("stsb"), ["0", "1", "2", "3"], [-0.2, 2.34567, 5.00049, 7])
    assert text.splitlines()[1:] == ["0\t0.000", "1\t2.346", "2\t5.000", "3\t5.000"]


def test_the_zip_holds_what_was_predicted(tmp_path):
    names = ["RTE", "CoLA"]
    for name in names:
        write_submission(tmp_path / "submission", name, f"index\tprediction\n{name}\n")
    path = tmp_path / "submission.zip"
    missing = zip_submission(tmp_path / "submission", names, path)
    assert missing == [name for name in SUBMISSION_NAMES if name not in names] and len(missing) == 9
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["CoLA.tsv", "RTE.tsv"]
        assert archive.read("RTE.tsv").decode() == "index\tprediction\nRTE\n"
    before = path.read_bytes()
    zip_submission(tmp_path / "submission", names, path)
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["submission", "submission.zip"]
