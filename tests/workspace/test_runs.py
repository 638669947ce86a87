"""Results of verbs belong to the content of their inputs: changed inputs are reported, refused, or run again."""

import json
import logging
from pathlib import Path

import pytest
from rich.console import Console

import secvec_jax as sv
from secvec_jax import digests, inference
from secvec_jax.config import Training
from secvec_jax.errors import UserError
from secvec_jax.grid.grid import _hold, _part_folder
from secvec_jax.recipes import finetune as finetune_module
from secvec_jax.recipes.audit import AuditRun
from secvec_jax.recipes.finetune import Finetune
from secvec_jax.recipes.score import ScoreRun, score
from secvec_jax.workspace import inputs, run_directory
from secvec_jax.workspace.runs import Run
from secvec_jax.workspace.stages import Stages


@pytest.fixture(autouse=True)
def settled(monkeypatch, own_cache):
    monkeypatch.setattr(digests, "_UNSETTLED", 0.0)
    yield
    for folder in list(run_directory._locks):
        run_directory.release(folder)


def write(path: Path, word: str, count: int = 6) -> str:
    rows = [{"prompt": f"q{i}", "response": f"{word} {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def finetune(model: Path, data: str, out: Path, **changes) -> None:
    training = Training(
        **{"max_steps": 2, "batch_size": 2, "max_seq_len": 64, "remat": "none"} | changes.pop("training", {})
    )
    finetune_module.finetune(
        Finetune(
            **{
                "data": (data,),
                "model": str(model),
                "vectors": ("none",),
                "out": str(out),
                "training": training,
                "check_prompts": 0,
            }
            | changes
        ),
        "command",
    )


def test_a_finished_training_is_of_its_rows_and_its_model(tiny_model, tmp_path, capsys, caplog):
    folder, out = tiny_model("llama").folder, tmp_path / "run"
    data = write(tmp_path / "rows.jsonl", "alpha")
    finetune(folder, data, out)
    before = (out / "model" / "model.safetensors").read_bytes()
    capsys.readouterr()
    finetune(folder, data, out)
    assert "done before" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"run", "rows.jsonl", "cache"}, "nothing next to the rows"

    write(tmp_path / "rows.jsonl", "other")
    with pytest.raises(UserError, match=r"--data .*rows.jsonl has changed since .*--overwrite"):
        finetune(folder, data, out)
    finetune(folder, data, out, overwrite=True)
    after = (out / "model" / "model.safetensors").read_bytes()
    assert after != before
    finetune(folder, data, out)  # and now it is of these rows
    assert "done before" in capsys.readouterr().out

    with pytest.raises(UserError, match="cannot be extended"):
        finetune(folder, data, out, training={"max_steps": 3})
    Path(data).unlink()
    with caplog.at_level(logging.WARNING):
        finetune(folder, data, out)
    assert "done before" in capsys.readouterr().out, "what is gone cannot have changed"


def test_an_extended_run_is_the_longer_run(tiny_model, tmp_path, capsys):
    folder, data = tiny_model("llama").folder, write(tmp_path / "rows.jsonl", "alpha")
    constant = {"schedule": "constant", "warmup_steps": 0}
    finetune(folder, data, tmp_path / "long", training=constant | {"max_steps": 4})
    finetune(folder, data, tmp_path / "run", training=constant | {"max_steps": 2})
    capsys.readouterr()
    finetune(folder, data, tmp_path / "run", training=constant | {"max_steps": 4})
    assert "resumed at step 3 of 4" in capsys.readouterr().out
    one, two = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("long", "run"))
    assert one == two
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_a_score_is_of_the_model_that_is_there(tiny_model, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama").folder, folder)
    rows = write(tmp_path / "rows.jsonl", "alpha", 2)
    settings = ScoreRun(model=str(folder), harmful=(rows,), benign=(rows,), reply_tokens=4, out=str(tmp_path / "score"))
    score(settings, "command")
    (folder / "README.md").write_text("a card is not the model")
    score(settings, "command")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 77}))
    with pytest.raises(UserError, match=r"--model .* has changed since"):
        score(settings, "command")


# Stages that read others ---------------------------------------------------------------------------


def test_a_stage_runs_again_when_what_it_reads_or_leaves_has_changed(tmp_path, capsys):
    read, made = tmp_path / "aligned", tmp_path / "vectors"
    read.write_text("1")
    forgotten: list[int] = []

    def start(work=lambda stage: made.read_text()) -> str:
        stages = Stages(tmp_path / "run", Console())
        made.exists() or made.write_text("made")
        return stages.run("vectors", work, reads={"the aligned model": read, "rows": "sha256:0"},
                          makes={"the vectors": made}, forget=lambda: forgotten.append(1))  # fmt: skip

    assert start() == start() == "made" and not forgotten
    assert "done before" in capsys.readouterr().out
    made.write_text("by hand")
    assert start() == "by hand" and not forgotten, "on what is there now"
    assert "the vectors has changed, so it runs again" in capsys.readouterr().out
    read.write_text("2")
    assert start() == "by hand" and len(forgotten) == 1
    read.unlink()
    assert start() == "by hand" and len(forgotten) == 1, "what is gone cannot have changed"

    # A stage that was stopped, too.
    def stops(stage):
        raise KeyboardInterrupt

    read.write_text("3")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            start(stops)
    assert len(forgotten) == 2
    read.write_text("4")
    assert start() == "by hand" and len(forgotten) == 3


def test_stages_of_an_earlier_version_are_kept(tmp_path):
    read = tmp_path / "aligned"
    read.write_text("1")
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "plain.json").write_text(json.dumps(run_directory.stage_record(1.0, {"result": 7})))
    (tmp_path / "stages" / "vectors.seconds").write_text("3.5")
    stages = Stages(tmp_path, Console(quiet=True))
    assert stages.run("plain", lambda stage: 8, reads={"the aligned model": read}) == 7
    stages.run("vectors", lambda stage: 8, reads={"the aligned model": read})
    assert stages.seconds["vectors"] >= 3.5


# Contents -------------------------------------------------------------------------------------------


def test_models_adapters_and_rows_have_a_content_whatever_names_them(tiny_model, tmp_path):
    folder = tiny_model("llama").folder
    assert inputs.model(str(folder)) == inputs.of_path(folder) != inputs.model("smollm2")
    parts = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    for part in parts:
        part.write_text("a")
    before = inputs.model(str(parts[0]))
    parts[1].write_text("b")
    assert inputs.model(str(parts[0])) != before, "a split file is all of its parts"
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    before = inputs.adapter(str(tmp_path / "peft"))
    (tmp_path / "peft" / "adapter_model.safetensors").write_text("w")
    assert inputs.adapter(str(tmp_path / "peft")) != before
    assert inputs.known(inputs.model, str(tmp_path / "gone")) is None
    assert not inputs.inputs_of(ScoreRun(model="", harmful=(), benign=()))
    rows = write(tmp_path / "rows.jsonl", "a")
    assert inputs.inputs_of(Finetune(data=(rows,), model=str(folder), vectors=("gone",))) == {
        f"--data {rows}": inputs.rows(rows),
        f"--model {folder}": inputs.model(str(folder)),
        "--vectors gone": None,
    }


def test_of_an_audit_every_model_must_be_there_before_the_first_is_measured(tiny_model):
    folder = str(tiny_model("llama").folder)
    inputs.check_there(vars(AuditRun(before=folder, after="smollm2")))
    for given in ({"after": "/gone"}, {"reference": "/gone"}, {"unaligned": "/gone"}):
        with pytest.raises(UserError, match="no model '/gone'"):
            inputs.check_there(vars(AuditRun(**{"before": folder, "after": folder} | given)))
        with pytest.raises(UserError, match="no model '/gone'"):
            sv.audit(**{"before": folder, "after": folder} | given)
    with pytest.raises(UserError, match="after is 3: pass"):
        sv.audit(folder, 3)


def test_parts_of_a_grid_run_together_and_other_divisions_do_not(tmp_path, monkeypatch):
    _hold(tmp_path, "1/2", exclusive=False)
    _hold(tmp_path, "2/2", exclusive=False)
    monkeypatch.setattr("secvec_jax.grid.grid.lock", _held_elsewhere)
    for part, alone in (("1/3", False), ("1/2", True)):
        with pytest.raises(UserError, match="another process runs part"):
            _hold(tmp_path, part, alone)
    assert _part_folder(tmp_path, "1/3").resolve() not in run_directory._locks


def _held_elsewhere(folder):
    raise UserError("held")


def test_a_run_keeps_what_weights_are_held_in(tiny_model, tmp_path, monkeypatch):
    """The default differs on other devices, and results over weights in another precision are other results."""
    settings = ScoreRun(str(tiny_model("llama").folder), out=str(tmp_path / "run"))
    run = Run(settings, "command")
    run.stages.run("score", lambda stage: {"measured": 1.0})
    run_directory.release(run.folder)
    monkeypatch.setattr(inference, "platform", lambda: "gpu")
    with pytest.raises(UserError, match=r"what weights are held in .* was 'float32', is now 'bfloat16'"):
        Run(settings, "command")
