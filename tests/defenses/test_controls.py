"""The oracle, benign only: which rows it is trained on, for how many steps and in which order."""

import pytest

from secvec_jax.config import Training
from secvec_jax.defenses import controls
from secvec_jax.defenses.controls import BenignOnly
from secvec_jax.defenses.finetuning import stream_of
from tests.defenses.toy_inputs import ToyInputs
from tests.toys import random_examples, tiny_model

ROWS = {"attack": random_examples(30, seed=1), "task": random_examples(30, seed=2)}
TRAINING = Training(learning_rate=1e-2, epochs=3, batch_size=1, max_seq_len=64, share_prefix=False, seed=5)


@pytest.fixture
def trained(monkeypatch):
    """What is trained on, and how."""
    calls = []

    def spy(model, rows, **options):
        calls.append((rows, options["training"]))
        return model

    monkeypatch.setattr(controls, "train_model", spy)
    return calls


def test_it_has_as_many_passes_or_as_many_steps_as_a_fine_tuning_on_all_rows(trained):
    inputs = ToyInputs(tiny_model(), ROWS, training=TRAINING)
    BenignOnly().apply(inputs)
    BenignOnly(matched="steps").apply(inputs)
    (rows, by_passes), (same_rows, by_steps) = trained
    assert rows == same_rows == {"task": ROWS["task"]} and by_passes.seed == by_steps.seed == 5
    assert by_passes.max_steps is None and by_passes.epochs == 3
    counts = [stream_of(inputs.aligned, groups, TRAINING).count() for groups in (ROWS, rows)]
    assert by_steps.max_steps == counts[0] > 1.5 * counts[1]


def test_another_order_is_another_seed_of_the_rows_order(trained):
    BenignOnly(order=2).apply(ToyInputs(tiny_model(), ROWS, training=TRAINING))
    assert trained[0][1].seed == 7


def test_where_all_rows_are_the_attacks_it_is_the_aligned_model(trained):
    model = tiny_model()
    inputs = ToyInputs(model, {"attack": ROWS["attack"]}, training=TRAINING)
    assert BenignOnly(matched="steps", order=1).apply(inputs).model is model and not trained
