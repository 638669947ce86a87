"""Rows that stay on disk are the rows that a list would hold, and training on them is the same to the bit."""

import json
import tracemalloc

import jax
import numpy as np
import pytest
from datasets import Dataset

from secvec_jax.config import Training
from secvec_jax.data import encoded, sources
from secvec_jax.data.normalize import as_rows
from secvec_jax.data.sources import load_rows
from secvec_jax.data.stored import Rows
from secvec_jax.defenses.security_vectors import finetune
from secvec_jax.errors import UserError
from secvec_jax.workspace import inputs
from tests.toys import tiny_model

RECORDS = [{"prompt": f"What is {n}?", "response": f"It is {n}, ü."} for n in range(11)]


@pytest.fixture
def everything_is_large(monkeypatch):
    monkeypatch.setattr(sources, "LARGE", 0)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS), encoding="utf-8-sig")
    return path


def test_sequences_on_disk_are_those_in_memory(path, monkeypatch):
    small = load_rows(str(path))
    monkeypatch.setattr(sources, "LARGE", 0)
    large = load_rows(str(path))
    assert isinstance(small, Rows) and isinstance(large, Rows)
    assert list(large) == small and len(large) == 11
    assert large[3:5] == small[3:5] and large[-1] == small[-1] and large[::-4] == small[::-4]
    with pytest.raises(IndexError):
        large[11]


@pytest.mark.parametrize(
    ("line", "hint"),
    [("{", "line 23 is not valid JSON"), ('{"prompt": "a"}', "line 23 has no answer"), ('{"a": 1}', "unknown fields")],
)
def test_a_bad_line_is_reported_before_anything_is_trained(path, everything_is_large, line, hint):
    with path.open("a") as file:
        file.write(f"\n\n{line}")
    with pytest.raises(UserError, match=hint):
        load_rows(str(path))


def test_no_lines_and_no_utf8(tmp_path, everything_is_large):
    (tmp_path / "a.jsonl").write_text("\n \n")
    with pytest.raises(UserError, match="holds no rows"):
        load_rows(str(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match="UTF-8"):
        load_rows(str(tmp_path / "b.jsonl"))


def test_datasets_stay_where_they_are(tmp_path):
    import datasets

    kept = datasets.Dataset.from_list(RECORDS)
    kept.to_parquet(tmp_path / "rows.parquet")
    expected = as_rows(RECORDS)
    for found in (as_rows(kept), load_rows(str(tmp_path / "rows.parquet")), load_rows(str(tmp_path))):
        assert isinstance(found, Rows) and list(found) == expected
        assert as_rows(found) is found
    broken = datasets.Dataset.from_list([*RECORDS, {"prompt": "a", "response": ""}])
    with pytest.raises(UserError, match="row 12 has no answer"):
        as_rows(broken, name="mine")


@pytest.mark.parametrize(
    ("share", "kept"),
    [
        (True, 3),
        (False, 50_000),
        *(pytest.param(*case, marks=pytest.mark.release) for case in ((True, 50_000), (False, 3))),
    ],
)
def test_training_is_the_same_to_the_bit(path, monkeypatch, kept, share):
    training = Training(epochs=2, max_seq_len=64, batch_size=4, share_prefix=share, learning_rate=0.1)
    found = []
    for large in (sources.LARGE, 0):
        monkeypatch.setattr(sources, "LARGE", large)
        monkeypatch.setattr(encoded, "_CACHE_SIZE", 50_000 if large else kept)
        found.append(finetune(tiny_model(), load_rows(str(path)), vectors=None, training=training).backbone)
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.abs(found[0].embed[...] - tiny_model().backbone.embed[...]).max() > 0


def test_memory_holds_where_sequences_begin_and_no_more(tmp_path, everything_is_large):
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for n in range(8_000):
            file.write(json.dumps({"prompt": f"{n} {'x' * 200}?", "response": "y" * 100}) + "\n")
    tracemalloc.start()
    rows = load_rows(str(path))
    taken, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == 8_000 and rows[5_432]["messages"][0]["content"].startswith("5432 ")
    assert taken < 20 * len(rows) < path.stat().st_size / 10 and most < path.stat().st_size / 4


def test_the_characters_of_patterns_in_a_name_select_no_other_files(tmp_path):
    for name in ("a1", "a[1]", "a*"):
        as_table = Dataset.from_list([{"prompt": name, "response": "yes"}])
        as_table.to_parquet(tmp_path / f"{name}.parquet")
    for name in ("a[1]", "a*"):
        (row,) = load_rows(str(tmp_path / f"{name}.parquet"))
        assert row["messages"][0]["content"] == name
    (tmp_path / "b[1]").mkdir()
    with pytest.raises(UserError, match=r"b\[1\] has one of the characters .* rename it, or name a file in it"):
        load_rows(str(tmp_path / "b[1]"))


def test_the_parts_of_a_file_are_those_of_its_name(tmp_path):
    for name in ("a1", "a[1]", "a*"):
        for part in (1, 2):
            (tmp_path / f"{name}-0000{part}-of-00002.gguf").touch()
    for name in ("a1", "a[1]", "a*"):
        parts = inputs._parts(tmp_path / f"{name}-00001-of-00002.gguf")
        assert [part.name for part in parts] == [f"{name}-00001-of-00002.gguf", f"{name}-00002-of-00002.gguf"]
