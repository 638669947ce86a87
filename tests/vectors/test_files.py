"""Files and folders are whole or absent, and an error leaves the previous content."""

import errno
import fcntl
import glob
import os
import resource
import stat
from pathlib import Path

import pytest

from secvec_jax.errors import UserError, WriteError
from secvec_jax.files import append_line, atomic_file, atomic_folder, clear_unfinished, system_error, temporary_folder


def _tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_file_appears_at_the_end_only(tmp_path):
    target = tmp_path / "new" / "file.txt"
    with atomic_file(target) as staging:
        staging.write_text("content")
        assert not target.exists() and staging.parent == target.parent
    assert _tree(tmp_path) == {"new/file.txt": "content"}
    assert stat.S_IMODE(target.stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("existed", [True, False])
def test_an_error_leaves_the_old_file(tmp_path, error, existed):
    target = tmp_path / "file.txt"
    if existed:
        target.write_text("old")
    with pytest.raises(type(error)):
        with atomic_file(target) as staging:
            staging.write_text("half")
            raise error
    assert _tree(tmp_path) == ({"file.txt": "old"} if existed else {})


def test_a_file_replaces_a_file(tmp_path):
    for content in ("one", "two"):
        with atomic_file(tmp_path / "file.txt") as staging:
            staging.write_text(content)
    assert _tree(tmp_path) == {"file.txt": "two"}


def test_a_folder_appears_at_the_end_only(tmp_path):
    target = tmp_path / "new" / "folder"
    with atomic_folder(target) as staging:
        (staging / "a").write_text("1")
        (staging / "deep").mkdir()
        (staging / "deep/b").write_text("2")
        assert not target.exists() and staging.parent == target.parent
    assert _tree(tmp_path) == {"new/folder/a": "1", "new/folder/deep/b": "2"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["folder"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o755


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("existed", [True, False])
def test_an_error_leaves_the_old_folder(tmp_path, error, existed):
    target = tmp_path / "folder"
    if existed:
        target.mkdir()
        (target / "a").write_text("old")
    with pytest.raises(type(error)):
        with atomic_folder(target) as staging:
            (staging / "a").write_text("half")
            raise error
    assert _tree(tmp_path) == ({"folder/a": "old"} if existed else {})
    assert [path.name for path in tmp_path.iterdir()] == (["folder"] if existed else [])


def test_a_folder_replaces_a_folder_with_all_that_is_in_it(tmp_path):
    for name in ("a", "b"):
        with atomic_folder(tmp_path / "folder") as staging:
            (staging / name).write_text(name)
    assert _tree(tmp_path) == {"folder/b": "b"}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_an_error_while_taking_the_place_leaves_the_old_folder(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a").write_text("old")
    original = os.rename

    def rename(source, target):
        if Path(target) == tmp_path / "folder" and (Path(source) / "a").read_text() == "new":
            raise OSError(5, "Input/output error")
        original(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="Input/output error"):
        with atomic_folder(tmp_path / "folder") as staging:
            (staging / "a").write_text("new")
    assert _tree(tmp_path) == {"folder/a": "old"}


# Errors of the system -----------------------------------------------------------------------------


@pytest.mark.parametrize("write", [atomic_file, atomic_folder])
def test_what_cannot_be_written_is_named_with_the_cause(tmp_path, write):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for error in (full, RuntimeError("I/O error: No space left on device (os error 28)")):  # Rust's
        with pytest.raises(WriteError) as told, write(tmp_path / "it"):
            raise error
        assert str(told.value).startswith(f"cannot write {tmp_path / 'it'} (No space left on device): free some space")
    with pytest.raises(UserError, match=r"^another$"), write(tmp_path / "it"):
        raise UserError("another")
    with pytest.raises(KeyError), write(tmp_path / "it"):
        raise KeyError
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"\(Not a directory\)$|\(File exists\)$"), write(tmp_path / "file" / "it"):
        pass


def test_only_errors_of_the_system_are_reported_as_such():
    assert system_error(OSError(errno.EACCES, "Permission denied")) == "Permission denied"
    assert system_error(ZeroDivisionError()) is None
    mistake = ZeroDivisionError()
    mistake.__context__ = FileNotFoundError(errno.ENOENT, "No such file or directory")
    assert system_error(mistake) is None
    mistake.__context__ = OSError(errno.ENOSPC, "No space left on device")
    assert system_error(mistake) == "No space left on device"


def test_a_line_is_appended_whole_or_not_at_all(tmp_path):
    path = tmp_path / "log"
    append_line(path, "one")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))  # a part of the next line fits
    try:
        with pytest.raises(WriteError, match=r"log \(File too large\)"):
            append_line(path, "another line")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "one\n"
    append_line(path, "two")
    assert path.read_text() == "one\ntwo\n"


# What killed processes leave ----------------------------------------------------------------------


def _killed_in(write, target: Path) -> Path:
    """The leftover of a process that is killed while it writes."""
    child = os.fork()
    if child == 0:
        with write(target) as staging:
            path = staging if write is atomic_file else staging / "model.safetensors"
            path.write_text("half")
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    (leftover,) = target.parent.glob(f".{glob.escape(target.name)}.*")
    return leftover


@pytest.mark.parametrize("write", [atomic_folder, atomic_file, temporary_folder])
def test_the_next_writer_clears_what_a_killed_one_left(tmp_path, write):
    leftover = _killed_in(write, tmp_path / "[model]")
    other = tmp_path / ".model.unfinished-mine"
    other.touch()
    os.mkfifo(tmp_path / ".[model].unfinished-abcd1234")
    with write(tmp_path / "[model]"):
        assert not leftover.exists() and other.exists()


def test_a_run_clears_all_leftovers_but_those_of_living_processes(tmp_path):
    (tmp_path / "deep").mkdir()
    leftovers = [_killed_in(atomic_folder, tmp_path / "deep" / "model"), _killed_in(atomic_file, tmp_path / "a.json")]
    with atomic_folder(tmp_path / "alive") as alive, atomic_file(tmp_path / "b.json") as file:
        clear_unfinished(tmp_path, within=("d*p",))
        assert alive.exists() and file.exists()
        assert not any(path.exists() for path in leftovers)


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_folder_whose_replacement_was_killed_is_put_back(tmp_path, is_replaced):
    old = tmp_path / ".model.replaced-abcd1234"
    (old / "it").mkdir(parents=True)
    (old / "it" / "a").write_text("old")
    if is_replaced:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "a").write_text("new")
    clear_unfinished(tmp_path)
    assert _tree(tmp_path) == {"model/a": "new" if is_replaced else "old"} and not old.exists()


def test_a_leftover_is_not_taken_while_it_is_locked(tmp_path):
    folder = tmp_path / ".model.unfinished-abcd1234"
    folder.mkdir()
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    clear_unfinished(tmp_path)
    assert folder.exists()
    os.close(handle)
    clear_unfinished(tmp_path)
    assert not folder.exists()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_only_a_file_is_replaced_by_a_file_and_a_folder_by_a_folder(tmp_path, make):
    """Replacing /dev/null, as root, would remove it."""
    make(tmp_path / "it")
    with pytest.raises(UserError, match=r"it is a (named pipe|folder), but must be a file"):
        with atomic_file(tmp_path / "it"):
            raise AssertionError("it was begun")
    if make is os.mkfifo:
        with pytest.raises(UserError, match="it is a file: name a folder"), atomic_folder(tmp_path / "it"):
            raise AssertionError("it was begun")
    assert [path.name for path in tmp_path.iterdir()] == ["it"]
