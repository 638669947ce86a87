"""Low-rank vectors: no effect when fresh, scaled as documented, controlled by norm, mergeable."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from secvec_jax.errors import UserError
from secvec_jax.model import hub
from secvec_jax.model.adapter import Adapter
from secvec_jax.model.architecture import PROJECTIONS
from secvec_jax.model.decoder import ForwardOptions
from secvec_jax.sharding import make_mesh, shard
from secvec_jax.vectors.lora import LoRA, LoRAVectors, _merged_kernel, merge, merge_adapters, random_like
from secvec_jax.vectors.steering import Steering, SteeringVectors


@pytest.mark.parametrize("targets", [("*",), ("q_proj", "v_proj")])
@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_fresh_vectors_change_nothing(tiny_model, logits, tokens, variant, targets):
    model = tiny_model(variant).model
    fresh = LoRA(rank=4, targets=targets).init(model.architecture, jax.random.key(0))
    fresh.check(model.architecture)
    np.testing.assert_array_equal(logits(model, tokens, adapters=(fresh,)), logits(model, tokens))


def test_fresh_factors_have_pefts_distribution(tiny_model):
    architecture = tiny_model("qwen3").model.architecture
    fresh = LoRA(rank=64).init(architecture, jax.random.key(0))
    assert set(fresh.factors) == set(PROJECTIONS)
    for projection, factors in fresh.factors.items():
        inputs, outputs = architecture.kernel_shape(projection)
        chex.assert_shape(factors["a"], (2, inputs, 64))
        chex.assert_shape(factors["b"], (2, 64, outputs))
        # Kaiming-uniform with a = sqrt(5) is uniform within 1 / sqrt(inputs).
        bound = 1 / math.sqrt(inputs)
        assert 0.98 * bound < jnp.abs(factors["a"]).max() <= bound
        np.testing.assert_allclose(factors["a"].std(), bound / math.sqrt(3), rtol=0.05)
        assert not factors["b"].any()
    first, second = fresh.factors["q_proj"]["a"], fresh.factors["k_proj"]["a"]
    assert not jnp.array_equal(first, second) and not jnp.array_equal(first[0], first[1])


@pytest.mark.parametrize(
    ("patterns", "projections"),
    [
        (("*",), PROJECTIONS),
        (("q_proj",), ("q_proj",)),
        (("[qv]_proj",), ("q_proj", "v_proj")),
        (("v_proj", "q_proj"), ("q_proj", "v_proj")),
        (("?_proj", "down*"), ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")),
        (("*", "q_proj"), PROJECTIONS),
    ],
)
def test_patterns_choose_sites(tiny_model, patterns, projections):
    spec, architecture = LoRA(rank=2, targets=patterns), tiny_model("llama").model.architecture
    assert spec.projections(architecture) == tuple(projections)
    assert set(spec.init(architecture, jax.random.key(0)).factors) == set(projections)


@pytest.mark.parametrize("pattern", ["attention", "w_proj", "", "Q_PROJ"])
def test_patterns_that_match_nothing_are_refused(pattern):
    with pytest.raises(UserError, match=f"'{pattern}' matches nothing: the projections are q_proj"):
        LoRA(targets=("*", pattern))


@pytest.mark.parametrize("rank", [0, -1])
def test_ranks_below_one_are_refused(rank):
    with pytest.raises(UserError, match=f"rank is {rank}"):
        LoRA(rank=rank)


def test_no_targets_are_refused():
    with pytest.raises(UserError, match="target"):
        LoRA(targets=())


@pytest.mark.parametrize(("spec", "scale"), [(LoRA(8, 16.0), 2), (LoRA(16, 8.0), 0.5), (LoRA(16, 8.0, True), 2)])
def test_scale(spec, scale):
    assert spec.scale == scale


@pytest.mark.parametrize("rslora", [False, True])
def test_the_update_is_scale_times_a_b(tiny_model, random_vectors, rslora):
    model = tiny_model("llama").model
    vectors = random_vectors(model, rank=4, alpha=6.0, rslora=rslora, targets=("up_proj",))
    layer = jax.tree.map(lambda leaf: leaf[1], vectors)
    x, y, kernel = jnp.ones((2, 32)), jnp.ones((2, 64)), jnp.ones((32, 64))
    a, b = (np.asarray(vectors.factors["up_proj"][name][1], np.float64) for name in ("a", "b"))
    scale = 6 / (math.sqrt(4) if rslora else 4)
    np.testing.assert_allclose(layer.kernel("up_proj", kernel), kernel + scale * a @ b, rtol=1e-5)
    for projection in ("up_proj", "gate_proj"):
        np.testing.assert_array_equal(layer.linear(projection, x, y), y)
    assert layer.kernel("gate_proj", kernel) is kernel


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("variant", ["llama-biases", "qwen2", "qwen3"])
def test_merged_is_adapted(tiny_model, logits, tokens, random_vectors, variant, rslora):
    model = tiny_model(variant).model
    for targets in (("*",), ("v_proj", "down_proj")):
        vectors = random_vectors(model, rank=3, alpha=5.0, rslora=rslora, targets=targets)
        merged = merge(model.backbone, vectors)
        chex.assert_trees_all_equal_shapes_and_dtypes(merged, model.backbone)
        adapter = logits(model, tokens, adapters=(vectors,))
        np.testing.assert_allclose(logits(merged, tokens), adapter, rtol=0, atol=1e-4)
        assert np.abs(adapter - logits(model, tokens)).max() > 1e-2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Doubled(Adapter):
    """An adapter that changes kernels and does not commute with LoRA's update."""

    def kernel(self, projection, kernel):
        return 2 * kernel


def test_merging_adapters_leaves_what_they_compute(tiny_model, logits, tokens, random_vectors):
    model = tiny_model("llama").model
    one, other = random_vectors(model, rank=3), random_vectors(model, seed=1, rank=2, targets=("q_proj", "*down*"))
    steering = SteeringVectors({"direction": jnp.ones((2, 32))}, Steering())
    for adapters, expected in (
        ((one, other), ()),
        ((steering, one, other), (steering,)),
        ((one, Doubled(), other), (Doubled(), other)),
    ):
        merged, left = merge_adapters(model.backbone, adapters)
        assert list(map(type, left)) == list(map(type, expected))
        together = logits(model, tokens, adapters=adapters)
        np.testing.assert_allclose(logits(merged, tokens, adapters=left), together, rtol=0, atol=1e-4)
        assert np.abs(together - logits(model, tokens)).max() > 0.1
    backbone, left = merge_adapters(model.backbone, (steering,))
    assert backbone is model.backbone and left == (steering,)
    assert merge_adapters(model.backbone, ())[0] is model.backbone


def test_merging_changes_the_targets_only(tiny_model, random_vectors):
    model = tiny_model("llama-biases").model
    before = jax.tree.map(jnp.copy, model.backbone)
    merged = merge(model.backbone, random_vectors(model, targets=("v_proj",)))
    chex.assert_trees_all_equal(model.backbone, before)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), merged, model.backbone)
    assert [jax.tree_util.keystr(p) for p, c in jax.tree_util.tree_leaves_with_path(changed) if c] == [
        ".layers.attention.v_proj.kernel.value"
    ]


def test_on_a_mesh_no_device_holds_a_whole_update(tiny_model, random_vectors):
    tiny = tiny_model("llama", hidden_size=128, intermediate_size=256)
    vectors = random_vectors(tiny.model)
    expected = merge(tiny.model.backbone, vectors)
    with jax.set_mesh(make_mesh(fsdp=8)):
        backbone, spread = hub.load(tiny.folder).backbone, shard(vectors)
        merged = merge(backbone, spread)
        for ours, before, plain in zip(*map(jax.tree.leaves, (merged, backbone, expected)), strict=True):
            assert ours.sharding == before.sharding
            np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-6)
        kernel, factors = backbone.layers.mlp.up_proj.kernel[...], spread.factors["up_proj"]
        program = _merged_kernel.lower("up_proj", vectors.spec.scale, kernel, factors["a"], factors["b"]).compile()
    assert program.memory_analysis().temp_size_in_bytes < kernel.nbytes / 2


@pytest.mark.parametrize("targets", [("*",), ("q_proj", "down_proj")])
def test_random_control_has_each_layers_norm_and_nothing_else(tiny_model, random_vectors, targets):
    model = tiny_model("llama").model
    vectors = random_vectors(model, rank=4, targets=targets)
    # Layers of different strength must keep their own.
    for own in vectors.factors.values():
        own["b"] = own["b"] * jnp.array([1.0, 7.0])[:, None, None]
    control = random_like(vectors, jax.random.key(5))
    assert control.spec == vectors.spec
    chex.assert_trees_all_equal_shapes_and_dtypes(control, vectors)
    control.check(model.architecture)
    for projection in vectors.factors:
        wanted, found = (
            np.asarray(f[projection]["a"] @ f[projection]["b"]) for f in (vectors.factors, control.factors)
        )
        for layer in range(2):
            np.testing.assert_allclose(np.linalg.norm(found[layer]), np.linalg.norm(wanted[layer]), rtol=1e-4)
            cosine = np.vdot(found[layer], wanted[layer]) / np.linalg.norm(wanted[layer]) ** 2
            assert abs(cosine) < 0.25, "the control resembles the vectors"
    chex.assert_trees_all_equal(control, random_like(vectors, jax.random.key(5)))
    other = random_like(vectors, jax.random.key(6))
    assert all(not jnp.array_equal(a, b) for a, b in zip(jax.tree.leaves(control), jax.tree.leaves(other)))


def test_random_control_of_fresh_vectors_is_zero(tiny_model, logits, tokens):
    model = tiny_model("llama").model
    fresh = LoRA(rank=2).init(model.architecture, jax.random.key(0))
    control = random_like(fresh, jax.random.key(1))
    chex.assert_tree_all_finite(control)
    np.testing.assert_array_equal(logits(model, tokens, adapters=(control,)), logits(model, tokens))


def test_vectors_of_another_shape_are_refused(tiny_model, random_vectors):
    vectors = random_vectors(tiny_model("llama").model)
    vectors.check(tiny_model("llama").model.architecture)
    for other in (tiny_model("llama-mha"), tiny_model("qwen3"), tiny_model("llama", num_hidden_layers=5)):
        with pytest.raises(UserError, match="wrong backbone"):
            vectors.check(other.model.architecture)


def test_gradients_reach_the_vectors_alone(tiny_model, tokens, random_vectors):
    model = tiny_model("llama").model

    def loss(vectors, backbone):
        return jnp.square(backbone(tokens, adapters=(vectors,))).sum()

    gradients = jax.jit(jax.grad(loss))(random_vectors(model, rank=2), model.backbone)
    assert gradients.spec.rank == 2 and set(gradients.factors) == set(PROJECTIONS)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ThinProducts(Adapter):
    """The same vectors by the textbook: two thin products for every token, and whatever gradients they have."""

    vectors: LoRAVectors

    def linear(self, projection, x, y):
        factors = self.vectors.factors.get(projection)
        return y if factors is None else y + self.vectors.spec.scale * (x @ factors["a"]) @ factors["b"]


@pytest.mark.parametrize("targets", [("*",), ("q_proj", "down_proj")])
def test_vectors_in_the_weights_are_thin_products(tiny_model, random_vectors, logits, tokens, targets):
    model = tiny_model("llama-biases").model
    vectors = random_vectors(model, rank=3, targets=targets)
    ours, plain = (logits(model, tokens, adapters=(adapter,)) for adapter in (vectors, ThinProducts(vectors)))
    assert np.abs(plain - logits(model, tokens)).max() > 0.1
    np.testing.assert_allclose(ours, plain, atol=2e-5 * np.abs(plain).max())


@pytest.mark.parametrize(
    "remat", ["full", *(pytest.param(name, marks=pytest.mark.release) for name in ("none", "dots"))]
)
def test_gradients_of_weights_and_of_two_adapters_are_those_of_thin_products(tiny_model, random_vectors, tokens, remat):
    model = tiny_model("qwen3").model
    adapters = (random_vectors(model, rank=3), random_vectors(model, seed=1, rank=2, rslora=True))

    def loss(backbone, adapters):
        return (backbone(tokens, adapters=adapters, options=ForwardOptions(remat=remat)) ** 2).mean()

    found = [
        jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(model.backbone, kind))
        for kind in (adapters, tuple(map(ThinProducts, adapters)))
    ]
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(abs(other).max()))


def test_frozen_vectors_keep_nothing_for_gradients(tiny_model, random_vectors, tokens):
    """A saved input of every projection would be there for factors that nobody differentiates."""
    model = tiny_model("llama").model
    vectors = random_vectors(model, rank=3)

    def kept(adapters):
        def loss(backbone):
            return (backbone(tokens, adapters=adapters) ** 2).mean()

        return jax.jit(jax.grad(loss)).lower(model.backbone).compile().memory_analysis().temp_size_in_bytes

    thin = sum(leaf.size * 4 for leaf in jax.tree.leaves(vectors))
    assert kept((vectors,)) - kept(()) < 4 * thin
