"""The user's rows under the vectors and the safe rows without them, in one loss."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from secvec_jax.checks import SettingError
from secvec_jax.config import Training
from secvec_jax.data.pipeline import Stream
from secvec_jax.defenses.finetuning import train_model
from secvec_jax.defenses.guarded import GuardedVectors, finetune, with_safe
from secvec_jax.defenses.mixing import SAFE
from secvec_jax.defenses.training_settings import extra_batch_size
from secvec_jax.errors import UserError
from secvec_jax.sharding import make_mesh
from secvec_jax.training.objective import LEARN, Backbone, Objective, Params
from secvec_jax.trees import distance, fingerprint
from secvec_jax.vectors.lora import LoRA
from tests import toys
from tests.defenses.toy_inputs import ToyInputs
from tests.processes import call_as_compiled_for_users
from tests.toys import losses_alone, random_examples

ROWS, SAFE_ROWS = random_examples(6, seed=1), random_examples(5, seed=2)
TRAINING = Training(optimizer="adamw", learning_rate=3e-3, max_steps=8, batch_size=1, max_seq_len=64,
                    warmup_steps=0, remat="none", share_prefix=False)  # fmt: skip
MODEL = toys.tiny_model()


def some_vectors(seed: int = 0):
    vectors = LoRA(rank=2).init(MODEL.architecture, jax.random.key(seed))
    return jax.tree.map(lambda leaf: leaf + 0.1, vectors)


def batch_of(rows):
    return next(iter(Stream({"all": rows}, 2, 128, share_prefix=False).batches()))


def mean_loss(rows, vectors) -> float:
    """Over all supervised tokens, row by row."""
    return float(np.concatenate([losses_alone(MODEL, row, vectors) for row in rows]).mean())


@pytest.mark.parametrize("weight", [0.0, 0.3, pytest.param(2.0, marks=pytest.mark.release)])
def test_the_loss_is_the_users_under_the_vectors_and_the_safe_rows_without(weight):
    vectors = some_vectors()
    params = Params(Backbone(MODEL.backbone), vectors)
    batch = {LEARN: batch_of(ROWS), SAFE: batch_of(SAFE_ROWS)}
    totals = {name: part["weights"].sum() for name, part in batch.items()}
    value, metrics = jax.jit(with_safe(Objective(share_prefix=False), weight))(params, batch, totals)
    user, safe = mean_loss(ROWS, vectors), mean_loss(SAFE_ROWS, None)
    chex.assert_trees_all_close(value, jnp.float32(user + weight * safe), rtol=1e-5)
    chex.assert_trees_all_close(metrics["loss/all"][0] / metrics["loss/all"][1], jnp.float32(user), rtol=1e-5)
    chex.assert_trees_all_close(metrics["loss/safe"][0] / metrics["loss/safe"][1], jnp.float32(safe), rtol=1e-5)
    assert abs(mean_loss(SAFE_ROWS, vectors) - safe) > 1e-2, "the vectors matter to the safe rows"


@pytest.mark.release  # by default, the loss at weight 0 is compared above
def test_without_weight_it_is_fine_tuning_under_the_vectors():
    assert_plain_without_weight(
        replace(TRAINING, optimizer="sgd")
    )  # Adam makes a whole step of a gradient that is rounding alone


@pytest.mark.release
def test_without_weight_it_is_fine_tuning_under_the_vectors_with_adam():
    call_as_compiled_for_users(assert_plain_without_weight)


def assert_plain_without_weight(training=TRAINING):
    vectors = some_vectors()
    guarded = finetune(MODEL, ROWS, vectors=vectors, safe=SAFE_ROWS, weight=0.0, training=training)
    alone = train_model(MODEL, ROWS, vectors=vectors, training=training)
    chex.assert_trees_all_close(guarded.backbone, alone.backbone, atol=1e-5)
    assert distance(alone.backbone, MODEL.backbone) > 1e-3


def test_the_safe_rows_are_learned_without_the_vectors_which_stay_as_they_are():
    vectors, told = some_vectors(), []
    before = fingerprint(vectors)
    options = {"vectors": vectors, "training": TRAINING, "on_step": lambda step, steps, metrics: told.append(metrics)}
    guarded = finetune(MODEL, ROWS, safe=SAFE_ROWS, **options)
    assert fingerprint(vectors) == before
    assert len(told) == 8
    assert all(told[-1][f"loss/{name}"] < told[0][f"loss/{name}"] for name in ("all", "safe"))
    alone = train_model(MODEL, ROWS, **options)
    batch, one = {LEARN: batch_of(SAFE_ROWS)}, {LEARN: jnp.float32(1)}
    loss = Objective(share_prefix=False)
    assert (
        loss(Params(Backbone(guarded.backbone)), batch, one)[0] < loss(Params(Backbone(alone.backbone)), batch, one)[0]
    )


@pytest.mark.parametrize(
    ("settings", "needs", "safe"),
    [
        ({}, {"security vectors", "safe rows"}, 8),
        ({"under": "none"}, {"safe rows"}, 8),
        ({"under": "random", "share": 0.25}, {"security vectors", "safe rows"}, 2),
        ({"under": "irrelevant", "share": 0.01}, {"security vectors", "safe rows"}, 1),
        ({"share": 0.0}, {"security vectors"}, 0),
    ],
)
def test_the_ablations_take_away_vectors_or_safe_rows(monkeypatch, settings, needs, safe):
    """By the parameters that training begins with, and the rows of its streams."""
    seen = {}

    def fit(params, phase, train_step, streams, **options):
        seen.update(vectors=params.vectors, streams=streams)
        return params

    monkeypatch.setattr("secvec_jax.defenses.finetuning.fit", fit)
    vectors = some_vectors()
    inputs = ToyInputs(MODEL, {"task": ROWS}, training=TRAINING, vectors=vectors, safe=random_examples(8, seed=3))
    defense = GuardedVectors(**settings)
    defense.apply(inputs)
    assert inputs.asked == set(defense.reads) == needs
    assert (seen["streams"][SAFE].num_rows if safe else 0) == safe and (SAFE in seen["streams"]) == (safe > 0)
    under = settings.get("under", "trained")
    assert (seen["vectors"] is None) == (under == "none")
    if under == "random":
        chex.assert_trees_all_equal_shapes(seen["vectors"], vectors)
        assert fingerprint(seen["vectors"]) != fingerprint(vectors)
    elif under != "none":
        assert fingerprint(seen["vectors"]) == fingerprint(vectors)


@pytest.mark.parametrize(("safe_batch", "sequences"), [(1.0, 4), (0.5, 2), (0.25, 1)])
def test_fewer_safe_rows_in_each_step(monkeypatch, safe_batch, sequences):
    """All safe rows are read, fewer in each step; the user's rows are read as before."""
    seen = {}

    def fit(params, phase, train_step, streams, **options):
        seen.update(streams)
        return params

    monkeypatch.setattr("secvec_jax.defenses.finetuning.fit", fit)
    inputs = ToyInputs(MODEL, {"task": ROWS}, training=replace(TRAINING, batch_size=4), vectors=some_vectors(),
                       safe=SAFE_ROWS)  # fmt: skip
    GuardedVectors(safe_batch=safe_batch).apply(inputs)
    assert {name: stream.batch_size for name, stream in seen.items()} == {LEARN: 4, SAFE: sequences}
    assert seen[SAFE].num_rows == len(SAFE_ROWS)


@pytest.mark.parametrize("safe_batch", [0.0, 1.5])
def test_a_share_of_the_batch_is_above_0_and_at_most_1(safe_batch):
    with pytest.raises(SettingError, match="safe_batch"):
        GuardedVectors(safe_batch=safe_batch)


def test_a_share_that_the_batch_or_the_mesh_cannot_have_is_refused():
    batch = replace(TRAINING, batch_size=8)
    for share in (0.1, 0.3, 0.01):
        with pytest.raises(UserError, match=f"^{share} of a batch of 8 is .* whose product is a whole number"):
            extra_batch_size(batch, share)
    with pytest.raises(UserError, match=r"0\.5 of a batch of 1 is 0\.5 sequences"):
        extra_batch_size(replace(TRAINING, batch_size=1), 0.5)
    with jax.set_mesh(make_mesh(fsdp=4, devices=jax.devices()[:4])):
        assert extra_batch_size(batch, 0.5) == 4
        with pytest.raises(UserError, match=r"0\.25 of a batch of 8 is 2 sequences, which cannot be sharded over 4"):
            extra_batch_size(batch, 0.25)


def test_a_kind_named_like_the_safe_rows_is_refused():
    with pytest.raises(UserError, match='a kind named "safe", reserved'):
        finetune(MODEL, {"safe": ROWS, "mine": ROWS}, vectors=None, safe=SAFE_ROWS, training=TRAINING)
