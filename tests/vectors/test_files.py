"""Files and folders are whole or absent, and an error leaves the previous content."""

import stat
from pathlib import Path

import pytest

from secvec_jax.files import atomic_file, atomic_folder


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
    import os

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
