"""Files that appear whole."""

from __future__ import annotations

import stat

import pytest

from fastbert.runs.whole_file import whole_file


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as beside:
        beside.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with whole_file(path, on_disk=True) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("there", [False, True])
def test_a_link_leads_to_the_new_file_whose_permissions_are_those_of_the_old_one(tmp_path, there):
    (tmp_path / "far").mkdir()
    path, link = tmp_path / "far" / "a.txt", tmp_path / "link.txt"
    link.symlink_to(path)
    if there:
        path.touch()
        path.chmod(0o600)
    with whole_file(link) as beside:
        beside.write_text("new")
    assert link.is_symlink() and path.read_text() == "new"
    assert not there or stat.S_IMODE(path.stat().st_mode) == 0o600
