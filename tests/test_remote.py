"""Object stores: data, models and vectors are read from URLs, models exported to them; runs are refused there."""

import json
from pathlib import Path

import fsspec
import pytest

from secvec_jax import cli, command_line, remote
from secvec_jax.data.sources import load_rows
from secvec_jax.defenses.inputs import as_row_source
from secvec_jax.errors import UserError
from secvec_jax.files import atomic_file, atomic_folder, lock
from secvec_jax.model import hub
from secvec_jax.recipes.export import Export, export
from secvec_jax.run_folders import find_vectors
from secvec_jax.workspace import inputs
from tests.toys import tiny_model

ROWS = [{"prompt": f"What is {n}?", "response": f"It is {n}."} for n in range(3)]


@pytest.fixture
def store(own_cache):
    """An empty object store in memory, and an empty cache."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    return system


def test_rows_are_read_and_read_again_when_they_change(store, tmp_path):
    def put(rows) -> None:
        store.pipe("/bucket/rows.jsonl", "\n".join(map(json.dumps, rows)).encode())

    put(ROWS)
    url = "memory://bucket/rows.jsonl"
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    expected = load_rows(str(tmp_path / "rows.jsonl"))
    assert list(load_rows(url)) == list(as_row_source(url, "rows")) == list(expected)
    assert list(load_rows(f"{url}:question=prompt,answer=response")) == list(expected)
    before = inputs.rows(url)
    assert before == inputs.rows(str(tmp_path / "rows.jsonl"))
    assert remote.fetched(url) == remote.fetched(url)
    put(ROWS[:2])
    assert len(load_rows(url)) == 2 and inputs.rows(url) != before
    with pytest.raises(UserError, match=r"^there is no file at memory://bucket/other\.jsonl: check the URL$"):
        load_rows("memory://bucket/other.jsonl")


def test_a_model_is_exported_to_a_url_and_loaded_from_it(store, tmp_path):
    tiny_model().save(tmp_path / "tiny")
    url = "memory://bucket/models/tiny"
    export(Export(str(tmp_path / "tiny"), out=url), "command")
    assert store.exists("/bucket/models/tiny/config.json") and store.exists("/bucket/models/tiny/README.md")
    loaded = hub.load(url)
    assert loaded.name == url and loaded.fingerprint == tiny_model().fingerprint
    assert hub.load_architecture(url) == tiny_model().architecture
    with pytest.raises(UserError, match="there are files at memory://bucket/models/tiny: choose a new place"):
        export(Export(str(tmp_path / "tiny"), out=url), "command")
    damaged = bytearray(store.cat("/bucket/models/tiny/model.safetensors"))
    damaged[-1] ^= 1
    store.pipe("/bucket/models/tiny/model.safetensors", bytes(damaged))
    with pytest.raises(UserError):  # its checksums came with it
        hub.load(url)


def test_vectors_are_found(store):
    store.pipe("/bucket/runs/v/vectors/security.safetensors", b"x")
    found = find_vectors("memory://bucket/runs/v")
    assert found.name == "security.safetensors" and found.read_bytes() == b"x"


def test_what_needs_a_file_system_is_refused_and_makes_no_folder_of_that_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    tiny_model().save(tmp_path / "tiny")
    command = [
        "train.py",
        "finetune",
        "--model",
        "tiny",
        "--data",
        "rows.jsonl",
        "--vectors",
        "none",
        "--preset",
        "none",
    ]
    monkeypatch.setattr("sys.argv", [*command, "--out", "gs://bucket/run"])
    assert command_line.main(cli.DESCRIPTION, cli.TRAIN) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("error: gs:// has no locks and no renames"), error
    for write in (atomic_file, atomic_folder):
        with pytest.raises(UserError, match="s3:// has no locks"), write(Path("s3://bucket/x")):
            pass
    with pytest.raises(UserError, match="gs:// has no locks"):
        lock("gs://bucket/checkpoints")
    with pytest.raises(UserError, match="gs:// has no locks"):
        tiny_model().save("gs://bucket/model")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "tiny") == ["rows.jsonl"]


def test_the_package_that_a_store_needs_is_named(monkeypatch):
    def missing(url):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(UserError, match=r"^gs://bucket/rows\.jsonl needs another package: pip install gcsfs$"):
        load_rows("gs://bucket/rows.jsonl")


def test_other_names_are_no_urls():
    assert all(map(remote.is_url, ["gs://b/x", "GS://b", "s3://b/x", "memory://x"]))
    assert not any(
        map(remote.is_url, ["a/b", "rows.jsonl", "owner/name", "https://host/x", "file:///x", "C:/x", "gs:"])
    )
