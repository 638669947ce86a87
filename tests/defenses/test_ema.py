"""The moving average of the weights: by hand, and of a fine-tuning whose every step is known."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from secvec_jax.config import Training
from secvec_jax.defenses.ema import averaged, finetune
from secvec_jax.defenses.finetuning import train_model
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.training.step import TrainStep
from tests.toys import random_examples, tiny_model

ROWS = random_examples(6, seed=1)
TRAINING = Training(learning_rate=1e-2, max_steps=2, batch_size=1, max_seq_len=64, warmup_steps=0, schedule="constant",
                    remat="none", share_prefix=False)  # fmt: skip


def test_the_average_by_hand():
    """Steps of -1, η = 1/2: the weights are 3, 2 and 1, their averages 3.5, 2.75 and 1.875."""

    def step(weights, state, frozen, batch):
        return {"w": weights["w"] - 1.0}, state + 1, {}

    train_step = averaged(TrainStep(lambda weights: 0, step), 0.5)
    mean = {"w": jnp.float32(4)}
    state = train_step.init(mean)
    for expected, weights in ((3.5, 3), (2.75, 2), (1.875, 1)):
        mean, state, _ = train_step.step(mean, state, None, {})
        assert float(mean["w"]) == expected and float(state["weights"]["w"]) == weights
    assert state["optimizer"] == 3


def leaves(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model.backbone)]


def test_the_steps_are_plain_ones_and_the_result_is_their_average():
    model = tiny_model()
    first, second = (train_model(model, ROWS, training=replace(TRAINING, max_steps=steps)) for steps in (1, 2))
    found = finetune(model, ROWS, decay=0.75, training=TRAINING)
    for w0, w1, w2, mean in zip(*map(leaves, (model, first, second, found)), strict=True):
        np.testing.assert_allclose(mean, 0.75**2 * w0 + 0.75 * 0.25 * w1 + 0.25 * w2, atol=1e-6)
    assert finetune(model, ROWS, decay=0.0, training=TRAINING).fingerprint == second.fingerprint
    assert finetune(model, ROWS, decay=1.0, training=TRAINING).fingerprint == model.fingerprint


@pytest.mark.release  # the state is a tree as that of any optimizer, whose resume is tested by default
def test_a_stopped_training_goes_on_with_the_weights_and_their_average(tmp_path):
    model, training = tiny_model(), replace(TRAINING, max_steps=4)

    class Stop(Exception):
        pass

    def stop(step, steps, metrics):
        if step == 2:
            raise Stop

    whole = finetune(model, ROWS, training=training)
    checkpoints = Checkpoints(tmp_path, save_every_seconds=0.0)
    with pytest.raises(Stop):
        finetune(model, ROWS, training=training, on_step=stop, checkpoints=checkpoints)
    steps = []
    again = finetune(
        model, ROWS, training=training, checkpoints=checkpoints, on_step=lambda step, *_: steps.append(step)
    )
    assert again.fingerprint == whole.fingerprint and steps[0] > 1
