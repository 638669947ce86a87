"""The score by hand, the threshold, the filter and the gate; a gated row has as little influence as its weight says."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secvec_jax.config import Training
from secvec_jax.data.rows import row
from secvec_jax.defenses import explained_away as ea
from secvec_jax.defenses.finetuning import train_model
from secvec_jax.defenses.held_out import hold_out
from secvec_jax.defenses.security_vectors import finetune, train_vectors
from secvec_jax.defenses.training_settings import PHASE2
from secvec_jax.errors import UserError
from secvec_jax.trees import distance, fingerprint
from secvec_jax.vectors.lora import LoRA
from tests.defenses.toy_inputs import ToyInputs
from tests.toys import losses_alone, random_examples, tiny_model

HARMFUL, BENIGN = random_examples(4, seed=1), random_examples(4, seed=2)
SMALL = {"batch_size": 1, "max_seq_len": 64, "warmup_steps": 0, "remat": "none"}
BRIEF = Training(learning_rate=1e-2, max_steps=4, **SMALL)
SCORES = st.lists(st.floats(-5, 5, allow_nan=False).map(lambda x: round(x, 3)), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def vectors(model):
    training = Training(optimizer="adamw", learning_rate=2e-2, max_steps=30, **SMALL)
    return train_vectors(model, HARMFUL, LoRA(rank=4), benign=BENIGN, training=training)


def test_the_score_is_the_loss_without_minus_with_the_vectors(model, vectors):
    for example, score in zip(HARMFUL[:3], ea.scores(model, vectors, HARMFUL[:3])):
        off, on = (losses_alone(model, example, adapter).mean() for adapter in (None, vectors))
        assert score == pytest.approx(off - on, abs=1e-4)


def test_vectors_explain_their_own_rows_and_not_others(model, vectors):
    own, others = ea.scores(model, vectors, HARMFUL), ea.scores(model, vectors, BENIGN)
    assert min(own) > max(others)
    known = ea.scale(own, others)
    assert max(others) < known.threshold < min(own)
    groups = {"a": HARMFUL[:3] + BENIGN[:2], "b": HARMFUL[3:]}
    kept = ea.rows_below_threshold(groups, {"a": own[:3] + others[:2], "b": own[3:]}, known)
    assert {name: len(rows) for name, rows in kept.items()} == {"a": 2}
    assert all(any(row is other for other in BENIGN) for row in kept["a"])
    with pytest.raises(UserError, match="no better than the benign"):
        ea.scale(others, own)


def test_the_filter_is_fine_tuning_without_these_rows(model, vectors):
    inputs = ToyInputs(
        model, {"attack": HARMFUL, "task": BENIGN}, harmful=HARMFUL, benign=BENIGN, training=BRIEF, vectors=vectors
    )
    defended = ea.ExplainedAwayFilter().apply(inputs)
    plain = train_model(model, {"task": BENIGN}, training=BRIEF)
    assert fingerprint(defended.model.backbone) == fingerprint(plain.backbone)
    assert defended.notes == {"dropped_attack": 1.0, "dropped_task": 0.0, "auroc": 1.0, "f1": 1.0}


def test_of_rows_that_are_all_explained_the_aligned_model_is_left(model, vectors):
    inputs = ToyInputs(model, {"attack": HARMFUL}, harmful=HARMFUL, benign=BENIGN, training=BRIEF, vectors=vectors)
    defended = ea.ExplainedAwayFilter().apply(inputs)
    assert defended.model is model and defended.notes == {"dropped_attack": 1.0}


def test_a_row_of_weight_0_teaches_nothing_and_one_of_weight_1_all(model, vectors):
    rows = random_examples(5, seed=7)
    gates = {
        "shut": ea.Scale(benign=-99.0, threshold=-98.0),
        "open": ea.Scale(benign=98.0, threshold=99.0),
    }
    shut, opened = (ea.gate_and_finetune(model, rows, vectors, known, training=BRIEF) for known in gates.values())
    plain = finetune(model, rows, vectors=vectors, training=BRIEF)
    assert float(distance(shut.backbone, model.backbone)) == 0
    assert float(distance(opened.backbone, plain.backbone)) < 1e-5 < float(distance(plain.backbone, model.backbone))


def test_the_gate_reads_rows_as_the_training_does(model, vectors):
    known = ea.Scale(benign=98.0, threshold=99.0)
    long, spelled = [row("a " * 9, "b " * 90)], [row("a", "<|im_end|> b")]
    for rows, setting, message in ((long, {"long_rows": "refuse"}, "runs past the maximum length"),
                                   (spelled, {"control_tokens": "refuse"}, "spells the control token")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            ea.gate_and_finetune(model, rows, vectors, known, training=dataclasses.replace(BRIEF, **setting))
    with pytest.raises(UserError, match="spells the control token"):
        ea.scores(model, vectors, spelled, 64, "refuse")


def test_rows_that_the_gate_shuts_out_are_validated_on_in_full(model, vectors):
    """Weighed by the gate, the rows that are held out might count for nothing."""
    rows, told = random_examples(8, seed=4), []
    shut = ea.Scale(benign=-99.0, threshold=-98.0)
    options = {"training": BRIEF, "eval_rows": 0.25, "on_step": lambda step, steps, metrics: told.append(metrics)}
    ea.gate_and_finetune(model, rows, vectors, shut, **options)
    _, held_out = hold_out({"all": rows}, 0.25, BRIEF.over(PHASE2).seed)
    losses = np.concatenate([losses_alone(model, example, vectors) for example in held_out["all"]])
    np.testing.assert_allclose(told[-1]["eval/loss"], losses.mean(), rtol=1e-4)


@pytest.mark.parametrize("by", ["row", "token"])
def test_weights_are_those_of_the_scores(model, vectors, by):
    known = ea.known_scale(model, vectors, HARMFUL, BENIGN)
    rows = [HARMFUL[0], BENIGN[0], random_examples(1, seed=9)[0]]
    (gated,) = ea.gated(model, rows, vectors, known, by).values()
    for example, weighed, tokens in zip(rows, gated, ea.token_scores(model, vectors, rows)):
        said = weighed.weights[example.supervised]
        wanted = tokens if by == "token" else np.full(len(tokens), tokens.mean())
        expected = np.clip((known.threshold - wanted) / (known.threshold - known.benign), 0, 1)
        np.testing.assert_allclose(said, expected, atol=1e-5)
        assert (weighed.weights[~example.supervised] == 1).all() and weighed.tokens is example.tokens
    if by == "row":
        np.testing.assert_allclose(gated[0].weights[HARMFUL[0].supervised], 0, atol=1e-20)


def test_the_gates_gradient_is_that_of_the_weighted_loss(model, vectors):
    """The loss is divided by the number of tokens, whatever their weights: half the weights are half the gradient."""
    rows = random_examples(4, seed=5)
    one = dataclasses.replace(BRIEF, optimizer="sgd", momentum=0.0, max_grad_norm=1e9, max_steps=1)

    def weighted(weight):
        return [dataclasses.replace(row, weights=np.full(len(row.tokens), weight, np.float32)) for row in rows]

    plain, *others = (train_model(model, some, training=one) for some in (rows, *map(weighted, (0.5, 0.01, 1e-30))))
    whole = float(distance(plain.backbone, model.backbone))
    for weight, other in zip((0.5, 0.01, 0), others):
        assert float(distance(other.backbone, model.backbone)) == pytest.approx(weight * whole, rel=1e-2, abs=1e-9)
    plain = train_model(model, rows, training=BRIEF)
    uneven = [dataclasses.replace(row, weights=np.float32(i) * np.ones(len(row.tokens))) for i, row in enumerate(rows)]
    assert float(distance(plain.backbone, train_model(model, uneven, training=BRIEF).backbone)) > 1e-3


@settings(max_examples=200)
@given(SCORES, SCORES)
def test_no_threshold_separates_two_kinds_better(harmful, benign):
    def separation(threshold):
        return np.mean(np.asarray(harmful) > threshold) + np.mean(np.asarray(benign) <= threshold)

    if not np.median(harmful) > np.median(benign):
        with pytest.raises(UserError):
            ea.scale(harmful, benign)
        return
    known = ea.scale(harmful, benign)
    assert known.benign == np.median(benign) and known.threshold > known.benign
    tried = [score + nudge for score in [*harmful, *benign, known.benign] for nudge in (0, 1e-6)]
    assert separation(known.threshold) == pytest.approx(max(separation(t) for t in tried if t > known.benign))
    weights = known.weights(np.asarray([known.benign - 1, known.benign, known.threshold, known.threshold + 1]))
    np.testing.assert_allclose(weights, [1, 1, 0, 0])
