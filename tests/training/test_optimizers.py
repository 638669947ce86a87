"""Optimizers in less memory: each learns, resumes exactly, and takes the memory it says; weights rounded at random."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import secvec_jax as sv
from secvec_jax.config import Training
from secvec_jax.defenses.finetuning import finetune_phase
from secvec_jax.errors import UserError
from secvec_jax.model import hub
from secvec_jax.model.decoder import abstract_decoder
from secvec_jax.sharding import make_mesh, shard
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.training.objective import Backbone, Params
from secvec_jax.training.optimizers import learning_rate_at, make_optimizer
from secvec_jax.training.step import make_train_step
from secvec_jax.training.stochastic_rounding import round_at_random, rounded_weights, scale_by_adam_in_bfloat16
from secvec_jax.training.trainer import fit
from secvec_jax.trees import fingerprint
from tests.toys import ARCHITECTURE, random_decoder, random_examples
from tests.toys import tiny_model as toy_model
from tests.training.tiny_fit import PHASE, STEPS, Table, loss, make_streams, parameters

OPTIMIZERS = ("sgd", "adamw", "adamw-bf16", "adafactor", "muon")
LARGE = dataclasses.replace(ARCHITECTURE, hidden_size=128, intermediate_size=256, head_dim=32)


def state_bytes(optimizer: str, **settings) -> float:
    """Of the state of training all weights, for each weight."""
    params = Params(Backbone(abstract_decoder(LARGE)))
    phase = finetune_phase(params)
    trained, _ = phase.split(params)
    transform = phase.optimizer(make_optimizer(Training(optimizer=optimizer, **settings), 9), params)
    state = jax.tree.leaves(jax.eval_shape(transform.init, trained))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in state) / sum(leaf.size for leaf in jax.tree.leaves(trained))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_optimizer_learns(optimizer):
    rng = np.random.default_rng(0)
    goal = {"kernel": jnp.asarray(rng.normal(size=(2, 8, 6)), jnp.float32), "norm": jnp.ones(6)}
    training = Training(optimizer=optimizer, learning_rate=0.05, warmup_steps=0, weight_decay=1e-4, max_grad_norm=1.0)
    transform = make_optimizer(training, 40)

    def distance(weights):
        return sum(jnp.sum((weights[name] - goal[name]) ** 2) for name in goal)

    @jax.jit
    def step(weights, state):
        updates, state = transform.update(jax.grad(distance)(weights), state, weights)
        return optax.apply_updates(weights, updates), state

    weights = jax.tree.map(jnp.zeros_like, goal)
    state = transform.init(weights)
    for _ in range(40):
        weights, state = step(weights, state)
    assert distance(weights) < 0.7 * distance(jax.tree.map(jnp.zeros_like, goal))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(weights))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup_steps, steps", [(0, 1), (0, 12), (5, 40), (30, 20)])
def test_the_learning_rate_is_that_of_optaxs_schedules(schedule, warmup_steps, steps):
    training = Training(optimizer="sgd", momentum=0.0, learning_rate=0.3, schedule=schedule, warmup_steps=warmup_steps)
    warmup = min(warmup_steps, steps - 1)
    fall = {
        "cosine": optax.cosine_decay_schedule(0.3, steps - warmup, alpha=0.1),
        "linear": optax.linear_schedule(0.3, 0.03, steps - warmup),
        "constant": optax.constant_schedule(0.3),
    }[schedule]
    expected = optax.join_schedules([optax.linear_schedule(0.3 / (warmup + 1), 0.3, max(warmup, 1)), fall], [warmup])
    transform = make_optimizer(dataclasses.replace(training, max_grad_norm=0.0, weight_decay=0.0), steps)
    state, update = transform.init(jnp.zeros(2)), jax.jit(transform.update)
    for step in range(steps + 2):
        updates, state = update(jnp.ones(2), state, jnp.zeros(2))
        np.testing.assert_allclose(updates, -expected(step) * np.ones(2), rtol=2e-6)
        if step < steps:
            assert learning_rate_at(training, steps, step + 1) == pytest.approx(float(expected(step)), rel=2e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_trainings_that_differ_in_the_schedule_alone_share_a_step(optimizer):
    start = parameters()

    def step_with(steps: int, **settings):
        training = Training(optimizer=optimizer, **settings)
        return make_train_step(loss, PHASE.optimizer(make_optimizer(training, steps), start))

    first, second = step_with(5, learning_rate=0.1), step_with(9, learning_rate=0.2, warmup_steps=3)
    assert first.step is second.step
    for other in ({"schedule": "linear"}, {"weight_decay": 0.5}, {"max_grad_norm": 0.5}):
        assert step_with(5, learning_rate=0.1, **other).step is not first.step
    slow, fast = (
        fit(start, PHASE, step_with(5, learning_rate=rate, warmup_steps=0), make_streams(), steps=1)
        for rate in (1e-3, 1e-2)
    )
    moved = [np.abs(after["vectors"].table - start["vectors"].table).max() for after in (slow, fast)]
    assert moved[1] == pytest.approx(10 * moved[0], rel=1e-3)


def test_states_take_the_memory_that_they_say():
    assert state_bytes("adamw") == pytest.approx(8, abs=0.01)
    assert state_bytes("adamw-bf16") == pytest.approx(4, abs=0.01), "half"
    assert state_bytes("sgd", momentum=0.9) == pytest.approx(4, abs=0.01)
    assert state_bytes("adafactor") < 0.5, "two rows of numbers for each matrix that is not small"
    kernels = 3 * 128 * 256 + 2 * 128 * 128 + 2 * 128 * 64
    share = 2 * kernels / (2 * kernels + 2 * 320 * 128 + 5 * 128)
    assert state_bytes("muon") == pytest.approx(4 * share + 8 * (1 - share), abs=0.05)
    assert state_bytes("adamw", trained_weights="bfloat16") == pytest.approx(8, abs=0.01), "in float32"


@pytest.mark.parametrize("optimizer, weights", [*((name, "float32") for name in OPTIMIZERS[2:]), ("sgd", "bfloat16")])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(optimizer, weights, tmp_path):
    training = Training(optimizer=optimizer, learning_rate=0.1, warmup_steps=0, trained_weights=weights)
    start = parameters()
    start["vectors"] = Table(start["vectors"].table.astype(weights))
    train_step = make_train_step(loss, PHASE.optimizer(make_optimizer(training, STEPS), start))

    def run(folder=None, stop_at=None):
        def on_step(step, steps, metrics):
            if step == stop_at:
                raise KeyboardInterrupt

        checkpoints = None if folder is None else Checkpoints(folder, 0.0)
        after = fit(start, PHASE, train_step, make_streams(), steps=5, checkpoints=checkpoints, on_step=on_step)
        assert after["vectors"].table.dtype == weights
        return fingerprint(after)

    expected = run()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop_at=3)
    assert run(tmp_path) == expected


def test_factored_moments_and_the_others_are_made_on_a_mesh():
    params = Params(Backbone(random_decoder(architecture=LARGE)))
    phase = finetune_phase(params)
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        params = shard(params)
        for optimizer in ("adafactor", "muon"):
            transform = phase.optimizer(make_optimizer(Training(optimizer=optimizer), 9), params)
            state = make_train_step(loss, transform).init(phase.split(params)[0])
            assert all(leaf.is_fully_addressable for leaf in jax.tree.leaves(state))


def test_rounding_at_random_is_right_on_average():
    exact = np.float32(1 + 0.3 * 2**-7)  # bfloat16 has 1 and 1 + 2**-7
    rounded = np.asarray(round_at_random(jnp.full(40_000, exact), jax.random.key(0)), np.float32)
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    share = float((rounded > 1).mean())
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 40_000) ** 0.5
    negative = np.asarray(round_at_random(jnp.full(40_000, -exact), jax.random.key(0)), np.float32)
    np.testing.assert_array_equal(negative, -rounded)
    kept = jnp.array([0.0, -0.0, 1.5, jnp.inf, -jnp.inf, jnp.nan])
    np.testing.assert_array_equal(np.asarray(round_at_random(kept, jax.random.key(1)), np.float32), kept)


def test_small_updates_are_not_lost_and_are_those_of_the_seed_and_the_step():
    weights = {"kernel": jnp.ones(512, jnp.bfloat16), "norm": jnp.ones(512)}
    gradients = jax.tree.map(jnp.ones_like, weights)

    def after(seed: int, steps: int, first=None, state=None):
        transform = rounded_weights(optax.sgd(1e-4), seed)
        weights_now = weights if first is None else first
        state = transform.init(weights) if state is None else state
        update = jax.jit(transform.update)
        for _ in range(steps):
            updates, state = update(gradients, state, weights_now)
            weights_now = optax.apply_updates(weights_now, updates)
        return weights_now, state

    final, _ = after(0, 400)
    assert final["kernel"].dtype == jnp.bfloat16 and final["norm"].dtype == jnp.float32
    assert abs(float(final["kernel"].astype(jnp.float32).mean()) - 0.96) < 0.003, "to the nearest, it would still be 1"
    np.testing.assert_allclose(final["norm"], 0.96, atol=1e-4)
    half, state = after(0, 5)
    resumed, _ = after(0, 5, half, state)
    whole, other = after(0, 10)[0], after(1, 10)[0]
    np.testing.assert_array_equal(resumed["kernel"], whole["kernel"])
    assert (whole["kernel"] != other["kernel"]).any()


def test_adam_in_bfloat16_takes_the_steps_of_adam():
    gradients = [{"kernel": jax.random.normal(jax.random.key(step), (64, 64))} for step in range(20)]
    ours, theirs = scale_by_adam_in_bfloat16(), optax.scale_by_adam()
    our_state, state = ours.init(gradients[0]), theirs.init(gradients[0])
    for gradient in gradients:
        update, our_state = ours.update(gradient, our_state)
        expected, state = theirs.update(gradient, state)
    error = np.abs(update["kernel"] - expected["kernel"])
    assert error.mean() < 0.01 and error.max() < 0.1
    assert {leaf.dtype for leaf in jax.tree.leaves((our_state.mean, our_state.square))} == {np.dtype(jnp.bfloat16)}


def test_all_weights_are_trained_in_bfloat16_and_saved_as_they_are(tmp_path):
    rows, training = random_examples(4), Training(max_steps=2, trained_weights="bfloat16", learning_rate=0.01)
    tuned = sv.finetune(toy_model(), rows, vectors=None, training=training)
    assert tuned.precision == "bfloat16"
    tuned.save(tmp_path / "tuned")
    saved = hub.load(tmp_path / "tuned")
    assert saved.fingerprint == tuned.fingerprint and saved.precision == "float32"
    again = sv.finetune(tuned, rows, vectors=None, training=training)
    assert again.precision == "bfloat16" and again.fingerprint != tuned.fingerprint
    with pytest.raises(UserError, match="trained_weights is 'bfloat16', which is for training all weights"):
        sv.finetune(toy_model(), rows, vectors=None, task=sv.LoRA(rank=2), training=training)
    with pytest.raises(UserError, match="trained_weights is 'bfloat16', which is for training all weights"):
        sv.train_vectors(toy_model(), rows, benign=rows, training=training)
