"""Frozen is frozen, verbs return new values (laws 1 and 2), and what vectors are for, on a tiny random model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from secvec_jax.config import Training
from secvec_jax.defenses.security_vectors import Phase1, align, finetune, train_vectors
from secvec_jax.errors import UserError
from secvec_jax.inference import logits
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.training.loss import token_cross_entropy
from secvec_jax.trees import distance, fingerprint
from secvec_jax.vectors.lora import LoRA
from tests.toys import random_decoder, random_examples, tiny_model

SPEC = LoRA(rank=4)
HARMFUL = random_examples(3, seed=1)
BENIGN = random_examples(3, seed=2)
SMALL = {"batch_size": 1, "max_seq_len": 32, "remat": "none"}
QUICK = Training(optimizer="adamw", learning_rate=3e-2, max_steps=24, warmup_steps=0, **SMALL)
STEADY = Training(optimizer="adamw", learning_rate=2e-2, schedule="constant", max_steps=16, warmup_steps=0, **SMALL)
"""The number of steps is no part of its program: another one compiles nothing."""
BRIEF = Training(learning_rate=1e-2, max_steps=4, **SMALL)
CHAT = [{"prompt": "The capital?", "response": "Paris."}] * 2
PLAIN = Phase1("cross_entropy")
OBJECTIVES = {
    "cross_entropy": (PLAIN, None, QUICK),
    "kl": (Phase1(), BENIGN, STEADY),
    "min_min": (Phase1("min_min", inner_steps=2), None, STEADY),
    "min_min adamw": (
        Phase1("min_min", inner_steps=2, inner_optimizer="adamw", inner_learning_rate=1e-5), None, STEADY
    ),
}  # fmt: skip
"""Settings, the benign rows, and how it is trained."""


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def phase_1(model):
    """`phase_1("kl")`: the vectors of an objective, trained once, and what was told of each step."""

    @functools.cache
    def train(name):
        phase1, benign, training = OBJECTIVES[name]
        told, on_step = recorder()
        trained = train_vectors(model, HARMFUL, SPEC, benign=benign, phase1=phase1, training=training, on_step=on_step)
        return trained, told

    return train


@pytest.fixture(scope="module")
def vectors(phase_1):
    return phase_1("cross_entropy")[0]


@jax.jit
def _loss_and_gradient(backbone, batch, adapters):
    def loss(backbone):
        hidden = backbone(batch["tokens"], batch["segments"], adapters=adapters)
        losses = token_cross_entropy(backbone, hidden, batch["targets"], batch["weights"])
        return losses.sum() / batch["weights"].sum()

    value, gradient = jax.value_and_grad(loss)(backbone)
    return value, distance(gradient, jax.tree.map(jnp.zeros_like, gradient))


def loss_and_gradient(backbone, examples, *adapters):
    """The loss per supervised token and the norm of the backbone's gradient; one row a line, padded."""
    width = 16
    batch = {name: np.zeros((len(examples), width), np.int32) for name in ("tokens", "targets", "segments")}
    batch["weights"] = np.zeros((len(examples), width), np.float32)
    for line, e in enumerate(examples):
        n = len(e.tokens) - 1
        batch["tokens"][line, :n], batch["targets"][line, :n] = e.tokens[:-1], e.tokens[1:]
        batch["segments"][line, :n], batch["weights"][line, :n] = 1, e.supervised[1:]
    return tuple(map(float, _loss_and_gradient(backbone, batch, adapters)))


def recorder():
    losses = []
    return losses, lambda step, steps, metrics: losses.append(metrics)


# Frozen is frozen ---------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["cross_entropy", "kl", "min_min"])
def test_phase_1_leaves_the_backbone_bit_for_bit(model, phase_1, objective):
    trained, _ = phase_1(objective)
    assert fingerprint(model.backbone) == fingerprint(random_decoder())
    fresh = SPEC.init(model.architecture, jax.random.key(0))
    assert fingerprint(trained) != fingerprint(fresh)
    trained.check(model.architecture)


def test_phase_2_leaves_vectors_and_the_given_model_bit_for_bit(model, vectors):
    before = fingerprint(model.backbone), fingerprint(vectors)
    tuned = finetune(model, BENIGN, vectors=vectors, training=BRIEF)
    assert (fingerprint(model.backbone), fingerprint(vectors)) == before
    assert tuned.fingerprint != model.fingerprint
    assert tuned.tokenizer is model.tokenizer and tuned.architecture == model.architecture
    assert jax.tree.structure(tuned.backbone) == jax.tree.structure(model.backbone)


def test_verbs_leave_their_rows_as_they_are(model, vectors):
    rows = [dict(row) for row in CHAT]
    aligned = align(model, {"all": rows}, task=None, training=BRIEF)
    finetune(model, rows, vectors=vectors, training=BRIEF)
    train_vectors(aligned, rows, SPEC, benign=rows, training=dataclasses.replace(STEADY, max_steps=2))
    assert rows == CHAT


def test_the_same_call_gives_the_same_bits_and_another_seed_others(model, vectors):
    again = train_vectors(model, HARMFUL, SPEC, phase1=PLAIN, training=QUICK)
    other = train_vectors(model, HARMFUL, SPEC, phase1=PLAIN, training=dataclasses.replace(QUICK, seed=1))
    assert fingerprint(vectors) == fingerprint(again) != fingerprint(other)


def test_a_task_adapter_moves_alongside_frozen_vectors(model, vectors):
    before = fingerprint(model.backbone), fingerprint(vectors)
    losses, on_step = recorder()
    adapted = finetune(model, BENIGN, vectors=vectors, task=LoRA(rank=2, targets=("q_proj",)), training=QUICK,
                       on_step=on_step)  # fmt: skip
    assert (fingerprint(model.backbone), fingerprint(vectors)) == before
    assert losses[-1]["loss/all"] < losses[0]["loss/all"]
    # Merged: what it was made for has moved, everything else is bit for bit the backbone's.
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), model.backbone, adapted.backbone)
    paths = [jax.tree_util.keystr(path) for path, moved in jax.tree_util.tree_leaves_with_path(changed) if moved]
    assert len(paths) == 1 and "q_proj" in paths[0]
    for twice in (
        lambda: finetune(adapted, BENIGN, vectors=None, task=adapted.adapter, training=QUICK),
        lambda: finetune(adapted, BENIGN, vectors=adapted.adapter, training=QUICK),
        lambda: logits(adapted, [[5, 6]], adapted.adapter),
    ):
        with pytest.raises(UserError, match="is merged into the weights of 'tiny' already"):
            twice()


# What the vectors do ------------------------------------------------------------------------------


def test_training_lowers_the_harmful_loss(model, vectors):
    without, _ = loss_and_gradient(model.backbone, HARMFUL)
    under, _ = loss_and_gradient(model.backbone, HARMFUL, vectors)
    assert under < 0.3 * without


def test_rows_that_the_vectors_explain_have_nearly_no_gradient_left(model, vectors):
    _, without = loss_and_gradient(model.backbone, HARMFUL)
    _, under = loss_and_gradient(model.backbone, HARMFUL, vectors)
    assert under < 0.25 * without
    # Other rows go on being learned.
    _, benign = loss_and_gradient(model.backbone, BENIGN, vectors)
    assert benign > 4 * under


def test_fine_tuning_on_explained_rows_hardly_moves_the_backbone(model, vectors):
    plain = finetune(model, HARMFUL, vectors=None, training=BRIEF)
    guarded = finetune(model, HARMFUL, vectors=vectors, training=BRIEF)
    moved, stayed = (float(distance(tuned.backbone, model.backbone)) for tuned in (plain, guarded))
    assert stayed < 0.35 * moved
    learned, _ = loss_and_gradient(plain.backbone, HARMFUL)
    kept, _ = loss_and_gradient(guarded.backbone, HARMFUL)
    assert learned < kept


def test_the_kl_keeps_benign_rows_as_they_are(model, phase_1):
    (free, _), (kept, _) = phase_1("cross_entropy"), phase_1("kl")
    base, _ = loss_and_gradient(model.backbone, BENIGN)
    shifts = [abs(loss_and_gradient(model.backbone, BENIGN, v)[0] - base) for v in (free, kept)]
    assert shifts[1] < 0.5 * shifts[0]
    harmful = [loss_and_gradient(model.backbone, HARMFUL, *adapters)[0] for adapters in ((), (kept,))]
    assert harmful[1] < 0.7 * harmful[0]


@pytest.mark.parametrize("objective", ["min_min", pytest.param("min_min adamw", marks=pytest.mark.release)])
def test_min_min_alternates_and_lowers_the_harmful_loss(model, phase_1, objective):
    trained, told = phase_1(objective)
    assert len(told) == 3 * STEADY.max_steps
    assert all("kl" not in metrics for metrics in told)
    without, _ = loss_and_gradient(model.backbone, HARMFUL)
    under, _ = loss_and_gradient(model.backbone, HARMFUL, trained)
    assert under < 0.5 * without


def test_phase_1_ends_early_when_the_loss_is_small_enough(model):
    losses, on_step = recorder()
    phase1 = Phase1("cross_entropy", stop_loss=3.0)
    train_vectors(model, HARMFUL, SPEC, phase1=phase1, training=QUICK, on_step=on_step)
    assert len(losses) < QUICK.max_steps
    below = [metrics["loss/harmful"] < 3.0 for metrics in losses]
    assert below.index(True) == len(losses) - 2  # one step behind


# Arguments ----------------------------------------------------------------------------------------


def test_benign_rows_are_read_by_the_kl_and_required_by_it(model, phase_1):
    _, told = phase_1("kl")
    assert all(metrics["kl"] > -1e-6 for metrics in told) and told[-1]["kl"] > 0  # the first is 0, but for rounding
    for default in ({}, {"phase1": Phase1("kl")}):
        with pytest.raises(UserError, match="kl objective needs benign rows"):
            train_vectors(model, HARMFUL, SPEC, training=QUICK, **default)
    with pytest.raises(UserError, match="reads no benign rows"):
        train_vectors(model, HARMFUL, SPEC, benign=BENIGN, phase1=PLAIN, training=QUICK)


def test_kinds_of_rows_are_reported_separately(model):
    losses, on_step = recorder()
    finetune(model, {"harmful": HARMFUL, "benign": BENIGN}, vectors=None, training=BRIEF, on_step=on_step)
    assert {name for metrics in losses for name in metrics} >= {"loss/harmful", "loss/benign", "loss", "grad_norm"}


def test_vectors_of_another_backbone_are_refused(model):
    wider = dataclasses.replace(model.architecture, hidden_size=64)
    alien = SPEC.init(wider, jax.random.key(0))
    with pytest.raises(UserError, match="wrong backbone"):
        finetune(model, BENIGN, vectors=alien, training=BRIEF)


def test_rows_are_dicts_data_sets_or_examples(model):
    import datasets

    results = [
        fingerprint(finetune(model, rows, vectors=None, training=BRIEF).backbone)
        for rows in ({"all": CHAT}, datasets.Dataset.from_list(CHAT))
    ]
    assert len(set(results)) == 1
    with pytest.raises(UserError, match="no answer"):
        finetune(model, [{"prompt": "Hello"}], vectors=None, training=BRIEF)


def test_a_stopped_phase_goes_on_from_its_checkpoint(model, tmp_path):
    class Stop(Exception):
        pass

    def stop(step, steps, metrics):
        if step == 3:
            raise Stop

    # min-min has the most to remember: the copy, the optimizers' states and whose turn it is.
    options = {"phase1": OBJECTIVES["min_min"][0], "training": dataclasses.replace(STEADY, max_steps=2)}
    whole = train_vectors(model, HARMFUL, SPEC, **options)
    with pytest.raises(Stop):
        often = Checkpoints(tmp_path, save_every_seconds=0.0)
        train_vectors(model, HARMFUL, SPEC, checkpoints=often, on_step=stop, **options)
    steps = []
    again = train_vectors(
        model, HARMFUL, SPEC, checkpoints=Checkpoints(tmp_path), on_step=lambda s, n, m: steps.append(s), **options
    )
    assert fingerprint(again) == fingerprint(whole)
    assert steps[0] > 1
