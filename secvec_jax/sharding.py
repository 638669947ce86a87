"""Sharding of every array over the device mesh, from one table of rules.

The model gives the axes of its arrays logical names ("embed", "heads", "batch"). One table, `AXIS_RULES`, maps each
logical axis to the mesh axes over which it is sharded. The mesh is JAX's ambient one:

    with jax.set_mesh(make_mesh(fsdp=8, tensor=4)):
        model = load("owner/name")        # every device gets its shard of the weights
        tuned = align(model, rows)        # batches, gradients and optimizer state are sharded by the same table

Without a mesh, the functions in this module do nothing, and programs run on one device.

    slice   data parallelism over several TPU slices, or nodes of GPUs, between which the network is slow
    data    data parallelism: the weights are replicated and the batch is sharded
    fsdp    the weights are sharded, and gathered layer by layer when they are used; the batch is sharded as well
    tensor  tensor parallelism: heads, MLP channels and vocabulary are sharded, and so is the work on them
"""

import functools
import math
import re
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from secvec_jax.checks import PositiveInt, checked
from secvec_jax.errors import UserError

AXIS_RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("slice", "data", "fsdp"),
    "copies": ("slice", "data"),
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
"""Logical axis -> the mesh axes over which it is sharded.

"embed" is the model dimension of a weight, "hidden" that of an activation or a low-rank factor; "copies" is a batch
axis that is not sharded over fsdp.
"""

MESH_AXES = ("slice", "data", "fsdp", "tensor")

LogicalAxes = tuple[str | None, ...]
"""The logical name of each axis of an array; None is replicated."""


def parse_mesh(text: str) -> dict[str, int]:
    """Parse "fsdp=8,tensor=4" into {"fsdp": 8, "tensor": 4}. Raises UserError for any other form."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*([1-9][0-9]{0,6})\s*", part)
        if match is None or match[1] not in MESH_AXES or match[1] in sizes:
            raise UserError(
                f"invalid mesh {text!r}: use the form fsdp=8,tensor=4, with each of {', '.join(MESH_AXES)} at most once"
            )
        sizes[match[1]] = int(match[2])
    return sizes


@checked
def make_mesh(
    data: PositiveInt = 1,
    fsdp: PositiveInt = 1,
    tensor: PositiveInt = 1,
    *,
    slice: PositiveInt = 1,
    devices: Any = None,
) -> Mesh:
    """Make a mesh with these axes over all devices.

    slice: the number of TPU slices, each of which has all of the other axes; slices exchange gradients once per step,
    over the data center's network. Raises UserError if the mesh does not use exactly all devices, or if the TPUs belong
    to another number of slices.
    """
    sizes = {"slice": slice, "data": data, "fsdp": fsdp, "tensor": tensor}
    devices = jax.devices() if devices is None else devices
    needed, have = math.prod(sizes.values()), len(devices)
    if needed != have:
        text = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "fsdp=1"
        raise UserError(
            f"mesh {text} needs {needed} devices, but there are {have}: the product of the axes must be {have}"
        )
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    is_tpu = devices[0].platform == "tpu"
    slices = len({getattr(device, "slice_index", 0) for device in devices})  # devices of a single slice may lack it
    if is_tpu and slices != slice:
        raise UserError(
            f"mesh slice={slice} is for {slice} TPU slices, but the devices are of {slices}: use slice={slices}"
        )
    if not is_tpu or slice == 1:
        return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=axis_types, devices=devices)
    return Mesh(
        create_hybrid_device_mesh((1, data, fsdp, tensor), (slice, 1, 1, 1), devices), MESH_AXES, axis_types=axis_types
    )


def platform() -> str:
    """Return the platform that programs are compiled for: "cpu", "gpu" or "tpu"."""
    return _device().platform


def device_kind() -> str:
    """Return the kind of device that programs are compiled for: "cpu", "NVIDIA H200", "TPU v5 lite"."""
    return _device().device_kind


def _device() -> Any:
    """Return one of the devices that programs are compiled for; those of an ambient mesh may be abstract."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.devices()[0] if mesh.empty else mesh.abstract_device


def partition_spec(*axes: str | None) -> P:
    """Return the partition spec of an array with these logical axes on the ambient mesh."""
    # Normalized as XLA does, without mesh axes of size 1: a program whose outputs are its next inputs compiles once.
    sizes = jax.sharding.get_abstract_mesh().shape

    def over(axis: str | None) -> tuple[str, ...] | str | None:
        names = tuple(name for name in _mesh_axes(axis) if sizes.get(name, 1) > 1)
        return names if len(names) > 1 else next(iter(names), None)

    spec = [over(axis) for axis in axes]
    while spec and spec[-1] is None:
        spec.pop()
    return P(*spec)


def _mesh_axes(axis: str | None) -> tuple[str, ...]:
    rule = None if axis is None else AXIS_RULES[axis]
    return (rule,) if isinstance(rule, str) else rule or ()


def named_sharding(*axes: str | None) -> NamedSharding | None:
    """Return the sharding of an array with these logical axes on the ambient mesh; None without a mesh."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else NamedSharding(mesh, partition_spec(*axes))


def num_shards(axis: str | None) -> int:
    """Return the number of shards of a logical axis on the ambient mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(name, 1) for name in _mesh_axes(axis))


def constrain(array: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain the sharding of an array inside a jitted program; does nothing without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return array
    # An axis that does not divide is replicated: the shared prefix of all prompts is a batch of one.
    fits = [axis if array.shape[i] % num_shards(axis) == 0 else None for i, axis in enumerate(axes)]
    return jax.lax.with_sharding_constraint(array, partition_spec(*fits))


def all_gather(weight: jax.Array, *axes: str | None) -> jax.Array:
    """Gather a weight along "embed" inside a jitted program; its gradient is sharded like the weight."""
    return weight if jax.sharding.get_abstract_mesh().empty else _all_gather(weight, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _all_gather(weight: jax.Array, axes: LogicalAxes) -> jax.Array:
    return constrain(weight, *("hidden" if axis == "embed" else axis for axis in axes))


# Without this, the constraint would apply to the gradient too, which would be all-reduced instead of reduce-scattered.
_all_gather.defvjp(
    lambda weight, axes: (_all_gather(weight, axes), None), lambda axes, _, gradient: (constrain(gradient, *axes),)
)


def logical_axes(tree: Any) -> list[LogicalAxes]:
    """Return the `LogicalAxes` of every leaf of a tree: decoders, vectors, and what mirrors them (optimizer states).

    NNX variables provide them in their metadata `axes`, other nodes through a method `axes()` that returns a tree of
    the same structure. All other leaves are replicated, and so are those that have lost axes of their variable, as the
    factored moments of an optimizer have.
    """

    def of(node: Any) -> list[LogicalAxes]:
        if isinstance(node, nnx.Variable):
            axes = node.get_metadata("axes")
            return [axes if np.ndim(leaf) == len(axes) else (None,) * np.ndim(leaf) for leaf in jax.tree.leaves(node)]
        if hasattr(node, "axes"):
            return jax.tree.leaves(node.axes(), is_leaf=lambda axes: type(axes) is tuple)
        return [(None,) * np.ndim(node)]

    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, nnx.Variable) or hasattr(node, "axes"))
    return [axes for node in nodes for axes in of(node)]


def shard(tree: Any) -> Any:
    """Shard a tree over the ambient mesh by its `logical_axes`; without a mesh, return it unchanged.

    Leaves may be arrays, `jax.ShapeDtypeStruct`s or, inside a jitted program, tracers.
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
    host, sharding = np.asarray(leaf), named_sharding(*axes)
    assert sharding is not None, "without a mesh, shard() returns the tree unchanged"
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def replicate(tree: Any) -> Any:
    """Replicate every array of a tree on all devices, so that any process can read it."""
    mesh = jax.sharding.get_mesh()
    return tree if mesh.empty else jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))(tree)
