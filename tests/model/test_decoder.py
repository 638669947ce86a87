"""Laws of the decoder: adapters are arguments, rematerialization and packing change nothing, one compilation."""

import dataclasses
from collections import Counter
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from secvec_jax.batch import SHARED
from secvec_jax.model import attention
from secvec_jax.model.adapter import Adapter
from secvec_jax.model.architecture import PROJECTIONS, Architecture
from secvec_jax.model.attention import _attend_by_batched_products, rotate
from secvec_jax.model.attention_masks import visible
from secvec_jax.model.decoder import ForwardOptions, abstract_decoder, leaf_name
from secvec_jax.model.families import weight_names
from secvec_jax.trees import fingerprint
from secvec_jax.vectors.lora import LoRA


def _primitives(jaxpr) -> Counter:
    """How often each primitive occurs, inner programs included."""
    counts: Counter = Counter()
    for equation in jaxpr.eqns:
        counts[equation.primitive.name] += 1
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    counts += _primitives(inner)
    return counts


def test_without_adapters_the_program_is_the_bare_backbones(tiny_model, tokens):
    model = tiny_model("llama").model
    bare = jax.make_jaxpr(lambda b, t: b(t))(model.backbone, tokens)
    empty = jax.make_jaxpr(lambda b, t: b(t, adapters=()))(model.backbone, tokens)
    assert str(bare) == str(empty)
    assert _primitives(bare.jaxpr)["dot_general"] == len(PROJECTIONS) + 2

    vectors = LoRA(rank=2, targets=("q_proj", "up_proj")).init(model.architecture, jax.random.key(0))
    visited = jax.make_jaxpr(lambda b, t, v: b(t, adapters=(v,)))(model.backbone, tokens, vectors)
    assert _primitives(visited.jaxpr)["dot_general"] == len(PROJECTIONS) + 2 + 2


def test_without_adapters_the_logits_are_bit_identical(tiny_model, logits, tokens, random_vectors):
    model = tiny_model("qwen2").model
    bare = logits(model, tokens)
    logits(model, tokens, adapters=(random_vectors(model),))
    np.testing.assert_array_equal(logits(model, tokens, adapters=()), bare)
    np.testing.assert_array_equal(logits(model, tokens), bare)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shift(Adapter):
    """An adapter that adds a direction to one layer's output of a projection."""

    direction: jax.Array

    def linear(self, projection, x, y):
        return y + self.direction if projection == "down_proj" else y


def test_adapters_act_on_their_own_layer_and_in_order(tiny_model, logits, tokens):
    model = tiny_model("llama").model
    bare = logits(model, tokens)
    first, second = (Shift(jnp.zeros((2, 32)).at[layer].set(0.5)) for layer in (0, 1))
    moved = [logits(model, tokens, adapters=adapters) for adapters in ((first,), (second,), (first, second))]
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(moved, [bare, moved[0], moved[1]]))
    both = Shift(jnp.full((2, 32), 0.5))
    np.testing.assert_allclose(moved[2], logits(model, tokens, adapters=(both,)), rtol=0, atol=1e-5)

    # A direction in the last layer moves the final hidden states by itself, before the norm.
    hidden = model.backbone(tokens, adapters=(Shift(jnp.zeros((2, 32)).at[1].set(1e4)),))
    expected = np.asarray(model.backbone.final_norm.weight[...])
    np.testing.assert_allclose(np.asarray(hidden), np.broadcast_to(expected, hidden.shape), atol=5e-3)


@pytest.mark.parametrize(
    "variant", ["gemma2", *(pytest.param(name, marks=pytest.mark.release) for name in ("llama", "qwen3", "opt"))]
)
def test_rematerialization_gives_the_same_gradients(tiny_model, tokens, random_vectors, variant):
    model = tiny_model(variant).model

    @partial(jax.jit, static_argnames="remat")
    def gradients(backbone, vectors, remat):
        def loss(backbone, vectors):
            hidden = backbone(tokens, adapters=(vectors,), options=ForwardOptions(remat=remat))
            scores = jax.nn.log_softmax(backbone.logits(hidden[:, :-1]))
            return -jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1).mean()

        return jax.value_and_grad(loss, argnums=(0, 1))(backbone, vectors)

    plain = gradients(model.backbone, random_vectors(model), "none")
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain))
    for remat in ("dots", "full"):
        again = gradients(model.backbone, random_vectors(model), remat)
        chex.assert_trees_all_close(again, plain, rtol=1e-5, atol=1e-6)


def test_rematerialization_recomputes(tiny_model, tokens):
    def products(remat: str) -> int:
        def loss(backbone):
            return backbone(tokens, options=ForwardOptions(remat=remat)).sum()

        return _primitives(jax.make_jaxpr(jax.grad(loss))(tiny_model("llama").model.backbone).jaxpr)["dot_general"]

    assert products("none") < products("dots") < products("full")


def _packed(rows: list[np.ndarray], width: int, shared: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One line of all rows, whose first `shared` tokens are the same and stand there once; padding at the end."""
    tokens, segments, positions = (np.zeros((1, width), np.int32) for _ in range(3))
    tokens[0, :shared], segments[0, :shared], positions[0, :shared] = rows[0][:shared], SHARED, np.arange(shared)
    start = shared
    for number, row in enumerate(rows, 1):
        place = slice(start, start + len(row) - shared)
        tokens[0, place], segments[0, place], positions[0, place] = (
            row[shared:],
            number,
            np.arange(shared, len(row)),
        )
        start = place.stop
    return tokens, segments, positions


PACKED = [("llama", 0), ("llama", 4), ("mistral", 4), ("qwen3", 0), ("gemma2", 4), ("gemma3", 0), ("opt", 4)]
REPEATED = [("mistral", 0), ("qwen3", 4), ("gemma2", 0), ("gemma3", 4), ("opt", 0)]


@pytest.mark.parametrize(
    ("variant", "shared"), [*PACKED, *(pytest.param(*case, marks=pytest.mark.release) for case in REPEATED)]
)
def test_packed_rows_are_separate_rows(tiny_model, logits, random_vectors, variant, shared):
    model = tiny_model(variant).model
    rng = np.random.default_rng(0)
    head = rng.integers(3, 320, shared)
    rows = [np.concatenate([head, rng.integers(3, 320, n)]) for n in (7, 11, 7)]
    line = _packed(rows, 32, shared)
    adapters = (random_vectors(model),)
    packed = logits(model, *line, adapters=adapters)[0]
    start = shared
    for row in rows:
        alone = logits(model, row[None].astype(np.int32), adapters=adapters)[0]
        np.testing.assert_allclose(packed[:shared], alone[:shared], rtol=0, atol=1e-5)
        found = packed[start : start + len(row) - shared]
        np.testing.assert_allclose(found, alone[shared:], rtol=0, atol=1e-5)
        start += len(row) - shared


def test_padding_is_seen_by_no_row(tiny_model, logits):
    model = tiny_model("llama").model
    tokens, segments, positions = _packed([np.arange(5, 12), np.arange(20, 30)], 24, 0)
    other = np.where(segments == 0, 77, tokens)
    real = segments[0] != 0
    assert not real.all()
    before, after = (logits(model, t, segments, positions)[0][real] for t in (tokens, other))
    np.testing.assert_array_equal(before, after)


def test_visible_by_hand():
    segments = jnp.array([[SHARED, 1, 1, 2, 0]])
    positions = jnp.array([[0, 1, 2, 1, 0]])
    mask = visible(segments, segments, positions, positions)
    chex.assert_shape(mask, (1, 1, 5, 5))
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 0, 1]]
    np.testing.assert_array_equal(mask[0, 0], np.array(expected, bool))
    narrow = visible(segments, segments, positions, positions, window=2)[0, 0]
    np.testing.assert_array_equal(narrow[2], np.array([0, 1, 1, 0, 0], bool))


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("ends", [[], [3], [1, 5]])
def test_the_two_attention_kernels_agree_on_any_segments_of_keys(heads, ends):
    keys = jax.random.split(jax.random.key(0), 4)
    query = jax.random.normal(keys[0], (2, 5, heads, 8))
    key, value = (jax.random.normal(k, (2, 7, 2, 8)) for k in keys[1:3])
    mask = jax.random.bernoulli(keys[3], 0.6, (2, 1, 5, 7)).at[..., 0].set(True)
    general = jax.nn.dot_product_attention(query, key, value, mask=mask)
    keys = jnp.split(key.transpose(0, 2, 3, 1), ends, axis=3)
    values = jnp.split(value.swapaxes(1, 2), ends, axis=2)
    ours = _attend_by_batched_products(query, keys, values, mask)
    chex.assert_equal_shape([ours, query])
    np.testing.assert_allclose(ours, general, rtol=0, atol=1e-5)


@pytest.mark.parametrize("on", ["cpu", "gpu"])
def test_a_segment_that_all_rows_share_is_stored_once(on, monkeypatch):
    keys = jax.random.split(jax.random.key(0), 5)
    query = jax.random.normal(keys[0], (3, 4, 6, 8))
    shared, own = (jax.random.normal(k, (n, 2, 8, s)) for k, n, s in zip(keys[1:], (1, 3), (5, 4)))
    first, second = (jax.random.normal(k, (n, 2, s, 8)) for k, n, s in zip(keys[3:], (1, 3), (5, 4)))
    mask = jnp.ones((3, 1, 4, 9), bool)
    repeated = [jnp.repeat(part, 3, axis=0) for part in (shared, first)]
    expected = attention.attend(query, [repeated[0], own], [repeated[1], second], mask)
    monkeypatch.setattr(attention, "platform", lambda: on)
    np.testing.assert_allclose(attention.attend(query, [shared, own], [first, second], mask), expected, atol=1e-5)


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    frequencies = jnp.array([1.0, 0.3, 0.1, 0.01])

    def product(i, j):
        return jnp.vdot(rotate(q, jnp.array([[i]]), frequencies), rotate(k, jnp.array([[j]]), frequencies))

    np.testing.assert_allclose(product(9, 4), product(25, 20), rtol=1e-4)
    np.testing.assert_allclose(jnp.linalg.norm(rotate(q, jnp.array([[7]]), frequencies)), jnp.linalg.norm(q), 1e-6)
    np.testing.assert_array_equal(rotate(q, jnp.array([[0]]), frequencies), q)


def test_one_compilation_serves_all_values(tiny_model, tokens, random_vectors):
    models = [tiny_model("llama", seed=seed).model for seed in (0, 1)]

    @jax.jit
    @chex.assert_max_traces(n=1)
    def forward(backbone, tokens, segments, positions, adapters):
        return backbone.logits(backbone(tokens, segments, positions, adapters))

    results = []
    for seed, model in enumerate(models):
        positions = np.broadcast_to(np.arange(12, dtype=np.int32) + seed, tokens.shape)
        vectors = random_vectors(model, seed=seed)
        results.append(forward(model.backbone, tokens + seed, np.full_like(tokens, 1 + seed), positions, (vectors,)))
    chex.assert_shape(results, (3, 12, 320))
    assert jnp.abs(results[0] - results[1]).max() > 1e-2


def test_compile_time_does_not_grow_with_depth(tiny_model, tokens):
    shallow, deep = (tiny_model("llama", num_hidden_layers=n).model for n in (2, 5))
    programs = [jax.make_jaxpr(lambda b: b(tokens))(m.backbone) for m in (shallow, deep)]
    assert _primitives(programs[0].jaxpr) == _primitives(programs[1].jaxpr)


def test_a_batch_over_eight_devices_is_the_batch(tiny_model, logits, random_vectors):
    assert len(jax.devices()) == 8
    model = tiny_model("llama").model
    tokens = np.random.default_rng(0).integers(3, 320, (8, 12)).astype(np.int32)
    adapters = (random_vectors(model),)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    backbone, on_all = jax.device_put((model.backbone, adapters), everywhere)

    @jax.jit
    def forward(backbone, tokens, adapters):
        return backbone.logits(backbone(tokens, adapters=adapters))

    out = forward(backbone, jax.device_put(tokens, rows), on_all)
    assert out.sharding.is_equivalent_to(rows, out.ndim)
    np.testing.assert_allclose(np.asarray(out), logits(model, tokens, adapters=adapters), rtol=0, atol=1e-5)


def test_half_precision_computes_in_half_and_answers_in_float32(tiny_model, tokens):
    model = tiny_model("qwen2").model
    hidden, kv = model.backbone.prefill(tokens, dtype=jnp.bfloat16)
    assert hidden.dtype == kv.keys.dtype == kv.values.dtype == jnp.bfloat16
    assert model.backbone(tokens, options=ForwardOptions(jnp.bfloat16)).dtype == jnp.bfloat16
    out = model.backbone.logits(hidden)
    assert out.dtype == jnp.float32
    exact = model.backbone.logits(model.backbone(tokens))
    assert jnp.corrcoef(out.ravel(), exact.ravel())[0, 1] > 0.999


def test_only_prefill_keeps_keys_and_values(tiny_model, tokens):
    backbone = tiny_model("llama").model.backbone
    hidden, kv = backbone.prefill(tokens)
    np.testing.assert_array_equal(hidden, backbone(tokens))
    chex.assert_shape(kv.keys, (2, 3, 2, 8, 12))
    chex.assert_shape(kv.values, (2, 3, 2, 12, 8))
    # A forward pass that kept them would have them among the scan's outputs.
    scans = [e for e in jax.make_jaxpr(lambda: backbone(tokens))().jaxpr.eqns if e.primitive.name == "scan"]
    assert [len(scan.outvars) for scan in scans] == [1]


@pytest.mark.parametrize("state", ["attention", "residual"])
def test_captured_states_are_of_every_layer(tiny_model, tokens, state):
    backbone = tiny_model("llama").model.backbone
    states = backbone.capture(tokens, state=state)
    chex.assert_shape(states, (2, 3, 12, 32))
    if state == "residual":
        np.testing.assert_allclose(backbone.final_norm(states[-1]), backbone(tokens), rtol=0, atol=1e-6)


def test_inputs_of_the_wrong_shape_are_refused_while_tracing(tiny_model, tokens):
    backbone = tiny_model("llama").model.backbone
    for wrong in (
        {"tokens": tokens[0]},
        {"tokens": tokens, "segments": np.ones((3, 11), np.int32)},
        {"tokens": tokens, "positions": np.arange(12)},
    ):
        for method in (backbone, backbone.prefill, partial(backbone.capture, state="residual")):
            with pytest.raises(AssertionError, match=r"[Rr]ank|[Ss]hape"):
                jax.eval_shape(partial(method, **wrong))


def test_names_and_fingerprints_are_those_of_files_written_before():
    """The modules may change; a fingerprint that changed with them would refuse every file of vectors."""
    opt = Architecture("opt", 5, 4, 6, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=2, max_length=3)
    opt = dataclasses.replace(opt, norm="layer", gated=False, qkv_bias=True, learned_positions=True)
    filled = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.arange(leaf.size, dtype=np.float32).reshape(leaf.shape) + len(leaf_name(path)),
        abstract_decoder(opt),
    )
    assert fingerprint(filled) == "f9270921bb81c885cde56e8ce3842137dbad8710dc24dc845838969e5393d586"
    inside = {"backbone": filled, "x": np.zeros(1)}
    assert fingerprint(inside) == "0939b12d42ee111aa044462fb8b4b8ec789b3cce133e4539290f60ea13c1dfd3"
    normed = abstract_decoder(Architecture("llama", 5, 4, 6, 2, 2, 1, 2, qk_norm=True, post_norms=True))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), normed)
    assert fingerprint(zeros) == "2afa9adbebaf95ddc62277d4d16cd53ffcf4a13cc694befec94b95947e95b93c"


@pytest.mark.parametrize("variant", ["llama", "llama-biases", "qwen2", "qwen3-biases", "gemma3", "opt", "phi3"])
def test_every_leaf_has_a_name_and_axes(tiny_model, variant):
    architecture = tiny_model(variant).model.architecture
    decoder = abstract_decoder(architecture)
    leaves = jax.tree_util.tree_leaves_with_path(decoder)
    assert sorted(leaf_name(path) for path, _ in leaves) == sorted(weight_names(architecture))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for _, leaf in leaves)
