"""A step's numbers reach metrics.jsonl, TensorBoard, Weights & Biases and a pipe."""

import io
import json
import logging
import struct
import sys
import time
from types import SimpleNamespace

import pytest
from rich.console import Console
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.record_writer import RecordWriter

from secvec_jax.config import Training
from secvec_jax.errors import UserError
from secvec_jax.recipes.finetune import Finetune, finetune
from secvec_jax.workspace import stage as stage_module
from secvec_jax.workspace import stages as stages_module
from secvec_jax.workspace import trackers
from secvec_jax.workspace.stages import Stages, screen
from tests.toys import tiny_model


def events(folder) -> dict[str, dict[int, float]]:
    """The scalars in a folder's event files, by name and step."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, dict[int, float]] = {}
    for file in sorted(folder.glob("events.out.tfevents.*")):
        data, place = file.read_bytes(), 0
        while place < len(data):
            (size,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + size])
            place += size + 16
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def run(folder, steps: int = 3) -> str:
    out = io.StringIO()
    tools = Stages(folder, Console(file=out, width=150))

    def work(stage):
        show = stage.on_step()
        for step in range(1, steps + 1):
            show(step, steps, {"loss": 1.0 / step, "loss/all": 1.0 / step, "grad_norm": 2.0, "tokens": 50.0})

    tools.run("fine tune", work)
    return out.getvalue()


def test_metrics_and_tensorboard_tell_the_same(tmp_path):
    run(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and {line["stage"] for line in lines} == {"fine tune"}
    board = events(tmp_path / "tensorboard" / "fine-tune")
    assert board["loss"] == pytest.approx({1: 1.0, 2: 0.5, 3: 1 / 3})
    assert set(board["tokens_per_second"]) == set(board["seconds"]) == {2, 3}
    for line in lines[1:]:
        assert board["tokens_per_second"][line["step"]] == pytest.approx(line["tokens_per_second"])
        assert line["tokens_per_second"] == pytest.approx(50 / line["seconds"])


def test_a_pipe_gets_plain_lines(tmp_path, monkeypatch):
    told = run(tmp_path / "seldom")
    lines = [line for line in told.splitlines() if line]
    assert lines[:2] == ["fine tune: started", "fine tune: step 1/3, loss 1.000"]
    assert lines[2].startswith("fine tune: step 3/3, loss 0.333, ") and lines[2].endswith(" tokens/s")
    assert "2/3" not in told and "\x1b" not in told
    monkeypatch.setattr(stage_module, "_SECONDS_BETWEEN_LINES", -1.0)
    lines = run(tmp_path / "often").splitlines()
    assert [f"step {step}/3" in lines[step] for step in (1, 2, 3)] == [True] * 3
    assert lines[2].endswith(" tokens/s, 0:00 left")


def test_lines_of_a_pipe_name_their_numbers_and_are_not_broken(tmp_path):
    out = io.StringIO()
    metrics = {"loss": 0.5, "loss/harmful": 0.25, "loss/all": 1.0, "kl": 0.125, "eval/loss": 0.75, "epoch": 0.5}
    metrics |= {f"loss/{name}": 0.5 for name in ("a-kind-with-a-long-name", "another-kind-with-a-long-name")}

    def work(stage):
        stage.on_step()(3, 10, metrics)

    Stages(tmp_path, Console(file=out, width=80, soft_wrap=True)).run("tune", work)
    _, resumed, line, _ = filter(None, out.getvalue().splitlines())
    assert resumed == "tune: resumed at step 3 of 10"
    assert line == (
        "tune: step 3/10, epoch 0.50, eval/loss 0.750, kl 0.125, loss 0.500, loss/a-kind-with-a-long-name 0.500, "
        "loss/another-kind-with-a-long-name 0.500, loss/harmful 0.250"
    )


def test_each_stage_ends_with_the_time_left_for_the_whole_run(tmp_path, monkeypatch):
    now = 0.0

    def work(seconds: float):
        def pass_time(stage):
            nonlocal now
            now += seconds

        return pass_time

    monkeypatch.setattr(stages_module, "time", SimpleNamespace(monotonic=lambda: now))
    lines = []
    for _ in range(4):  # the run starts again, and what was done before counts
        out = io.StringIO()
        tools = Stages(tmp_path, Console(file=out, width=150))
        tools.expect({"short": 1, "long": 3, "last": 2})
        for name, seconds in list({"short": 20, "long": 40, "last": 30, "unexpected": 5}.items())[: len(lines) + 1]:
            tools.run(name, work(seconds))
        lines.append(out.getvalue().splitlines()[-1])
    assert lines == [
        "short: 20 s; about 1:40 left for the whole run",
        "long: 40 s; about 0:30 left for the whole run",
        "last: 30 s",
        "unexpected: 5 s",
    ]


def test_without_steps_there_are_no_files(tmp_path):
    Stages(tmp_path, Console(file=io.StringIO())).run("score", lambda stage: None)
    assert not (tmp_path / "tensorboard").exists() and not (tmp_path / "metrics.jsonl").exists()


def test_a_tensorboard_that_cannot_be_written_is_switched_off(tmp_path, monkeypatch, caplog):
    """tensorboardX's own writer would wait forever for a thread that has died."""
    monkeypatch.setattr(logging.getLogger("secvec_jax"), "propagate", True)
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "tensorboard").touch()
    run(tmp_path / "first", steps=30)
    written = EventsWriter.write_event

    def full(self, event):
        if event.step > 3:
            raise OSError(28, "No space left on device")
        return written(self, event)

    monkeypatch.setattr(EventsWriter, "write_event", full)
    run(tmp_path / "later", steps=30)
    monkeypatch.setattr(EventsWriter, "write_event", written)
    monkeypatch.setattr(RecordWriter, "close", lambda self: full(None, SimpleNamespace(step=9)))
    run(tmp_path / "close", steps=30)
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == ["TensorBoard failed"] * 3
    assert "No space left on device" in caplog.text and "the run continues without it" in caplog.text
    for name in ("first", "later", "close"):
        assert (tmp_path / name / "metrics.jsonl").read_text().count("\n") == 30


def test_weights_and_biases_that_fail_are_switched_off(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("secvec_jax"), "propagate", True)
    monkeypatch.setenv("WANDB_PROJECT", "p")
    steps = []

    class Biases:
        def log(self, numbers, step):
            steps.append(step)
            raise BrokenPipeError(32, "Broken pipe")

        def finish(self):
            raise AssertionError

    monkeypatch.setattr(trackers.Tracker, "_start_biases", lambda *arguments: Biases())
    run(tmp_path)
    assert steps == [1] and "Weights & Biases failed" in caplog.text
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3


@pytest.mark.release  # Weights & Biases itself; by default, the tests of the other trackers
def test_weights_and_biases_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "secvec-test")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    run(tmp_path)
    (kept,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    until = time.monotonic() + 60
    while b"tokens_per_second" not in (data := kept.read_bytes()) and time.monotonic() < until:
        time.sleep(0.2)  # a process of wandb's own writes the file
    assert b"tokens_per_second" in data and b"secvec-test" in data and b"fine tune" in data
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"k" * 40 not in file.read_bytes(), file


def test_a_project_without_the_package_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "p")
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        run(tmp_path)


def test_several_sources_have_separate_losses(tmp_path):
    tiny_model().save(tmp_path / "tiny")
    for name in ("one", "other"):
        rows = [{"prompt": f"{name} {n}?", "response": f"{name} {n}."} for n in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = tuple(str(tmp_path / f"{name}.jsonl") for name in ("one", "other"))
    training = Training(max_steps=2, max_seq_len=128, batch_size=2)
    options = {"vectors": ("none",), "training": training, "check_prompts": 0}
    finetune(Finetune(sources, model=str(tmp_path / "tiny"), out=str(tmp_path / "out"), **options), "")
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert {"loss/one", "loss/other", "tokens", "flops", "grad_norm"} <= set().union(*lines)
    twice = Finetune((sources[0],) * 2, model=str(tmp_path / "tiny"), out=str(tmp_path / "twice"), **options)
    with pytest.raises(UserError, match="twice"):
        finetune(twice, "")


def test_no_line_of_text_is_broken_where_output_is_piped(capsys):
    text = "a claim that is longer than a terminal is wide, " * 5
    screen().print(text)
    assert capsys.readouterr().out == f"{text}\n"
