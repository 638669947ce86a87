"""The verbs in two processes: results as on one device, files and output from one process, one-line errors."""

import json
import os
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from secvec_jax.evaluation.results import Results
from secvec_jax.model import hub
from secvec_jax.vectors.store import load_vectors, save_vectors
from tests.processes import call, cluster, cluster_flags, outputs, started

TRAINING = ("--batch-size", 4, "--max-seq-len", 192, "--max-steps", 4, "--learning-rate", 1e-3,
            "--schedule", "constant", "--warmup-steps", 0, "--remat", "none", "--check-prompts", 0)  # fmt: skip
TWO = ["--mesh", "fsdp=2"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tiny_model, tmp_path_factory) -> dict[str, Path]:
    """A small model folder and rows to train on."""
    folder = tmp_path_factory.mktemp("rows")

    def write(name: str, prompt: str, reply: str, count: int) -> Path:
        rows = [{"prompt": prompt.format(i), "response": reply.format(i)} for i in range(count)]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder / name

    odd = folder / "odd"  # a model that tensor=2 does not divide; it is refused before any weights are read
    odd.mkdir()
    config = json.loads((tiny_model("llama").folder / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 1}))
    return {
        "model": tiny_model("llama").folder,
        "odd": odd,
        "harmful": write("harmful.jsonl", "Say bad {}", "Sure, bad {}", 12),
        "benign": write("benign.jsonl", "What is {}?", "It is {}", 12),
    }


@pytest.fixture(scope="module")
def vectors(tiny_model, random_vectors, tmp_path_factory) -> Path:
    """A file of vectors that matter, trained nowhere."""
    model, path = tiny_model("llama").model, tmp_path_factory.mktemp("vectors") / "security.safetensors"
    save_vectors(random_vectors(model, rank=4), path, model)
    return path


def trained_vectors(files, out: Path, run) -> Path:
    command = ("train.py", "vectors", "--model", files["model"], "--data", files["harmful"],
               "--benign", files["benign"], "--out", out, *TRAINING)  # fmt: skip
    ((code, output, errors),) = run([list(map(str, command))])
    assert code == 0 and "the vectors are in" in output, errors
    return out


@pytest.fixture(scope="module")
def done(files, vectors, tmp_path_factory) -> dict[int, tuple[Path, dict[str, str]]]:
    """Processes -> the folder of a whole run (finetune, score, finetune again), and what each verb printed.

    One process is this one; two are a cluster that runs one verb after the other.
    """
    return {1: whole_run(files, vectors, tmp_path_factory.mktemp("one"), in_this_process),
            2: whole_run(files, vectors, tmp_path_factory.mktemp("two"), in_a_cluster)}  # fmt: skip


def whole_run(files, vectors: Path, out: Path, run) -> tuple[Path, dict[str, str]]:
    finetune = ("train.py", "finetune", "--model", files["model"], "--data", files["benign"],
                "--vectors", vectors, "--out", out / "tuned", *TRAINING)  # fmt: skip
    commands = {
        "finetune": finetune,
        "score": ("eval.py", "score", "--model", out / "tuned/model", "--harmful", files["harmful"],
                  "--benign", files["benign"], "--questions", files["benign"], "--limit", 7,
                  "--reply-tokens", 8, "--out", out / "score"),
        "finetune again": finetune,
    }  # fmt: skip
    told = run([list(map(str, command)) for command in commands.values()])
    assert [code for code, _, _ in told] == [0] * len(commands), told
    return out, {name: output for name, (_, output, _) in zip(commands, told, strict=True)}


def in_this_process(commands: list[list[str]]) -> list[tuple[int, str, str]]:
    return [call(*command) for command in commands]


def in_a_cluster(commands: list[list[str]]) -> list[tuple[int, str, str]]:
    """What the first of two processes tells of each verb; the other may not speak."""
    flags = cluster_flags(2)
    with started(
        [("-m", "tests.verbs_in_turn", json.dumps([[*command, *TWO, *own] for command in commands])) for own in flags]
    ) as running:
        told = outputs(running, 600)
        assert [process.returncode for process in running] == [0, 0], told
    # Gloo, which carries the arrays between processes on a CPU, speaks for itself.
    first, second = ([json.loads(line) for line in out.splitlines() if "[Gloo]" not in line] for out, _ in told)
    assert not any(out.strip() for _, out, _ in second)
    return first


def everything_in(folder: Path) -> set[str]:
    # TensorBoard's files are named by the second, those of a checkpoint by their content.
    names = (path.relative_to(folder) for path in folder.rglob("*"))
    return {str(name).partition(".tfevents.")[0] for name in names if "checkpoints" not in name.parts}


def test_files_are_written_once_and_whole(done):
    (one, _), (two, _) = done[1], done[2]
    assert everything_in(one) == everything_in(two)
    assert {"tuned/model/config.json", "score/results.json"} <= everything_in(two)
    assert not any(".tmp" in name or "/." in name or name.startswith(".") for name in everything_in(two))
    check_losses(one / "tuned", two / "tuned")
    assert hub.load(two / "tuned/model").fingerprint


def check_losses(one: Path, two: Path) -> None:
    """The runs in both folders took the same steps with the same losses."""
    records = [[json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (one, two)]
    assert [record["step"] for record in records[1]] == list(range(1, 5))
    np.testing.assert_allclose(*([record["loss"] for record in own] for own in records), rtol=1e-5)


@pytest.mark.release  # phase 1 in two processes differs from phase 2 in which tree it updates alone
def test_vectors_of_two_processes_are_those_of_one(files, tmp_path):
    one = trained_vectors(files, tmp_path / "one", in_this_process)
    two = trained_vectors(files, tmp_path / "two", in_a_cluster)
    assert everything_in(one) == everything_in(two)
    check_losses(one, two)
    model = hub.load(files["model"])
    leaves = [jax.tree.leaves(load_vectors(folder, model)) for folder in (one, two)]
    for expected, leaf in zip(*leaves, strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=1e-3, atol=1e-5)


def test_results_tell_of_the_mesh_and_are_those_of_one_device(done):
    (one, _), (two, _) = done[1], done[2]
    for name in ("tuned", "score"):
        expected, results = Results.load(one / name), Results.load(two / name)
        assert results.environment["mesh"] == "fsdp=2" and results.environment["processes"] == "2"
        assert results.environment["devices"].startswith("2 x ") and "mesh" not in expected.environment
        (row,), (other,) = results.rows, expected.rows
        assert row["metrics"].keys() == other["metrics"].keys() and row["metrics"]
        for metric, score in row["metrics"].items():
            assert score["n"] == other["metrics"][metric]["n"]
            np.testing.assert_allclose(score["value"], other["metrics"][metric]["value"], rtol=1e-5, err_msg=metric)
            np.testing.assert_allclose(score["ci95"], other["metrics"][metric]["ci95"], rtol=1e-5, err_msg=metric)


def test_the_first_process_tells_what_one_process_would(done):
    """`in_a_cluster` has seen that the other says nothing."""
    for verb, words in {"finetune": "the model is in", "score": "refusal"}.items():
        for processes in (1, 2):
            assert words in done[processes][1][verb]


def test_a_second_start_does_nothing_again(done):
    """That it wrote no more steps is seen in `test_files_are_written_once_and_whole`."""
    for _, told in done.values():
        assert "finetune: done before" in told["finetune again"] and "done before" not in told["finetune"]


def test_a_signal_to_one_process_saves_and_ends_both_with_130(files, tmp_path):
    command = ("finetune", "--model", files["model"], "--data", files["harmful"], "--vectors", "none",
               "--out", tmp_path / "run", *TRAINING, "--max-steps", 400)  # fmt: skip
    with cluster("train.py", *command, *TWO) as running:
        log = tmp_path / "run/metrics.jsonl"
        while not (log.exists() and log.read_text().count("\n") > 3):
            assert running[0].poll() is None, running[0].communicate()
            time.sleep(0.02)
        os.kill(running[1].pid, signal.SIGTERM)
        told = outputs(running, 300)
        assert [process.returncode for process in running] == [130, 130], told
    assert "stopped: rerun the same command to resume" in told[0][1]
    stopped = json.loads(log.read_text().splitlines()[-1])["step"]
    assert (tmp_path / "run/checkpoints" / str(stopped)).is_dir()
    assert stopped < 400


@pytest.mark.parametrize(
    ("mesh", "model", "lines", "words"),
    [
        pytest.param("fsdp=3", "model", 4, "fsdp=3 needs 3 devices, but there are 2: the product of the axes must be 2",
                     marks=pytest.mark.release),
        ("", "model", 4, "2 processes need a mesh: set one, such as --mesh fsdp=2"),
        pytest.param("fsdp=2", "model", 3, "a batch of 3 sequences cannot be sharded over 2 devices",
                     marks=pytest.mark.release),
        ("tensor=2", "odd", 4, "mesh tensor=2 does not divide the model's 1 key-value heads: use tensor=1"),
    ],
)  # fmt: skip
def test_a_mesh_that_does_not_fit_is_one_line_with_the_numbers(files, tmp_path, mesh, model, lines, words):
    command = ("vectors", "--model", files[model], "--data", files["harmful"], "--benign", files["benign"],
               "--out", tmp_path / "run", "--batch-size", lines, "--mesh", mesh)  # fmt: skip
    with cluster("train.py", *command) as running:
        told = outputs(running, 300)
        assert [process.returncode for process in running] == [2, 2], told
    errors = [line for line in told[0][1].splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0]
    assert "Traceback" not in told[0][1] + told[1][1]
