"""Results kept in the cache folder: made once, told when damaged or old, and never half read."""

import contextlib
import dataclasses
import json
import os
import threading
from types import SimpleNamespace

import pytest

from secvec_jax.config import Training
from secvec_jax.defenses.identity import with_inputs
from secvec_jax.digests import of_values
from secvec_jax.model.hub import load
from secvec_jax.recipes import protect_vectors
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.workspace import result_cache
from secvec_jax.workspace.result_cache import cached_result, inputs_of
from secvec_jax.workspace.vector_cache import key_of
from tests.processes import started
from tests.toys import ARCHITECTURE, build_tokenizer, random_decoder, tiny_model


class Told(list):
    """Lines that were told; sets an event with each."""

    def __init__(self, event: threading.Event):
        super().__init__()
        self.event = event

    def append(self, line: str) -> None:
        super().append(line)
        self.event.set()


class Maker:
    """Makes another result at each call, and keeps what it is told."""

    def __init__(self):
        self.made, self.told = 0, []

    def make(self):
        self.made += 1
        return {"made": self.made, "number": 0.1 + 0.2, "pair": (1, None)}

    def get(self, *inputs):
        return cached_result("own replies", inputs, self.make, self.told.append)


@pytest.fixture
def maker(own_cache):
    return Maker()


def entry(own_cache):
    (file,) = (own_cache / "results" / "own-replies").glob("*.json")
    return file


def test_a_result_is_made_once_for_the_same_inputs(maker, own_cache):
    first = maker.get("a", {"b": 1.5})
    assert first == {"made": 1, "number": 0.1 + 0.2, "pair": [1, None]} and maker.told == []
    assert maker.get("a", {"b": 1.5}) == first and maker.made == 1
    assert maker.told == ["own replies: from the cache, computed earlier for this model"]
    assert oct(entry(own_cache).stat().st_mode)[-3:] == "600"
    assert oct(entry(own_cache).parent.stat().st_mode)[-3:] == "700"
    assert maker.get("a", {"b": 2.5})["made"] == 2 and maker.get("a", {"b": 1.5})["made"] == 1


def cut(file):
    file.write_bytes(file.read_bytes()[:-5])


def changed(file):
    file.write_text(file.read_text().replace('"number": 0.3', '"number": 0.4'))


def older(file):
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"version": "0.1.9"}))


def nothing(file):
    file.write_text("[]")


def deep(file):
    file.write_text("[" * 100_000)


def pipe(file):
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (deep, "cannot be read"),
        (cut, "cannot be read"),
        (nothing, "cannot be read"),
        (changed, "damaged"),
        (older, "from version 0.1.9"),
    ],
)
def test_an_entry_that_cannot_be_used_is_reported_and_made_again(maker, own_cache, damage, told):
    maker.get("a")
    damage(entry(own_cache))
    assert maker.get("a")["made"] == 2
    (line,) = maker.told
    assert line.startswith("the cached own replies ") and told in line and line.endswith("computed again")
    assert maker.get("a")["made"] == 2, "and kept"


def test_what_fails_or_is_interrupted_leaves_nothing(maker, own_cache, monkeypatch):
    def stop():
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(maker, "make", stop)
        with pytest.raises(KeyboardInterrupt):
            maker.get("a")
    assert not list((own_cache / "results" / "own-replies").glob("*.json"))
    assert maker.get("a")["made"] == 1


def test_a_cache_that_cannot_be_written_is_reported_and_the_result_is_made(maker, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SECVEC_CACHE", str(tmp_path / "file"))
    assert maker.get("a")["made"] == 1 and maker.get("a")["made"] == 2
    assert all("are not cached (cannot write to the cache folder" in line for line in maker.told)


def test_a_full_disk_costs_the_entry_and_not_the_result(maker, monkeypatch):
    def full(*arguments):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "replace", full)
    assert maker.get("a")["made"] == 1
    assert "are not cached" in maker.told[0] and "No space left" in maker.told[0]


def test_who_comes_second_waits_for_the_result_of_the_first(maker):
    started, waiting, results = threading.Event(), threading.Event(), []
    second = Maker()
    second.told = Told(waiting)

    def slow():
        started.set()
        assert waiting.wait(60)
        return Maker.make(maker)

    maker.make = slow
    threads = [threading.Thread(target=lambda maker=maker: results.append(maker.get("a"))) for maker in (maker, second)]
    threads[0].start()
    assert started.wait(60)
    threads[1].start()
    for thread in threads:
        thread.join(60)
    assert results[0] == results[1] and (maker.made, second.made) == (1, 0)
    assert second.told[0] == "another process is computing the own replies: waiting"


def test_two_that_share_a_full_cache_both_have_their_result(maker, disk, monkeypatch):
    monkeypatch.setenv("SECVEC_CACHE", str(disk.folder))
    second, waiting, results = Maker(), threading.Event(), []

    def fill():
        """The disk is full once the second waits for the first."""
        threads[1].start()
        assert waiting.wait(60)
        with contextlib.suppress(OSError), open(disk.folder / "filler", "wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()
        return Maker.make(maker)

    maker.make = fill
    second.told = Told(waiting)
    threads = [threading.Thread(target=lambda maker=maker: results.append(maker.get("a"))) for maker in (maker, second)]
    threads[0].start()
    for thread in threads:
        thread.join(60)
    assert results == [{"made": 1, "number": 0.1 + 0.2, "pair": [1, None]}] * 2
    assert "another process is computing the own replies: waiting" == second.told[0]
    for told in (maker.told, second.told[1:]):
        assert len(told) == 1 and "are not cached" in told[0] and "No space left" in told[0]
    assert sorted(path.suffix for path in (disk.folder / "results" / "own-replies").iterdir()) == [".lock"]


def test_the_lock_of_a_process_that_was_killed_is_free(maker, own_cache):
    folder = own_cache / "results" / "own-replies"
    code = """
import sys, time
from pathlib import Path
from secvec_jax.workspace.result_cache import locked

with locked(Path(sys.argv[1]), sys.argv[2], lambda: None):
    print("held", flush=True)
    time.sleep(600)
"""
    key = of_values(["a"]).removeprefix("sha256:")
    with started([("-c", code, folder, key)]) as (holder,):
        assert holder.stdout.readline() == "held\n"
        waiting = threading.Event()
        maker.told = Told(waiting)
        results = []
        thread = threading.Thread(target=lambda: results.append(maker.get("a")))
        thread.start()
        assert waiting.wait(60) and not results, "it waits while the holder lives"
        holder.kill()
        thread.join(60)
    assert results[0]["made"] == 1 and maker.told == ["another process is computing the own replies: waiting"]


def test_processes_of_a_cluster_do_not_use_the_cache(maker, own_cache, monkeypatch):
    monkeypatch.setattr(result_cache, "is_clustered", lambda: True)
    assert maker.get("a")["made"] == 1 and maker.get("a")["made"] == 2 and not (own_cache / "results").exists()


def test_another_model_is_another_key():
    model = tiny_model()
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<|new|>"])
    other_template = build_tokenizer()
    other_template.chat_template += " "
    other_positions = dataclasses.replace(ARCHITECTURE, rope_theta=5e5)
    others = [
        model.with_backbone(random_decoder(seed=1)),
        model.with_backbone(random_decoder(architecture=other_positions)),
        dataclasses.replace(model, tokenizer=tokenizer),
        dataclasses.replace(model, tokenizer=other_template),
        dataclasses.replace(model, metadata=dataclasses.replace(model.metadata, generation={"eos_token_id": [7]})),
    ]
    keys = {json.dumps(inputs_of(each)) for each in (model, *others)}
    assert len(keys) == 1 + len(others)
    assert inputs_of(dataclasses.replace(model, name="renamed")) == inputs_of(tiny_model())


@pytest.mark.parametrize("precision", ["bfloat16", "int8", "nf4"])
def test_weights_held_in_fewer_bits_have_results_and_vectors_of_their_own(tmp_path, precision):
    tiny_model().save(tmp_path / "model")
    whole, held = (load(str(tmp_path / "model"), each) for each in ("float32", precision))
    assert held.fingerprint == whole.fingerprint, "the weights are those of the same files"
    assert inputs_of(held) != inputs_of(whole)
    assert key_of(held, {}, Training()) != key_of(whole, {}, Training())
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    labels = [with_inputs(checkpoints, model, Training(), 1, {}).inputs for model in (whole, held)]
    assert labels[0] != labels[1]


def test_a_pipe_in_place_of_an_entry_is_not_waited_for(maker, own_cache):
    maker.get("a")
    pipe(entry(own_cache))
    assert maker.get("a")["made"] == 2
    assert "named pipe" in maker.told[0] and "not cached" in maker.told[1]


def test_vectors_are_trained_where_no_cache_can_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SECVEC_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(protect_vectors, "key_of", lambda *_: "key")
    monkeypatch.setattr(protect_vectors, "_trained_vectors", lambda *_: "trained")
    told = []
    work = SimpleNamespace(rows_for=list, model=None, vectors_training=None, note=told.append)
    assert protect_vectors._cached_vectors(work, None) == "trained"
    assert "are not cached (cannot write to the cache folder" in told[0]
