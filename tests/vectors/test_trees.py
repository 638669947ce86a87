"""Measures of trees: a fingerprint that sees every bit, and the distance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from secvec_jax.trees import distance, fingerprint, num_parameters

_ARRAYS = hnp.arrays(
    np.float32, hnp.array_shapes(max_dims=3, max_side=4), elements=st.floats(-(2.0**80), 2.0**80, width=32)
)


@settings(max_examples=50)
@given(st.dictionaries(st.sampled_from("abcd"), _ARRAYS, min_size=1), st.data())
def test_one_ulp_in_any_leaf_changes_the_fingerprint(tree, data):
    before = fingerprint(tree)
    assert fingerprint({key: jnp.asarray(leaf) for key, leaf in tree.items()}) == before
    assert fingerprint({key: np.asfortranarray(leaf) for key, leaf in tree.items()}) == before
    name = data.draw(st.sampled_from(sorted(tree)))
    index = data.draw(st.integers(0, tree[name].size - 1))
    changed = tree[name].copy()
    changed.flat[index] = np.nextafter(changed.flat[index], np.float32(np.inf))
    assert fingerprint(tree | {name: changed}) != before


@pytest.mark.parametrize(
    "other",
    [
        {"b": np.zeros((2, 3), np.float32)},
        {"a": np.zeros((3, 2), np.float32)},
        {"a": np.zeros((2, 3), np.int32)},
        {"a": np.zeros((2, 3), np.float32), "b": np.zeros(0, np.float32)},
        {"a": -np.zeros((2, 3), np.float32)},
        {},
    ],
)
def test_names_shapes_types_and_signs_count(other):
    assert fingerprint(other) != fingerprint({"a": np.zeros((2, 3), np.float32)})


def test_scalars_and_half_precision_have_fingerprints():
    tree = {"step": jnp.int32(3), "half": jnp.ones(3, jnp.bfloat16)}
    assert fingerprint(tree) == fingerprint(jax.tree.map(jnp.copy, tree))
    assert fingerprint(tree) != fingerprint(tree | {"step": jnp.int32(4)})


def test_every_leaf_of_a_backbone_counts(tiny_model):
    model = tiny_model("qwen2").model
    leaves, structure = jax.tree.flatten(model.backbone)
    seen = {model.fingerprint, fingerprint(model.backbone)}
    assert len(seen) == 1
    for i, leaf in enumerate(leaves):
        value = np.array(leaf)
        value.flat[-1] = np.nextafter(value.flat[-1], np.float32(9))
        seen.add(fingerprint(jax.tree.unflatten(structure, [*leaves[:i], jnp.asarray(value), *leaves[i + 1 :]])))
    assert len(seen) == len(leaves) + 1


def test_distance_is_the_norm_over_all_leaves(tiny_model):
    backbone = tiny_model("llama").model.backbone
    moved = jax.tree.map(lambda leaf: leaf + 0.5, backbone)
    assert distance(backbone, backbone) == 0
    np.testing.assert_allclose(distance(backbone, moved), 0.5 * np.sqrt(num_parameters(backbone)), rtol=1e-5)
    assert num_parameters(backbone) == sum(parameter.numel() for parameter in tiny_model("llama").hf.parameters())
    a, b = {"x": jnp.array([3.0]), "y": jnp.array(1.0)}, {"x": jnp.array([0.0]), "y": jnp.array(5.0)}
    assert distance(a, b) == distance(b, a) == 5


def test_distance_is_measured_in_float32():
    a = {"x": jnp.full(1000, 100.0, jnp.bfloat16)}
    b = {"x": jnp.full(1000, 101.0, jnp.bfloat16)}
    assert distance(a, b).dtype == jnp.float32
    np.testing.assert_allclose(distance(a, b), np.sqrt(1000), rtol=1e-5)
