"""The mesh, the table of axes, and where trees of arrays are placed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import example as with_example
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from secvec_jax import sharding
from secvec_jax.config import Training
from secvec_jax.errors import UserError
from secvec_jax.model.architecture import Architecture
from secvec_jax.model.decoder import Decoder, abstract_decoder
from secvec_jax.sharding import (
    AXIS_RULES,
    MESH_AXES,
    all_gather,
    constrain,
    logical_axes,
    make_mesh,
    named_sharding,
    num_shards,
    parse_mesh,
    partition_spec,
    replicate,
    shard,
)
from secvec_jax.training.objective import Backbone, Params
from secvec_jax.training.optimizers import make_optimizer
from secvec_jax.training.phase import Phase
from secvec_jax.vectors.lora import LoRA

MESHES = [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}]
# With every kind of leaf that there is: an untied head, biases, norms of queries and keys.
ARCHITECTURE = Architecture(
    "qwen3", 320, 32, 64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    qkv_bias=True, output_bias=True, mlp_bias=True, qk_norm=True,
)  # fmt: skip
PHASES = {
    "phase 1": {"backbone": "freeze", "vectors": "train"},
    "phase 2": {"backbone": "train", "vectors": "freeze"},
    "task": {"backbone": {"decoder": "freeze", "adapter": "train"}, "vectors": "freeze"},
}


@pytest.fixture(params=MESHES, ids=str)
def ambient(request):
    with jax.set_mesh(make_mesh(**request.param)):
        yield jax.sharding.get_mesh()


def built():
    """Everything that a training holds: a decoder, a task adapter, vectors."""
    vectors = LoRA(rank=4).init(ARCHITECTURE, jax.random.key(1))
    task = LoRA(rank=2, targets=("q_proj", "*down*")).init(ARCHITECTURE, jax.random.key(2))
    return Params(Backbone(Decoder(ARCHITECTURE, nnx.Rngs(0)), task), vectors)


@pytest.fixture(scope="module")
def params():
    return built()


# The settings -------------------------------------------------------------------------------------

MESH_TEXT = st.lists(
    st.tuples(st.sampled_from([*MESH_AXES, "model", ""]), st.sampled_from(["=", " = ", ":", ""]), st.integers(-1, 12)),
    max_size=4,
).map(lambda parts: ",".join(f"{axis}{sign}{size}" for axis, sign, size in parts))


@given(st.text() | MESH_TEXT)
@with_example("fsdp=1\u0664")  # a digit of another script
@with_example("fsdp=" + 5000 * "1")
@with_example("fsdp=8\n,")
def test_any_text_gives_sizes_or_a_user_error(text):
    try:
        sizes = parse_mesh(text)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert sizes and set(sizes) <= set(MESH_AXES) and min(sizes.values()) >= 1
        assert parse_mesh(",".join(f"{axis}={size}" for axis, size in sizes.items())) == sizes


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("fsdp=8", {"fsdp": 8}),
        ("tensor=4,data=16", {"tensor": 4, "data": 16}),
        (" fsdp = 2 , tensor = 1 ", {"fsdp": 2, "tensor": 1}),
    ],
)
def test_a_mesh_is_read(text, sizes):
    assert parse_mesh(text) == sizes


@pytest.mark.parametrize(
    "text", ["", "8", "fsdp", "fsdp=0", "fsdp=-2", "fsdp=2,fsdp=4", "model=2", "fsdp=2,", "fsdp=2.0"]
)
def test_a_mesh_that_cannot_be_read_is_shown_with_the_form(text):
    with pytest.raises(UserError) as error:
        parse_mesh(text)
    assert repr(text) in str(error.value) and "fsdp=8,tensor=4" in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"fsdp": 3}, "mesh fsdp=3 needs 3 devices, but there are 8: the product of the axes must be 8"),
        ({"fsdp": 8, "tensor": 2}, "mesh fsdp=8 x tensor=2 needs 16 devices, but there are 8"),
        ({}, "mesh fsdp=1 needs 1 devices, but there are 8"),
    ],
)
def test_a_mesh_must_take_all_devices(sizes, words):
    with pytest.raises(UserError, match=words):
        make_mesh(**sizes)


def test_a_mesh_has_all_axes_whatever_their_sizes():
    assert dict(make_mesh(fsdp=8).shape) == {"slice": 1, "data": 1, "fsdp": 8, "tensor": 1}
    assert dict(make_mesh(data=2, tensor=4).shape) == {"slice": 1, "data": 2, "fsdp": 1, "tensor": 4}
    assert make_mesh(fsdp=2, devices=jax.devices()[:2]).size == 2


class Chip:
    """A TPU of a slice of 2x2, as much of it as a mesh asks for."""

    platform, device_kind = "tpu", "TPU v5 lite"

    def __init__(self, number: int, slice_index: int | None = None):
        if slice_index is not None:
            self.slice_index = slice_index
        self.id, self.process_index = 4 * (slice_index or 0) + number, slice_index or 0
        self.coords, self.core_on_chip = (number % 2, number // 2, 0), 0


def test_each_slice_of_tpus_has_all_axes_but_its_own():
    chips = [Chip(number, index) for number in range(4) for index in (1, 0)]  # in no order
    mesh = make_mesh(slice=2, fsdp=2, tensor=2, devices=chips)
    assert dict(mesh.shape) == {"slice": 2, "data": 1, "fsdp": 2, "tensor": 2}
    assert [{chip.slice_index for chip in part.flat} for part in mesh.devices] == [{0}, {1}]
    for sizes in ({"slice": 4, "fsdp": 2}, {"fsdp": 8}, {"data": 2, "fsdp": 4}):
        with pytest.raises(UserError, match=r"the devices are of 2: use slice=2"):
            make_mesh(**sizes, devices=chips)
    with pytest.raises(UserError, match=r"mesh slice=2 is for 2 TPU slices, but the devices are of 1: use slice=1"):
        make_mesh(slice=2, fsdp=2, devices=[Chip(number) for number in range(4)])
    assert make_mesh(fsdp=4, devices=[Chip(number) for number in range(4)]).size == 4


# The table ----------------------------------------------------------------------------------------


def test_every_axis_in_use_has_its_place(params):
    named = logical_axes(params)
    assert len(named) == len(jax.tree.leaves(params))
    for leaf, axes in zip(jax.tree.leaves(params), named, strict=True):
        assert len(axes) == leaf.ndim and set(axes) <= set(AXIS_RULES), axes


def test_the_decoder_has_no_leaf_without_names():
    decoder = abstract_decoder(ARCHITECTURE)
    variables = jax.tree.leaves(decoder, is_leaf=lambda node: isinstance(node, nnx.Variable))
    assert all(isinstance(node, nnx.Variable) and node.get_metadata("axes") for node in variables)


def test_no_two_axes_of_an_array_share_a_mesh_axis(params):
    activations = [("batch", "length", "heads", "head_dim"), ("layers", "batch", "heads", "length", "head_dim"),
                   ("batch", "length", "hidden"), ("copies", "length", "embed")]  # fmt: skip
    for axes in [*logical_axes(params), *activations]:
        used = [name for axis in axes for name in sharding._mesh_axes(axis)]
        assert len(used) == len(set(used)), axes


def test_places_are_mesh_axes():
    for place in AXIS_RULES.values():
        assert set(jax.tree.leaves(place)) <= set(MESH_AXES)


@pytest.mark.parametrize(
    ("sizes", "axes", "expected"),
    [
        ({"fsdp": 8}, ("layers", "embed", "heads"), P(None, "fsdp")),
        ({"fsdp": 8}, ("heads", "head_dim"), P()),
        ({"fsdp": 8}, ("batch", "length"), P("fsdp")),
        ({"data": 2, "fsdp": 4}, ("batch", "length"), P(("data", "fsdp"))),
        ({"data": 2, "fsdp": 4}, ("copies",), P("data")),
        ({"slice": 2, "fsdp": 4}, ("batch", "length"), P(("slice", "fsdp"))),
        ({"slice": 2, "data": 2, "fsdp": 2}, ("copies",), P(("slice", "data"))),
        ({"slice": 2, "fsdp": 4}, ("layers", "embed", "heads"), P(None, "fsdp")),
        ({"fsdp": 4, "tensor": 2}, ("vocab", "embed"), P("tensor", "fsdp")),
        ({"fsdp": 4, "tensor": 2}, ("layers", "mlp", None), P(None, "tensor")),
        ({"fsdp": 4, "tensor": 2}, (None, "rank"), P()),
    ],
)
def test_a_spec_names_no_axis_of_one_device_and_has_no_trailing_none(sizes, axes, expected):
    with jax.set_mesh(make_mesh(**sizes)):
        found = partition_spec(*axes)
        assert tuple(found) == tuple(expected)
        assert named_sharding(*axes) == NamedSharding(jax.sharding.get_mesh(), expected)


def test_a_spec_is_in_xlas_own_spelling(ambient, params):
    """Else the outputs of a step would not be of the type of its inputs, and it would be compiled twice."""
    moved = jax.jit(lambda tree: shard(jax.tree.map(lambda leaf: leaf + 1, tree)))(params)
    for leaf, axes in zip(jax.tree.leaves(moved), logical_axes(moved), strict=True):
        assert tuple(leaf.sharding.spec) == tuple(partition_spec(*axes))


# Laying out ---------------------------------------------------------------------------------------


def check(tree):
    """Every leaf lies as its axes say; returns the leaves."""
    leaves = jax.tree.leaves(tree)
    for leaf, axes in zip(leaves, logical_axes(tree), strict=True):
        assert leaf.sharding.is_equivalent_to(named_sharding(*axes), leaf.ndim), axes
    return leaves


def test_parameters_are_sharded_as_their_axes_say(ambient, params):
    laid = shard(params)
    leaves = check(laid)
    for mine, theirs in zip(leaves, jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    spread = sum(not leaf.sharding.is_fully_replicated for leaf in leaves)
    assert spread == 0 if ambient.shape["data"] == 8 else spread > len(leaves) / 3


TRAININGS = {
    "momentum": Training.base,
    "sgd": Training(momentum=0.0).over(Training.base),
    "adamw": Training("adamw", max_grad_norm=1.0).over(Training.base),
}


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("phase", PHASES)
def test_optimizer_states_are_sharded_as_what_they_mirror(params, phase, training):
    phase, training = Phase(PHASES[phase]), TRAININGS[training]
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        laid = shard(params)
        trained, _ = phase.split(laid)
        state = jax.jit(lambda trained: shard(phase.optimizer(make_optimizer(training, 9), laid).init(trained)))(
            trained
        )
        leaves = check(state)
        check(shard(jax.tree.map(np.asarray, state)))
        # Each moment of a spread parameter is spread, and nothing else is.
        moments = 2 if training.optimizer == "adamw" else int(training.momentum > 0)
        spread = [leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(trained)].count(False)
        assert spread > 0
        assert [leaf.sharding.is_fully_replicated for leaf in leaves].count(False) == moments * spread


def test_axes_follow_a_masked_state(params):
    trained, _ = Phase(PHASES["task"]).split(params)
    state = Phase(PHASES["task"]).optimizer(optax.adam(0.1), params).init(trained)
    adapter = jax.tree.leaves(params.backbone.adapter.axes(), is_leaf=lambda axes: type(axes) is tuple)
    named = [axes for leaf, axes in zip(jax.tree.leaves(state), logical_axes(state), strict=True) if leaf.ndim]
    assert named == adapter * 2  # first and second moments


def test_without_a_mesh_everything_stays_the_same_object(params):
    for tree in (params, params.vectors, {"x": np.ones(3)}):
        assert shard(tree) is tree and replicate(tree) is tree
    array = jnp.ones((2, 3))
    assert constrain(array, "batch", "embed") is array and all_gather(array, "embed", "heads") is array
    assert named_sharding("batch") is None and num_shards("batch") == 1


def test_an_array_that_does_not_divide_stays_whole_along_that_axis():
    with jax.set_mesh(make_mesh(fsdp=4, tensor=2)):
        lines = jax.jit(lambda x: constrain(x, "batch", "heads"))
        assert tuple(lines(jnp.ones((8, 6))).sharding.spec) == ("fsdp", "tensor")
        assert tuple(lines(jnp.ones((3, 6))).sharding.spec) == (None, "tensor")


def test_a_gathered_weight_is_whole_and_its_gradient_is_not():
    def gather(weight):
        return all_gather(weight, "embed", "heads")

    with jax.set_mesh(make_mesh(fsdp=4, tensor=2)):
        weight = jax.device_put(np.arange(64.0).reshape(8, 8), named_sharding("embed", "heads"))
        gathered = jax.jit(gather)(weight)
        gradient = jax.jit(jax.grad(lambda weight: (gather(weight) ** 2).sum()))(weight)
        assert tuple(gathered.sharding.spec) == (None, "tensor")
        assert gradient.sharding == weight.sharding
        np.testing.assert_array_equal(gathered, weight)
        np.testing.assert_array_equal(gradient, 2 * np.asarray(weight))
