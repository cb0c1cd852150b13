"""Files are written completely, and replace only earlier outputs."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.files import (
    atomic_write,
    check_new_folder,
    check_output,
    new_folder,
    unused_path,
    write_csv,
    write_file,
)


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_the_old_file_and_no_trace(tmp_path, kind):
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"old")

    def write() -> None:
        with atomic_write(path) as file:
            file.write(b"half of the n")
            raise kind

    with pytest.raises(kind):
        write()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.ckpt"]


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_a_written_file_has_the_usual_permissions(tmp_path):
    old = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "a" / "b") as file:
            file.write(b"new")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o640


def test_a_file_system_that_refuses_chmod_keeps_the_file(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    write_file(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"


@pytest.mark.skipif(os.name != "posix", reason="POSIX links and pipes")
def test_symbolic_links_and_pipes_are_kept(tmp_path):
    (tmp_path / "there").mkdir()
    target, link, pipe = tmp_path / "there" / "a.csv", tmp_path / "link.csv", tmp_path / "pipe"
    target.write_text("old")
    link.symlink_to(target)
    write_file(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"

    os.mkfifo(pipe)
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    write_csv(pipe, ("path",), [("a",)])
    reader.join(10)
    assert got == ["path\na\n"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_file_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*/file/x.csv: .*; free or choose another place"):
        write_file(tmp_path / "file" / "x.csv", "")


def test_outputs_replace_only_earlier_outputs(tmp_path):
    for name in ("old.csv", "model.ckpt"):
        (tmp_path / name).touch()
    for name in ("old.csv", "new.csv", "new"):
        check_output("--output", tmp_path / name, ".csv")
    with pytest.raises(UserError, match=r"--output: .*model.ckpt' exists and is no .csv file"):
        check_output("--output", tmp_path / "model.ckpt", ".csv")
    with pytest.raises(UserError, match="is a folder; name a file"):
        check_output("--output", tmp_path, ".csv")
    assert unused_path(tmp_path / "old.csv").name == "old-1.csv"


def test_a_new_folder_is_complete_or_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    target = check_new_folder("pack", "~/deep/new")
    assert target == tmp_path / "deep" / "new"
    with pytest.raises(ZeroDivisionError), new_folder("pack", target) as folder:
        1 / (folder / "part").write_bytes(b"")
    assert not list(target.parent.iterdir())
    target.mkdir()  # perhaps another disk: nothing is written beside it
    with new_folder("pack", target, last="a") as folder:
        assert folder.parent == target
        for name in "ab":
            (folder / name).touch()
    assert [path.name for path in sorted(target.iterdir())] == ["a", "b"]
    with pytest.raises(UserError, match="exists and is not empty"):
        check_new_folder("pack", "~/deep/new")
    with pytest.raises(UserError, match="is inside the dataset"):
        check_new_folder("pack", "~/deep/new/inside", target)
    with pytest.raises(UserError, match="cannot write"), new_folder("pack", target / "a" / "new"):
        pass
