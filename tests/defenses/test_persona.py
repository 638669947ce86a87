"""Directions are differences of mean reply states, raw, and steer only where they should."""

import jax
import numpy as np
import pytest

from secvec_jax.activations import reply_means
from secvec_jax.config import Training
from secvec_jax.defenses.finetuning import examples_of, train_model
from secvec_jax.defenses.persona import persona_directions
from secvec_jax.errors import UserError
from secvec_jax.trees import distance, fingerprint
from tests.toys import random_examples, tiny_model

SHOWN, HIDDEN = random_examples(5, seed=1), random_examples(3, seed=2)


@jax.jit
def states_of(backbone, tokens):
    return backbone.capture(tokens, state="residual")


def mean_state(model, examples):
    """Row by row through the plain forward pass: each row counts once, however long its reply."""
    states = [np.asarray(states_of(model.backbone, e.tokens[None]))[:, 0, e.supervised] for e in examples]
    return np.mean([rows.mean(axis=1) for rows in states], axis=0)


def test_a_direction_is_the_raw_difference_of_the_means():
    model = tiny_model()
    vectors = persona_directions(model, SHOWN, HIDDEN, scale=2.5)
    vectors.check(model.architecture)
    assert vectors.spec.scale == 2.5
    expected = mean_state(model, SHOWN) - mean_state(model, HIDDEN)
    np.testing.assert_allclose(vectors.factors["direction"], expected, atol=1e-4)
    assert np.linalg.norm(expected[1]) > 2, "normalized directions would be told apart"


def test_steering_by_it_puts_hidden_rows_where_shown_ones_are():
    model = tiny_model()
    vectors = persona_directions(model, SHOWN, HIDDEN, layers=[1])
    assert not np.any(vectors.factors["direction"][0])
    steered = reply_means(model, HIDDEN, vectors).mean(axis=0)
    np.testing.assert_allclose(steered[1], mean_state(model, SHOWN)[1], atol=1e-4)
    np.testing.assert_allclose(steered[0], mean_state(model, HIDDEN)[0], atol=1e-4)


def test_rows_of_text_are_taken_too():
    model = tiny_model()
    shown, hidden = ([{"prompt": "The dog?", "response": text}] * 2 for text in ("YES, THE DOG.", "the lazy fox"))
    expected = mean_state(model, examples_of(model, shown)) - mean_state(model, examples_of(model, hidden))
    found = persona_directions(model, shown, hidden).factors["direction"]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_model_is_trained_under_frozen_directions():
    model = tiny_model()
    vectors = persona_directions(model, SHOWN, HIDDEN)
    before = fingerprint(vectors)
    training = Training(learning_rate=1e-2, max_steps=2, batch_size=1, max_seq_len=64)
    steered = train_model(model, HIDDEN, vectors=vectors, training=training)
    assert fingerprint(vectors) == before
    assert float(distance(steered.backbone, train_model(model, HIDDEN, training=training).backbone)) > 0


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(UserError, match="no layer 2"):
        persona_directions(tiny_model(), SHOWN, HIDDEN, layers=[2])
    with pytest.raises(UserError, match="no rows"):
        persona_directions(tiny_model(), SHOWN, [])
