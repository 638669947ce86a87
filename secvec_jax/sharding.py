"""Where every array lies on the mesh of devices.

The model names the axes of its arrays by what they mean ("embed", "heads", "batch"). One table, `AXIS_RULES`, says over
which mesh axes each of them is sharded. The mesh is JAX's ambient one:

    with jax.set_mesh(make_mesh(fsdp=8, tensor=4)):
        model = load("owner/name")        # every device gets its part of the weights
        tuned = align(model, rows)        # every batch, gradient and optimizer state is sharded as the table says

Without a mesh nothing here does anything, and programs are those of one device.

    data    copies of the weights, each with its part of the batch
    fsdp    weights are sharded, and gathered layer by layer when they are used; the batch is sharded as well
    tensor  heads, MLP channels and vocabulary are sharded, and so is the work on them
"""

import functools
import math
import re
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from secvec_jax.checks import PositiveInt, checked
from secvec_jax.errors import UserError

AXIS_RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "copies": "data",
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    # Replicated on every device.
    "hidden": None,
    "layers": None,
    "length": None,
    "head_dim": None,
    "rank": None,
}
"""Logical axis -> the mesh axes that it is spread over.

"embed" is the model dimension of a weight, "hidden" that of an activation or of a low-rank factor; "copies" is a
batch that is not spread over fsdp.
"""

MESH_AXES = ("data", "fsdp", "tensor")

LogicalAxes = tuple[str | None, ...]
"""The logical name of each axis of an array; None is whole on every device."""


def parse_mesh(text: str) -> dict[str, int]:
    """ "fsdp=8,tensor=4" -> {"fsdp": 8, "tensor": 4}. Raises UserError."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*([1-9][0-9]{0,6})\s*", part)
        if match is None or match[1] not in MESH_AXES or match[1] in sizes:
            raise UserError(
                f"mesh {text!r} is not of the form fsdp=8,tensor=4, with axes {', '.join(MESH_AXES)} once each"
            )
        sizes[match[1]] = int(match[2])
    return sizes


@checked
def make_mesh(data: PositiveInt = 1, fsdp: PositiveInt = 1, tensor: PositiveInt = 1, *, devices: Any = None) -> Mesh:
    """The mesh with these axes over all devices. Raises UserError if it does not take exactly all of them."""
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    needed, have = data * fsdp * tensor, len(jax.devices() if devices is None else devices)
    if needed != have:
        text = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "fsdp=1"
        raise UserError(f"mesh {text} takes {needed} devices, there are {have}: the axes must multiply to {have}")
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def platform() -> str:
    """What programs are made for: "cpu", "gpu" or "tpu"."""
    return _device().platform


def device_kind() -> str:
    """The model of the devices that programs are made for: "cpu", "NVIDIA H200", "TPU v5 lite"."""
    return _device().device_kind


def _device() -> Any:
    """One of the devices that programs are made for; those of the ambient mesh may not be here."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.devices()[0] if mesh.empty else mesh.abstract_device


def partition_spec(*axes: str | None) -> P:
    """How an array with these logical axes is sharded over the ambient mesh."""
    # In XLA's own spelling, without axes of one device: a program whose outputs are its next inputs compiles once.
    sizes = jax.sharding.get_abstract_mesh().shape

    def over(axis: str | None) -> tuple[str, ...] | str | None:
        names = tuple(name for name in _mesh_axes(axis) if sizes.get(name, 1) > 1)
        return names if len(names) > 1 else next(iter(names), None)

    places = [over(axis) for axis in axes]
    while places and places[-1] is None:
        places.pop()
    return P(*places)


def _mesh_axes(axis: str | None) -> tuple[str, ...]:
    rule = None if axis is None else AXIS_RULES[axis]
    return (rule,) if isinstance(rule, str) else rule or ()


def named_sharding(*axes: str | None) -> NamedSharding | None:
    """The sharding of an array with these logical axes on the ambient mesh; None without a mesh."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else NamedSharding(mesh, partition_spec(*axes))


def num_shards(axis: str | None) -> int:
    """Into how many parts the ambient mesh divides a logical axis."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(name, 1) for name in _mesh_axes(axis))


def constrain(array: jax.Array, *axes: str | None) -> jax.Array:
    """Inside a jitted program: the array with its sharding fixed. Without a mesh, the array as it is."""
    if jax.sharding.get_abstract_mesh().empty:
        return array
    # A batch that does not divide stays whole: the common head of all prompts is a single line.
    fits = [axis if array.shape[i] % num_shards(axis) == 0 else None for i, axis in enumerate(axes)]
    return jax.lax.with_sharding_constraint(array, partition_spec(*fits))


def all_gather(weight: jax.Array, *axes: str | None) -> jax.Array:
    """Inside a jitted program: a weight gathered along "embed" for its use; its gradient is sharded like the weight."""
    return weight if jax.sharding.get_abstract_mesh().empty else _all_gather(weight, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _all_gather(weight: jax.Array, axes: LogicalAxes) -> jax.Array:
    return constrain(weight, *("hidden" if axis == "embed" else axis for axis in axes))


# By itself a constraint holds for the gradient too, which would be summed whole on every device.
_all_gather.defvjp(
    lambda weight, axes: (_all_gather(weight, axes), None), lambda axes, _, gradient: (constrain(gradient, *axes),)
)


def logical_axes(tree: Any) -> list[LogicalAxes]:
    """The `LogicalAxes` of every leaf of a tree: of decoders, vectors, and whatever mirrors them (optimizer states).

    An NNX variable tells them in its metadata `axes`, other nodes by a method `axes()` with a tree of the same form;
    the rest is whole everywhere.
    """

    def of(node: Any) -> list[LogicalAxes]:
        if isinstance(node, nnx.Variable):
            return [node.get_metadata("axes")] * len(jax.tree.leaves(node))
        if hasattr(node, "axes"):
            return jax.tree.leaves(node.axes(), is_leaf=lambda axes: type(axes) is tuple)
        return [(None,) * np.ndim(node)]

    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, nnx.Variable) or hasattr(node, "axes"))
    return [axes for node in nodes for axes in of(node)]


def shard(tree: Any) -> Any:
    """The tree laid out on the ambient mesh as its `logical_axes` say: arrays, shapes in place of arrays, or, inside a
    jitted program, what is traced.

    Without a mesh, the tree as it is.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(
        structure, [_shard(leaf, axes) for leaf, axes in zip(leaves, logical_axes(tree), strict=True)]
    )


def _shard(leaf: Any, axes: LogicalAxes) -> Any:
    if isinstance(leaf, jax.core.Tracer):
        return constrain(leaf, *axes)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=named_sharding(*axes))
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=named_sharding(*axes))(leaf)
    host, where = np.asarray(leaf), named_sharding(*axes)
    assert where is not None, "shard() returns the tree as it is where there is no mesh"
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def replicate(tree: Any) -> Any:
    """The tree with every array whole on every device, so that any process can read it."""
    mesh = jax.sharding.get_mesh()
    return tree if mesh.empty else jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))(tree)
