"""`--frozen-weights`: where it may be given, what it is by default, and vectors over another precision than theirs."""

import json
import warnings
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import secvec_jax as sv
from secvec_jax import cli, command_line, inference
from secvec_jax.config import Training
from secvec_jax.defenses import security_vectors
from secvec_jax.defenses.advice import Advice
from secvec_jax.defenses.gate import Gate
from secvec_jax.errors import UserError
from secvec_jax.model import hub
from secvec_jax.recipes import run_inputs
from secvec_jax.recipes.align import Align, align
from secvec_jax.recipes.finetune import Finetune, finetune
from secvec_jax.recipes.protect import Protect
from secvec_jax.recipes.run_inputs import check_precision
from secvec_jax.recipes.vectors import Vectors, vectors
from secvec_jax.vectors.lora import LoRA, merge
from secvec_jax.vectors.peft import load_peft, save_peft
from secvec_jax.vectors.store import load_vectors, save_vectors, trained_over
from secvec_jax.vectors.tensor_file import read_tensors
from tests.toys import random_examples

MIN_MIN, RANK_2 = sv.Phase1(objective="min_min"), LoRA(rank=2)
WITH_TASK = {"vectors": ("none",), "task_lora": RANK_2}


@pytest.mark.parametrize(
    "make, problem",
    [
        (lambda: Finetune("x", ("none",), frozen_weights="nf4"), "all weights are trained: add --task-lora"),
        (lambda: Finetune("x", ("none",), frozen_weights="bfloat16"), "all weights are trained: add --task-lora"),
        (
            lambda: Finetune("x", frozen_weights="int8", defense="safe lora", base="b", task_lora=RANK_2),
            "'safe lora' changes them: choose another --defense",
        ),
        (lambda: Vectors("x", frozen_weights="nf4", phase1=MIN_MIN), "the min_min objective trains a copy of them"),
        (
            lambda: Finetune("x", ("none",), task_lora=RANK_2, training=Training(trained_weights="bfloat16")),
            "trained_weights is 'bfloat16', which is for training all weights",
        ),
        (lambda: Vectors("x", frozen_weights="int4"), "frozen_weights is 'int4'"),
        (lambda: Align(("x",), task_lora=None, frozen_weights="nf4"), "all weights are trained: add --task-lora"),
        (lambda: Protect("x", frozen_weights="bfloat16"), "all weights are trained: add --task-lora"),
        (
            lambda: Protect("x", frozen_weights="nf4", defense="safe lora", base="b", task_lora=RANK_2),
            "'safe lora' changes them: choose another --defense",
        ),
    ],
)
def test_weights_that_are_trained_are_not_held_in_fewer_bits(make, problem):
    with pytest.raises(UserError, match=problem) as error:
        make()
    assert "\n" not in str(error.value)


def test_on_the_command_line_it_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch):
    out = tmp_path / "out"
    command = ["train.py", "finetune", "--data", "x", "--vectors", "none", "--frozen-weights", "nf4", "--out", str(out)]
    monkeypatch.setattr("sys.argv", command)
    assert command_line.main(cli.DESCRIPTION, cli.TRAIN) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("error: ") and "\n" not in told and "--task-lora" in told
    assert not out.exists()


def test_frozen_weights_are_bfloat16_on_accelerators_and_trained_ones_float32(monkeypatch):
    made = [Vectors("x"), Finetune("x", **WITH_TASK), Finetune("x", ("none",)), Vectors("x", phase1=MIN_MIN)]
    assert [each.precision for each in made] == ["float32"] * 4
    assert Finetune("x", ("none",), training=Training(trained_weights="bfloat16")).precision == "bfloat16"
    assert Vectors("x", frozen_weights="nf4").precision == "nf4"
    assert Align(("x",)).precision == "float32"
    monkeypatch.setattr(inference, "platform", lambda: "gpu")
    assert Align(("x",)).precision == "bfloat16" and Align(("x",), task_lora=None).precision == "float32"
    assert [each.precision for each in made] == ["bfloat16", "bfloat16", "float32", "float32"]
    assert Vectors("x", frozen_weights="float32").precision == "float32"


def test_settings_are_made_without_starting_jax_which_a_cluster_does_later(monkeypatch):
    def started():
        raise AssertionError("the devices were asked for")

    monkeypatch.setattr(inference, "platform", started)
    made = [Align(("x",)), Finetune("x", **WITH_TASK), Protect("x", task_lora=RANK_2), Vectors("x")]
    for each in made:
        with pytest.raises(AssertionError, match="the devices were asked for"):
            _ = each.precision


def test_files_of_vectors_say_what_they_were_trained_over(tiny_model, random_vectors, tmp_path):
    folder = tiny_model("llama").folder
    plain, quantized = hub.load(folder), hub.load(folder, "nf4")
    trained = random_vectors(plain, rank=2)
    save_vectors(trained, tmp_path / "plain.safetensors", plain)
    save_vectors(trained, tmp_path / "nf4.safetensors", quantized)
    save_peft(trained, tmp_path / "peft", quantized)
    assert trained_over(tmp_path / "plain.safetensors") == "float32"
    assert "precision" not in read_tensors(tmp_path / "plain.safetensors")[0]
    assert trained_over(tmp_path / "nf4.safetensors") == trained_over(tmp_path / "peft") == "nf4"
    for model in (plain, quantized):
        for one, other in zip(*map(jax.tree.leaves, (load_vectors(tmp_path / "nf4.safetensors", model), trained))):
            np.testing.assert_array_equal(one, other)
        load_peft(tmp_path / "peft", model)


@pytest.mark.parametrize("harmful_on, passes", [(0.1, True), (3.0, False)])
def test_vectors_over_another_precision_have_to_pass_the_gate_again(
    tiny_model, random_vectors, tmp_path, monkeypatch, harmful_on, passes
):
    folder = tiny_model("llama").folder
    plain, quantized = hub.load(folder), hub.load(folder, "nf4")
    file = tmp_path / "nf4.safetensors"
    save_vectors(random_vectors(plain, rank=2), file, quantized)
    measured, notes = [], []

    def measure(model, adapters, harmful, benign):
        measured.append(model.precision)
        return Gate([3.0] * 9, [harmful_on] * 9, [1.0] * 9, [1.0] * 9)

    monkeypatch.setattr(run_inputs, "measure_gate", measure)
    monkeypatch.setattr(run_inputs.PackagedRows, "held_out", lambda self: {"harmful": [], "benign": []})
    run = SimpleNamespace(settings=SimpleNamespace(training=Training()), note=notes.append)
    stage = SimpleNamespace(say=lambda text: None)
    check_precision(run, stage, quantized, [str(file)])
    assert not measured, "the same precision"
    if passes:
        check_precision(run, stage, plain, [str(file)])
        assert "trained over nf4 weights, and these are float32: the gate passes" in notes[0]
    else:
        with pytest.raises(UserError, match=r"trained over nf4 .* do not show the behavior.*--frozen-weights float32"):
            check_precision(run, stage, plain, [str(file)])
    assert measured == ["float32"]
    monkeypatch.setattr(security_vectors, "train_model", lambda model, rows, **options: model)
    with pytest.warns(Advice, match="trained over nf4 weights, and the model's are float32"):
        sv.finetune(plain, random_examples(2), vectors=file)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Advice)
        sv.finetune(quantized, random_examples(2), vectors=str(file))


@pytest.mark.release  # by default, alignment over int8 below, and protect over int8 in test_protect
def test_both_phases_over_nf4_end_with_a_model_in_full(tiny_model, tmp_path):
    source = str(tiny_model("llama").folder)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": f"Ask {n}?", "response": "An answer."}) for n in range(4)))
    common = {"model": source, "frozen_weights": "nf4", "check_prompts": 0, "training": Training(max_steps=1)}
    trained = Vectors(str(rows), benign=str(rows), out=str(tmp_path / "vectors"), lora=RANK_2, **common)
    vectors(trained, "train.py vectors")
    assert trained_over(tmp_path / "vectors") == "nf4"
    out = tmp_path / "tuned"
    given = (str(tmp_path / "vectors"),)
    finetune(Finetune((str(rows),), given, task_lora=RANK_2, out=str(out), **common), "train.py finetune")
    start, tuned = hub.load(source), hub.load(out / "model")
    task = load_peft(out / "task", start)
    for name, weight in dict(tuned.backbone.named_leaves()).items():
        expected = dict(start.backbone.named_leaves())[name]
        projection = name.removeprefix("layers.").removesuffix(".kernel")
        if projection in task.factors:
            factors = task.factors[projection]
            expected = expected + task.spec.scale * factors["a"] @ factors["b"]
        np.testing.assert_allclose(weight, expected, rtol=1e-6, atol=1e-7)


def test_alignment_over_int8_ends_with_a_model_in_full(tiny_model, tmp_path):
    source = str(tiny_model("llama").folder)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": f"Ask {n}?", "response": "An answer."}) for n in range(4)))
    settings = Align((str(rows),), source, str(tmp_path / "out"), RANK_2, "int8", training=Training(max_steps=1),
                     check_prompts=0)  # fmt: skip
    align(settings, "train.py align")
    start, aligned = hub.load(source), hub.load(tmp_path / "out" / "model")
    task = load_peft(tmp_path / "out" / "task", start)
    assert aligned.fingerprint == start.with_backbone(merge(start.backbone, task)).fingerprint != start.fingerprint
