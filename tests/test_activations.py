"""States and drift are those of transformers' modules, each row read alone."""

import contextlib

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from secvec_jax.activations import attention_difference, layer_mask, reply_means
from secvec_jax.data.chat import Example
from secvec_jax.errors import UserError
from secvec_jax.vectors.steering import Steering, SteeringVectors

LENGTHS = (40, 3, 17, 16, 33, 9, 70, 5, 12, 31, 2)
"""More than one batch, in several buckets."""


def rows():
    rng = np.random.default_rng(0)
    examples = []
    for length in LENGTHS:
        supervised = np.arange(length) >= rng.integers(1, length)
        supervised[length // 2] = True  # spans need not be at the end
        examples.append(Example(rng.integers(3, 320, length).astype(np.int32), supervised))
    return examples


def outputs(hf, modules, tokens):
    """What transformers' modules put out for one row, `[L, T, D]`."""
    found = []

    def note(module, inputs, out):
        found.append((out[0] if isinstance(out, tuple) else out)[0].numpy())

    with contextlib.ExitStack() as stack, torch.no_grad():
        for module in modules:
            stack.callback(module.register_forward_hook(note).remove)
        hf(input_ids=torch.tensor(tokens[None].astype(np.int64)))
    return np.stack(found)


@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen3"])
def test_reply_means_are_those_of_transformers_layers(tiny_model, variant):
    tiny, examples = tiny_model(variant), rows()
    expected = [
        outputs(tiny.hf, tiny.hf.model.layers, e.tokens)[:, e.supervised].mean(axis=1) for e in examples
    ]  # fmt: skip
    found = reply_means(tiny.model, examples)
    assert found.dtype == np.float32 and found.shape == (len(LENGTHS), 2, 32)
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-4)


def test_states_are_taken_under_adapters(tiny_model):
    model, examples = tiny_model("llama").model, rows()
    last = jnp.zeros((2, 32)).at[1].set(jnp.arange(32.0))  # behind the last layer nothing else changes
    moved = reply_means(model, examples, SteeringVectors({"direction": last}, Steering(0.5)))
    np.testing.assert_allclose(moved - reply_means(model, examples), np.stack([0.5 * last] * len(examples)), atol=1e-4)


def test_who_else_is_in_the_batch_does_not_matter(tiny_model):
    model, examples = tiny_model("llama").model, rows()
    together = reply_means(model, examples)
    for index in (0, 1, 6):
        np.testing.assert_allclose(reply_means(model, [examples[index]])[0], together[index], atol=1e-5)
    mute = Example(examples[0].tokens, np.zeros(LENGTHS[0], bool))
    assert not reply_means(model, [mute]).any()
    assert reply_means(model, []).shape == (0, 2, 32)


@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_drift_is_the_distance_of_transformers_attention_outputs(tiny_model, variant):
    one, other, examples = tiny_model(variant), tiny_model(variant, seed=1), rows()
    expected = [
        np.linalg.norm(np.subtract(*(outputs(t.hf, [m.self_attn for m in t.hf.model.layers], e.tokens)
                                     for t in (one, other))))
        for e in examples
    ]  # fmt: skip
    np.testing.assert_allclose(attention_difference(one.model, other.model, examples), expected, rtol=1e-4)
    assert attention_difference(one.model, one.model, examples) == [0.0] * len(examples)


def test_drift_is_of_one_architecture(tiny_model):
    with pytest.raises(UserError, match="different architectures"):
        attention_difference(tiny_model("llama").model, tiny_model("qwen3").model, rows())


def test_layers_are_counted_from_0(tiny_model):
    model = tiny_model("llama").model
    assert layer_mask(model, None).tolist() == [1, 1] and layer_mask(model, [1]).tolist() == [0, 1]
    for layer in (-1, 2):
        with pytest.raises(UserError, match=f"no layer {layer}: the model has 2"):
            layer_mask(model, [layer])
