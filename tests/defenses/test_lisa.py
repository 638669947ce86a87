"""Lisa's two states: whose rows, for how many steps, and the pull to the weights of the last switch."""

import contextlib
import logging
from dataclasses import replace

import chex
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from secvec_jax.config import Training
from secvec_jax.defenses.finetuning import stream_of, train_model
from secvec_jax.defenses.lisa import finetune, lisa, proximal
from secvec_jax.errors import UserError
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.training.objective import Backbone, Params
from secvec_jax.trees import distance, fingerprint
from secvec_jax.vectors.lora import LoRA, merge
from tests.processes import call_as_compiled_for_users
from tests.toys import example, random_examples, tiny_model

# Tokens tell the two streams apart: the user's are below 100, the safe rows' above 200.
USER = [example([10 + i, 11, 12], [13 + i, 14]) for i in range(8)]
SAFE = [example([210 + i, 211, 212], [213 + i, 214]) for i in range(8)]
TRAINING = Training(learning_rate=1e-2, max_steps=7, batch_size=1, max_seq_len=16, warmup_steps=0, remat="none")
STATES = {"aligned_steps": 2, "user_steps": 3}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@contextlib.contextmanager
def compilations():
    """What is logged meanwhile of the programs that are compiled."""
    messages = []
    handler, logger = logging.Handler(), logging.getLogger("jax._src.interpreters.pxla")
    handler.emit = lambda record: messages.append(record.getMessage())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def seen_by(make_step):
    """The move, and what its steps were given: the name of the stream and the tokens of its first line."""
    seen = []

    def spied(loss, optimizer):
        train_step = make_step(loss, optimizer)

        def step(trained, state, frozen, batch):
            ((stream, rows),) = batch.items()
            seen.append((stream, rows["tokens"][0, 0].tolist()))
            return train_step.step(trained, state, frozen, batch)

        return train_step._replace(step=step)

    return seen, spied


def test_the_pull_is_that_of_the_published_bookkeeping():
    """Steps of SGD on ‖w - target‖²/2 with two targets, by hand: a clock per state, both states' last weights."""
    rho, rate, counts, targets = 0.7, 0.2, (2, 3), (np.array([1.0, -2.0]), np.array([4.0, 0.5]))
    optimizer = optax.chain(proximal(rho, *counts), optax.sgd(rate))
    ours = jnp.array([0.3, 0.1])
    state = optimizer.init(ours)
    theirs = np.array([0.3, 0.1])
    status, clock, left = 0, 0, [theirs, theirs]
    for _ in range(13):
        if clock == counts[status]:
            left[status] = theirs
            status, clock = 1 - status, 0
        theirs = theirs - rate * (theirs - targets[status] + rho * (theirs - left[1 - status]))
        clock += 1
        updates, state = optimizer.update(ours - targets[status], state, ours)
        ours = optax.apply_updates(ours, updates)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_the_states_take_turns_in_one_program_and_the_user_has_as_many_steps_as_without(model):
    seen, make_step = seen_by(lisa(2, 3))
    with compilations() as compiled:
        told = []
        train_model(model, USER, extra_rows={"safe": SAFE}, make_step=make_step,
                    on_step=lambda *all: told.append(all[1:]), training=replace(TRAINING, max_steps=13))  # fmt: skip
    assert len([message for message in compiled if message.startswith("Compiling jit(step)")]) == 1
    assert [stream for stream, _ in seen] == ["safe", "safe", "learn", "learn", "learn"] * 2 + ["safe", "safe", "learn"]
    for stream, tokens in seen:
        assert all(t == 0 or (t > 200) == (stream == "safe") for t in tokens)
    named = {"safe": "loss/safe", "learn": "loss/all"}
    always = {"loss", "grad_norm", "tokens", "flops", "learning_rate", "epoch"}
    assert [set(metrics) for _, metrics in told] == [always | {named[stream]} for stream, _ in seen]
    # What `finetune` makes of 7 steps on the user's rows is the same.
    again = []
    finetune(model, USER, safe=SAFE, **STATES, training=TRAINING, on_step=lambda *all: again.append(all[1:]))
    # Except for the epoch: 13 steps on the user's rows were asked for above, and 7 here.
    assert list(map(without_epoch, again)) == list(map(without_epoch, told))
    assert sum("loss/all" in metrics for _, metrics in again) == TRAINING.max_steps


def without_epoch(report):
    steps, metrics = report
    return steps, {name: value for name, value in metrics.items() if name != "epoch"}


@pytest.mark.parametrize(("steps", "user_steps", "rounds"), [(None, 100, 1), (None, 3, 2), (6, 3, 2), (7, 3, 3)])
def test_steps_and_epochs_are_those_on_the_users_rows(model, monkeypatch, steps, user_steps, rounds):
    training = replace(TRAINING, max_steps=steps, epochs=2)
    plain = steps or stream_of(model, {"all": USER}, training).count()
    assert plain == (steps or 4)
    monkeypatch.setattr(
        "secvec_jax.defenses.finetuning.fit",
        lambda params, *_, steps, **__: Params(Backbone(steps)),
    )
    monkeypatch.setattr(type(model), "with_backbone", lambda self, steps: steps)
    total = finetune(model, USER, safe=SAFE, aligned_steps=4, user_steps=user_steps, training=training)
    assert total == plain + 4 * rounds


@pytest.mark.release  # by default, the published bookkeeping alone is compared
def test_without_pull_and_alignment_it_is_plain_fine_tuning(model):
    plain, same, other = plain_without_both_and_with_both(model)
    chex.assert_trees_all_close(same.backbone, plain.backbone, atol=1e-6)
    assert distance(other.backbone, plain.backbone) > 1e-3


@pytest.mark.release
def test_without_pull_and_alignment_it_is_plain_fine_tuning_bit_for_bit():
    call_as_compiled_for_users(assert_plain_bit_for_bit)


def assert_plain_bit_for_bit():
    plain, same, other = plain_without_both_and_with_both(tiny_model())
    assert same.fingerprint == plain.fingerprint != other.fingerprint


def plain_without_both_and_with_both(model):
    plain = train_model(model, USER, training=TRAINING)
    same = finetune(model, USER, safe=SAFE, aligned_steps=0, user_steps=3, rho=0.0, training=TRAINING)
    return plain, same, finetune(model, USER, safe=SAFE, **STATES, training=TRAINING)


def test_the_pull_keeps_the_weights_together(model):
    moved = []
    for rho in (1.0, 30.0):
        after = finetune(model, USER, safe=SAFE, **STATES, rho=rho, training=TRAINING)
        moved.append(float(distance(after.backbone, model.backbone)))
    assert moved[1] < 0.8 * moved[0]


def test_a_task_adapter_moves_alone(model):
    before = fingerprint(model.backbone)
    options = {
        "extra_rows": {"safe": SAFE},
        "make_step": lisa(1, 1, rho=0.1),
        "task": LoRA(rank=2),
        "training": TRAINING,
    }
    found = train_model(model, USER, **options)
    assert fingerprint(merge(model.backbone, found.adapter)) == found.fingerprint
    assert fingerprint(model.backbone) == before
    assert all(jnp.abs(factors["b"]).max() > 0 for factors in found.adapter.factors.values())


def test_a_stopped_training_goes_on_with_the_weights_of_the_last_switch(model, tmp_path):
    class Stop(Exception):
        pass

    def stop(step, steps, metrics):
        if step == 4:
            raise Stop

    options = STATES | {"safe": SAFE, "training": TRAINING}
    whole = finetune(model, USER, **options)
    options["checkpoints"] = Checkpoints(tmp_path, save_every_seconds=0.0)
    with pytest.raises(Stop):
        finetune(model, USER, on_step=stop, **options)
    steps = []
    again = finetune(model, USER, on_step=lambda step, *_: steps.append(step), **options)
    assert again.fingerprint == whole.fingerprint and steps[0] > 1


def test_states_without_steps_are_refused(model):
    with pytest.raises(UserError, match="user_steps is 0: it must be at least 1"):
        finetune(model, random_examples(2), safe=SAFE, user_steps=0)
