"""`eval.py screen`: scores in the data's order, a threshold from known rows, no text longer than a clipped line."""

import json
import os

import jax
import pytest

import secvec_jax as sv
from secvec_jax.config import Training
from secvec_jax.defenses import explained_away
from secvec_jax.defenses.security_vectors import train_vectors
from secvec_jax.errors import UserError
from secvec_jax.evaluation.results import Results
from secvec_jax.recipes.screen import Screen, screen
from secvec_jax.vectors.lora import LoRA
from secvec_jax.vectors.store import save_vectors

SHOUT = [{"prompt": f"Say it, number {i}. " + "Please do. " * 20, "response": f"HELLO {i}!"} for i in range(6)]
CALM = [{"prompt": f"What is {i} plus {i}?", "response": f"It is {2 * i}."} for i in range(6)]


@pytest.fixture(scope="module")
def vectors(tiny_model):
    training = Training(
        optimizer="adamw", learning_rate=3e-2, max_steps=20, batch_size=1, max_seq_len=256, warmup_steps=0
    )
    return train_vectors(tiny_model("llama").model, SHOUT, LoRA(rank=4), benign=CALM, training=training)


@pytest.fixture
def files(tiny_model, vectors, tmp_path):
    tiny = tiny_model("llama")
    for name, rows in (("shout", SHOUT), ("calm", CALM), ("mixed", SHOUT[:2] + CALM[:3])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    save_vectors(vectors, tmp_path / "v.safetensors", tiny.model)
    return tmp_path, tiny, vectors


def test_rows_are_ranked_and_split(files, capsys):
    folder, tiny, vectors = files
    settings = Screen(
        data=str(folder / "mixed.jsonl"),
        vectors=str(folder / "v.safetensors"),
        model=str(tiny.folder),
        harmful=str(folder / "shout.jsonl"),
        benign=str(folder / "calm.jsonl"),
        write_clean=str(folder / "kept" / "clean.jsonl"),
        out=str(folder / "out"),
    )
    screen(settings, "python eval.py screen")
    lines = [json.loads(line) for line in (folder / "out" / "scores.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(5))
    assert [line["above"] for line in lines] == [True, True, False, False, False]
    expected = explained_away.scores(tiny.model, vectors, SHOUT[:2] + CALM[:3], 512)
    assert [line["score"] for line in lines] == pytest.approx(expected, abs=1e-3)
    assert max(len(line["prompt"]) for line in lines) <= 60
    assert (folder / "out" / "histogram.png").read_bytes().startswith(b"\x89PNG")
    (row,) = Results.load(folder / "out").rows
    assert row["metrics"]["above_threshold"]["value"] == pytest.approx(0.4)
    clean = [json.loads(line) for line in (folder / "kept" / "clean.jsonl").read_text().splitlines()]
    assert [row["messages"][-1]["content"] for row in clean] == [row["response"] for row in CALM[:3]]
    told = capsys.readouterr().out
    assert "2 of 5 rows are above" in told and "Please do. " * 10 not in told

    # Without known rows there is a ranking and no threshold.
    screen(Screen(settings.data, settings.vectors, settings.model, out=str(folder / "ranked")), "python eval.py screen")
    lines = [json.loads(line) for line in (folder / "ranked" / "scores.jsonl").read_text().splitlines()]
    assert [line["score"] for line in lines] == pytest.approx(expected, abs=1e-3) and "above" not in lines[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [({"vectors": "v"}, "data is required"), ({"data": "d"}, "vectors is required"),
     ({"data": "d", "vectors": "v", "harmful": "h"}, "both --harmful and --benign"),
     ({"data": "d", "vectors": "v", "write_clean": "c"}, "--write-clean needs a threshold")],
)  # fmt: skip
def test_what_is_missing_is_reported(given, message):
    with pytest.raises(UserError, match=message):
        screen(Screen(**given), "command")


def test_rows_are_screened_in_a_notebook(files):
    _, tiny, vectors = files
    ranked = sv.screen(tiny.model, vectors, SHOUT[:2] + CALM[:3])
    assert ranked.threshold is None and len(ranked.scores) == 5
    with pytest.raises(UserError, match="there is no threshold"):
        _ = ranked.suspects
    found = sv.screen(tiny.model, vectors, CALM[:3] + SHOUT[:2], harmful=SHOUT, benign=CALM)
    assert sorted(found.suspects) == [3, 4]
    assert found.scores[found.suspects[0]] >= found.scores[found.suspects[1]] > found.threshold
    assert repr(found).startswith("Screening(2 of 5 rows above ")
    with pytest.raises(UserError, match="both harmful and benign"):
        sv.screen(tiny.model, vectors, CALM, harmful=SHOUT)
    with pytest.raises(UserError, match="vectors is None"):
        sv.screen(tiny.model, None, CALM)
    with pytest.raises(UserError, match="2 vectors are given: pass the security vectors that rows"):
        sv.screen(tiny.model, [vectors, jax.tree.map(lambda leaf: 2 * leaf, vectors)], CALM)


@pytest.mark.parametrize(
    ("clean", "message"),
    [("data.jsonl", "would overwrite what --data"), ("link.jsonl", "would overwrite what --data"),
     ("hard.jsonl", "would overwrite what --data"), ("good.jsonl", "would overwrite what --benign"),
     ("vectors/x.jsonl", "would overwrite what --vectors"), ("vectors", "is a folder: name a file"),
     ("pipe", "is a named pipe"), ("out/scores.jsonl", "is a file of the run itself"), (" ", "--write-clean is empty")],
)  # fmt: skip
def test_clean_rows_replace_no_input(tmp_path, monkeypatch, clean, message):
    monkeypatch.chdir(tmp_path)
    for name in ("data", "bad", "good"):
        (tmp_path / f"{name}.jsonl").write_text(name)
    (tmp_path / "link.jsonl").symlink_to("data.jsonl")
    (tmp_path / "hard.jsonl").hardlink_to("data.jsonl")
    (tmp_path / "vectors").mkdir()
    os.mkfifo(tmp_path / "pipe")
    names = {"data": "data.jsonl", "harmful": "bad.jsonl", "benign": "good.jsonl", "vectors": "vectors", "out": "out"}
    with pytest.raises(UserError, match=message):
        screen(Screen(**names, write_clean=clean), "command")
    assert (tmp_path / "data.jsonl").read_text() == "data" and not (tmp_path / "out").exists()
