"""Validation rows: their loss is that of the rows themselves, and training is what it would be without them."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest

from secvec_jax.config import Training
from secvec_jax.data.normalize import as_rows
from secvec_jax.data.rows import row
from secvec_jax.defenses.finetuning import examples_of, train_model
from secvec_jax.defenses.held_out import hold_out
from secvec_jax.defenses.inputs import groups_of, row_keys
from secvec_jax.defenses.mixing import Replay, VLGuard
from secvec_jax.defenses.security_vectors import Phase1, SecurityVectors, finetune, train_vectors
from secvec_jax.errors import UserError
from secvec_jax.recipes.align import Align
from secvec_jax.recipes.finetune import Finetune
from secvec_jax.recipes.protect import Protect, protect
from secvec_jax.recipes.vectors import Vectors
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.trees import fingerprint, num_parameters
from secvec_jax.vectors.lora import LoRA
from secvec_jax.vectors.steering import Steering
from tests.defenses.toy_inputs import ToyInputs
from tests.toys import losses_alone, tiny_model

ROWS = [row(f"What is {n}?", f"It is {n * n}.") for n in range(12)]
EVAL_ROWS = [row(f"And {n}?", "Yes, " * (n + 1)) for n in range(5)]
TRAINING = Training(epochs=3, max_seq_len=64, batch_size=2, learning_rate=0.05, warmup_steps=0, remat="none")


@pytest.fixture(scope="module")
def vectors():
    fresh = LoRA(rank=2).init(tiny_model().architecture, jax.random.key(1))
    return jax.tree.map(lambda leaf: leaf + 0.05, fresh)


def train(eval_rows=None, training=TRAINING, rows=ROWS, **options):
    """(the model, {step: its metrics})"""
    told = {}
    model = train_model(
        tiny_model(), rows, eval_rows=eval_rows, training=training,
        on_step=lambda step, steps, metrics: told.update({step: metrics}), **options,
    )  # fmt: skip
    return model, told


def test_the_loss_is_that_of_each_token_under_the_vectors_and_training_is_unchanged(vectors):
    plain, without = train(vectors=vectors)
    model, told = train(EVAL_ROWS, vectors=vectors)
    assert fingerprint(model.backbone) == fingerprint(plain.backbone)
    evaluated = {step for step, metrics in told.items() if "eval/loss" in metrics}
    steps = max(told)
    assert steps in evaluated and len(evaluated) in (3, 4)
    for step, metrics in told.items():
        assert {name: value for name, value in metrics.items() if name != "eval/loss"} == without[step]
    losses = np.concatenate([losses_alone(model, e, vectors) for e in examples_of(model, EVAL_ROWS)])
    np.testing.assert_allclose(told[steps]["eval/loss"], losses.mean(), rtol=1e-4)


def test_kinds_of_validation_rows_are_reported_separately_and_weighted_by_tokens():
    model, told = train({"few": EVAL_ROWS[:1], "many": EVAL_ROWS[1:]})
    last = told[max(told)]
    counts = {}
    for name, rows in (("few", EVAL_ROWS[:1]), ("many", EVAL_ROWS[1:])):
        losses = np.concatenate([losses_alone(model, e) for e in examples_of(model, rows)])
        counts[name] = len(losses)
        np.testing.assert_allclose(last[f"eval/loss/{name}"], losses.mean(), rtol=1e-4)
    weighted = sum(counts[name] * last[f"eval/loss/{name}"] for name in counts) / sum(counts.values())
    np.testing.assert_allclose(last["eval/loss"], weighted, rtol=1e-6)


def test_the_best_model_by_validation_is_returned_and_a_stopped_training_returns_the_same(tmp_path):
    class Stop(Exception):
        pass

    def stop(step, steps, metrics):
        if step == 5:
            raise Stop

    hot = Training(**(vars(TRAINING) | {"learning_rate": 3.0, "eval_every_steps": 2, "patience": 2, "epochs": 30}))
    told = {}

    def note(step, steps, metrics):
        told[step] = metrics

    options = {"eval_rows": EVAL_ROWS, "training": hot}
    whole = train_model(tiny_model(), ROWS, checkpoints=Checkpoints(tmp_path / "whole", 1e9), on_step=note, **options)
    losses = {step: metrics["eval/loss"] for step, metrics in told.items() if "eval/loss" in metrics}
    best = min(losses, key=losses.get)
    assert max(told) == best + 4 < 60, "patience ends it two evaluations after the lowest loss"
    again = Checkpoints(tmp_path / "stopped", 0.0)
    with pytest.raises(Stop):
        train_model(tiny_model(), ROWS, checkpoints=again, on_step=stop, **options)
    resumed = train_model(tiny_model(), ROWS, checkpoints=again, **options)
    assert fingerprint(resumed.backbone) == fingerprint(whole.backbone)
    found = np.concatenate([losses_alone(whole, e) for e in examples_of(whole, EVAL_ROWS)])
    np.testing.assert_allclose(losses[best], found.mean(), rtol=1e-4)
    others = {"eval_rows": EVAL_ROWS[1:], "training": hot}
    with pytest.raises(UserError, match="validation rows 'all' has changed"):
        train_model(tiny_model(), ROWS, checkpoints=again, **others)


def test_a_fraction_is_held_out_of_every_kind_by_the_seed():
    rows = {"a": as_rows(ROWS), "b": EVAL_ROWS}
    kept, held = hold_out(groups_of(rows), 0.25, seed=3)
    assert {name: len(some) for name, some in held.items()} == {"a": 3, "b": 1}
    for name, some in rows.items():
        assert sorted(map(json.dumps, [*kept[name], *held[name]])) == sorted(map(json.dumps, some))
        assert [r for r in some if r in held[name]] == list(held[name]), "in their order"
    assert hold_out(groups_of(rows), 0.25, seed=3)[1] == held
    assert any(hold_out(groups_of(rows), 0.25, seed=seed)[1] != held for seed in range(3))
    examples = examples_of(tiny_model(), ROWS)
    kept, held = hold_out({"all": examples}, 0.5, seed=0)
    assert len(kept["all"]) == len(held["all"]) == 6
    assert {id(e) for e in [*kept["all"], *held["all"]]} == set(map(id, examples))


def test_no_copy_of_a_row_that_is_held_out_is_trained_on():
    thrice = [*ROWS, *ROWS[:6], *ROWS[:6]]
    for rows in (thrice, examples_of(tiny_model(), thrice), as_rows(thrice)):
        for seed in range(4):
            kept, held = hold_out({"all": rows}, 0.25, seed)
            assert 4 <= len(held["all"]) <= 6 and len(kept["all"]) + len(held["all"]) == 24
            assert not set(row_keys(kept["all"])) & set(row_keys(held["all"]))
    kept, held = hold_out({"a": ROWS[:8], "b": ROWS[4:]}, 0.5, seed=0)
    assert sorted(map(json.dumps, held["a"])) == sorted(map(json.dumps, ROWS[:4])), "the others are in both"
    kept, held = hold_out({"all": ROWS[:2] * 5}, 0.1, seed=0)
    assert len(held["all"]) == 5, "more than asked for, where it has no row with fewer copies"
    with pytest.raises(UserError, match="too few rows"):
        hold_out({"all": ROWS[:1] * 9}, 0.1, seed=0)


@pytest.mark.parametrize("defense", [VLGuard(), Replay(), SecurityVectors(safe=0.5)], ids=lambda d: d.label)
def test_no_row_that_a_defense_adds_is_held_out(monkeypatch, vectors, defense):
    seen = {}

    def fit(params, phase, train_step, streams, *, validation, **options):
        seen.update(learned=streams["learn"].examples, held_out=validation.stream.examples)
        return params

    monkeypatch.setattr("secvec_jax.defenses.finetuning.fit", fit)

    class Inputs(ToyInputs):
        @property
        def options(self):
            return super().options | {"eval_rows": 0.25}

    defense.apply(Inputs(tiny_model(), {"mine": ROWS}, training=TRAINING, vectors=vectors, safe=EVAL_ROWS * 3))
    assert {kind: len(rows) for kind, rows in seen["held_out"].items()} == {"mine": 3}
    learned = {kind: len(rows) for kind, rows in seen["learned"].items()}
    assert learned.pop("mine") == 9 and learned["safe"] in (6, 12)


def test_validation_rows_without_weight_are_refused():
    weightless = [dataclasses.replace(e, weights=np.zeros(len(e.tokens), np.float32))
                  for e in examples_of(tiny_model(), EVAL_ROWS)]  # fmt: skip
    with pytest.raises(UserError, match="no token of the validation rows counts"):
        train(weightless)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, True])
def test_a_fraction_that_holds_out_nothing_or_everything_is_refused(fraction):
    with pytest.raises(UserError, match="eval_rows is"):
        finetune(tiny_model(), ROWS, vectors=None, eval_rows=fraction)
    with pytest.raises(UserError, match="too few rows"):
        finetune(tiny_model(), ROWS[:1], vectors=None, eval_rows=0.5)


@pytest.mark.parametrize("name", ["patience", "eval_every_steps"])
def test_settings_of_validation_are_refused_where_no_rows_are_validated_on(name):
    watched = Training(**(vars(TRAINING) | {name: 2}))
    for asked in (
        lambda: finetune(tiny_model(), ROWS, vectors=None, training=watched),
        lambda: train_vectors(tiny_model(), ROWS, benign=ROWS, training=watched),
        lambda: Align(data=("refusals", "alpaca"), training=watched),
        lambda: Vectors(data="advbench", training=watched),
        lambda: Finetune(data=("alpaca",), vectors=("v",), training=watched),
        lambda: Protect(data=("alpaca",), training=watched),
        lambda: protect(tiny_model(), ROWS, training=watched),
    ):
        with pytest.raises(UserError, match=f"{name} is 2, and no validation rows are given"):
            asked()
    settings = Finetune(data=("alpaca",), vectors=("v",), training=watched, eval_fraction=0.1)
    assert getattr(settings.training, name) == 2


def test_the_best_step_is_refused_where_no_checkpoint_could_keep_it():
    best = Training(**(vars(TRAINING) | {"best": "loss/all"}))
    for asked in (
        lambda: finetune(tiny_model(), ROWS, vectors=None, training=best),
        lambda: train_vectors(tiny_model(), ROWS, benign=ROWS, training=best),
    ):
        with pytest.raises(UserError, match="best is 'loss/all', and without checkpoints"):
            asked()


def test_vectors_that_were_never_trained_are_reported(caplog, vectors):
    short, model = Training(**(vars(TRAINING) | {"max_steps": 1})), tiny_model()
    train(vectors=vectors, training=short)
    assert "initial values" not in caplog.text
    for spec in (LoRA(rank=2), Steering()):
        caplog.clear()
        train(vectors=(vectors, spec.init(model.architecture, jax.random.key(0))), training=short)
        assert f"{spec!r}, " in caplog.text and "parameters) still have their initial values" in caplog.text


def test_a_warmup_as_long_as_the_training_is_reported(caplog):
    for warmup_steps, steps in ((9, 5), (5, 5), (4, 5), (3, 1)):  # the last is the default
        caplog.clear()
        train(training=Training(**(vars(TRAINING) | {"warmup_steps": warmup_steps, "max_steps": steps})))
        reported = f"warmup_steps is {warmup_steps}, and the training has 5 steps: the learning rate reaches 0.05"
        assert (reported in caplog.text) == (warmup_steps >= steps > 1)
    caplog.clear()
    cross_entropy = {"phase1": Phase1("cross_entropy"), "training": Training(warmup_steps=9, max_steps=2)}
    train_vectors(tiny_model(), ROWS, LoRA(rank=2), **cross_entropy)
    assert "warmup_steps is 9, and the training has 2 steps" in caplog.text


def test_validation_rows_that_are_trained_on_are_counted(caplog):
    short = Training(**(vars(TRAINING) | {"max_steps": 1}))
    train(EVAL_ROWS, training=short)
    assert "validation rows are also" not in caplog.text
    train({"old": [*EVAL_ROWS, ROWS[3]], "new": [dict(ROWS[5])]}, training=short, rows={"a": ROWS[:5], "b": ROWS[5:]})
    assert "2 of 7 validation rows are also among the rows to train on" in caplog.text
    caplog.clear()
    examples = examples_of(tiny_model(), ROWS)
    train(examples[:3], training=short, rows=examples)
    assert "3 of 3 validation rows are also" in caplog.text


def test_a_training_says_what_it_is_about_to_do_and_at_which_rate_and_epoch_it_is(caplog, vectors):
    caplog.set_level(logging.INFO, "secvec_jax")
    model, told = train(vectors=vectors, training=Training(**(vars(TRAINING) | {"schedule": "linear"})))
    messages = [r.getMessage() for r in caplog.records]
    assert sum("12 rows" in message for message in messages) == 1, "the number of rows is logged once"
    (text,) = [message for message in messages if "devices: " in message]
    packed, steps, trained, device, attention = text.splitlines()
    tokens = sum(len(e.tokens) for e in examples_of(model, ROWS))
    assert packed.startswith(f"tokens: {tokens}, in about ") and packed.endswith(" packed sequences of 64")
    assert steps.startswith(
        f"steps: {max(told)}, 3 epochs, each of 2 packed sequences (on all devices together), about"
    )
    assert f"trained: {num_parameters(model.backbone):,} of " in trained
    assert trained.endswith(f"active vectors: {num_parameters(vectors):,} parameters, frozen")
    assert device.startswith("devices: ") and device.endswith(" x cpu; precision: float32")
    assert attention == "attention: plain, in blocks of queries"
    rates = [metrics["learning_rate"] for metrics in told.values()]
    assert rates[0] == pytest.approx(0.05) and rates == sorted(rates, reverse=True) and rates[-1] < 0.02
    assert told[max(told)]["epoch"] == pytest.approx(3, abs=0.3)
