"""Digests of files follow their bytes, cached or not; differences are reported by name."""

import hashlib
import os
from pathlib import Path

import pytest

from secvec_jax import digests


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SECVEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_UNSETTLED", 0.0)
    return tmp_path / "cache"


def reads(monkeypatch) -> list[int]:
    """Gets an entry for every file that is read in full."""
    counted: list[int] = []
    whole = hashlib.file_digest

    def count(*arguments):
        counted.append(1)
        return whole(*arguments)

    monkeypatch.setattr(hashlib, "file_digest", count)
    return counted


def test_a_file_is_read_once_until_it_changes_and_nothing_is_written_next_to_it(tmp_path, monkeypatch, cache):
    path = tmp_path / "data" / "rows.jsonl"
    path.parent.mkdir()
    path.write_bytes(b"first")
    counted = reads(monkeypatch)
    assert digests.of_file(path) == digests.of_file(path) == f"sha256:{hashlib.sha256(b'first').hexdigest()}"
    assert len(counted) == 1 and list(path.parent.iterdir()) == [path] and cache.is_dir()
    times = path.stat()
    path.write_bytes(b"other")  # of the same size, and its modification time set back
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert digests.of_file(path) == f"sha256:{hashlib.sha256(b'other').hexdigest()}"
    replacement = tmp_path / "data" / "new"
    replacement.write_bytes(b"third")
    os.replace(replacement, path)
    assert digests.of_file(path) == f"sha256:{hashlib.sha256(b'third').hexdigest()}"


def test_a_digest_of_a_file_that_just_changed_is_not_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_UNSETTLED", 1e9)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"first")
    counted = reads(monkeypatch)
    assert digests.of_file(path) == digests.of_file(path) and len(counted) == 2


@pytest.mark.parametrize(
    "damage", [b"", b"{}", b"[1]", b'{"identity": 3, "digest": "sha256:0"}', b"\xff", b"[" * 100_000]
)
def test_a_damaged_or_unwritable_cache_costs_time_only(tmp_path, cache, damage):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"rows")
    expected = digests.of_file(path)
    (entry,) = (cache / "digests").iterdir()
    entry.write_bytes(damage)
    assert digests.of_file(path) == expected
    entry.unlink()
    (cache / "digests").rmdir()
    (cache / "digests").write_text("a file where the folder should be")
    assert digests.of_file(path) == expected


def test_differences_are_reported_by_name_and_unknown_content_equals_any():
    before = {"--data a": "sha256:1", "training.max_steps": 3, "gone": "sha256:2", "only then": 1}
    assert digests.difference(before, before | {"only now": 4, "gone": None}) is None
    assert digests.difference(before, before | {"--data a": "sha256:9"}) == "--data a has changed"
    assert digests.difference(before, before | {"training.max_steps": 4}) == "training.max_steps was 3, is now 4"
