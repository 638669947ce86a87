"""Start the cluster, build the mesh, and say where every array lies on it.

The model names the axes of its arrays by what they mean ("embed", "heads", "batch"). One table, `PLACES`, says over
which mesh axes each of them is spread. The mesh is JAX's ambient one:

    with jax.set_mesh(make_mesh(fsdp=8, tensor=4)):
        model = load("owner/name")        # every device gets its part of the weights
        tuned = align(model, rows)        # every batch, gradient and optimizer state lies as the table says

Without a mesh nothing here does anything, and programs are those of one device.

    data    copies of the weights, each with its part of the batch
    fsdp    the weights are spread, and gathered layer by layer when they are used; the batch is spread as well
    tensor  heads, MLP channels and vocabulary are spread, and so is the work on them
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from secvec_jax.checks import NonNegativeInt, PositiveInt, checked
from secvec_jax.errors import UserError

PLACES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "copies": "data",
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    # Whole on every device.
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

AXES = ("data", "fsdp", "tensor")

Axes = tuple[str | None, ...]
"""The logical name of each axis of an array; None is whole on every device."""


@checked
@dataclasses.dataclass(frozen=True)
class Cluster:
    """Which machines and devices work together; a run's results do not depend on it."""

    mesh: str = ""
    """how the devices are laid out, such as fsdp=8,tensor=4 (axes: data, fsdp, tensor); empty: one device"""
    cluster: str = ""
    """auto: find the other hosts (TPU pod, Slurm, MPI); HOST:PORT: meet there, see processes; empty: this host alone"""
    processes: PositiveInt | None = None
    """with HOST:PORT: how many processes there are"""
    process: NonNegativeInt | None = None
    """with HOST:PORT: which of them this is, from 0"""


def start(settings: Cluster) -> None:
    """Join the cluster and make the mesh that the settings name the ambient one.

    Raises UserError for a cluster that cannot be joined, a mesh that does not fit the devices, or hosts without one.
    """
    if settings.cluster and not jax.distributed.is_initialized():
        # JAX would swallow SIGTERM, also outside of a training, which by itself saves and ends.
        jax.config.update("jax_enable_preemption_service", False)
        try:
            if settings.cluster == "auto":
                jax.distributed.initialize()
            elif ":" not in settings.cluster:
                raise ValueError("it has no port")
            else:
                jax.distributed.initialize(settings.cluster, settings.processes, settings.process)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"cannot join the cluster {settings.cluster!r} ({str(error).splitlines()[0]}): with --cluster "
                "HOST:PORT give --processes and --process too; alone, leave --cluster out"
            ) from error
    if settings.mesh:
        jax.set_mesh(make_mesh(**parse(settings.mesh)))
    elif jax.process_count() > 1:
        count = jax.device_count()
        raise UserError(f"{jax.process_count()} processes need a mesh: give --mesh, such as --mesh fsdp={count}")


def parse(text: str) -> dict[str, int]:
    """ "fsdp=8,tensor=4" -> {"fsdp": 8, "tensor": 4}. Raises UserError."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*([1-9][0-9]{0,6})\s*", part)
        if match is None or match[1] not in AXES or match[1] in sizes:
            raise UserError(f"mesh {text!r} is not of the form fsdp=8,tensor=4, with axes {', '.join(AXES)} once each")
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
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


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


def spec(*axes: str | None) -> P:
    """Where an array with these logical axes lies on the ambient mesh."""
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
    place = None if axis is None else PLACES[axis]
    return (place,) if isinstance(place, str) else place or ()


def sharding(*axes: str | None) -> NamedSharding | None:
    """Where an array with these logical axes lies on the ambient mesh; None without one."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else NamedSharding(mesh, spec(*axes))


def shards(axis: str | None) -> int:
    """Into how many parts the ambient mesh divides a logical axis."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(name, 1) for name in _mesh_axes(axis))


def place(array: jax.Array, *axes: str | None) -> jax.Array:
    """Inside a jitted program: the array, told where to lie. Without a mesh, the array as it is."""
    if jax.sharding.get_abstract_mesh().empty:
        return array
    # A batch that does not divide stays whole: the common head of all prompts is a single line.
    fits = [axis if array.shape[i] % shards(axis) == 0 else None for i, axis in enumerate(axes)]
    return jax.lax.with_sharding_constraint(array, spec(*fits))


def gather(weight: jax.Array, *axes: str | None) -> jax.Array:
    """Inside a jitted program: a weight made whole along "embed" for its use; its gradient lies as the weight does."""
    return weight if jax.sharding.get_abstract_mesh().empty else _gather(weight, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(weight: jax.Array, axes: Axes) -> jax.Array:
    return place(weight, *("hidden" if axis == "embed" else axis for axis in axes))


# By itself a constraint holds for the gradient too, which would be summed whole on every device.
_gather.defvjp(lambda weight, axes: (_gather(weight, axes), None), lambda axes, _, gradient: (place(gradient, *axes),))


def axes_of(tree: Any) -> list[Axes]:
    """The `Axes` of every leaf of a tree: of decoders, vectors, and whatever mirrors them (optimizer states).

    An NNX variable tells them in its metadata `axes`, other nodes by a method `axes()` with a tree of the same form;
    the rest is whole everywhere.
    """

    def of(node: Any) -> list[Axes]:
        if isinstance(node, nnx.Variable):
            return [node.get_metadata("axes")] * len(jax.tree.leaves(node))
        if hasattr(node, "axes"):
            return jax.tree.leaves(node.axes(), is_leaf=lambda axes: type(axes) is tuple)
        return [(None,) * np.ndim(node)]

    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, nnx.Variable) or hasattr(node, "axes"))
    return [axes for node in nodes for axes in of(node)]


def lay(tree: Any) -> Any:
    """The tree laid out on the ambient mesh as its `axes_of` say: arrays, shapes in place of arrays, or, inside a
    jitted program, what is traced.

    Without a mesh, the tree as it is.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [_lay(leaf, axes) for leaf, axes in zip(leaves, axes_of(tree), strict=True)])


def _lay(leaf: Any, axes: Axes) -> Any:
    if isinstance(leaf, jax.core.Tracer):
        return place(leaf, *axes)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(*axes))
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=sharding(*axes))(leaf)
    host, where = np.asarray(leaf), sharding(*axes)
    assert where is not None, "lay() returns the tree as it is where there is no mesh"
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def whole(tree: Any) -> Any:
    """The tree with every array whole on every device, so that any process can read it."""
    mesh = jax.sharding.get_mesh()
    return tree if mesh.empty else jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))(tree)


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return jax.process_index() == 0


def agree(value: Any) -> Any:
    """The first process's numbers, on every process: a decision that all must take alike."""
    return value if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(value)


class Vote:
    """The largest of all processes' wishes, the same on every process.

    In a cluster a wish is heard at the next call: the devices carry it beside the steps, and no process waits.
    """

    def __init__(self) -> None:
        self._cast: jax.Array | None = None

    def __call__(self, wish: int) -> int:
        if jax.process_count() == 1:
            return wish
        heard, self._cast = self._cast, _loudest(wish)
        return 0 if heard is None else int(heard)


def _loudest(wish: int) -> jax.Array:
    mesh = jax.sharding.get_mesh()
    mine = np.full(1, wish, np.int32)
    wishes = jax.make_array_from_callback((mesh.size,), NamedSharding(mesh, P(AXES)), lambda index: mine)
    return _max_on(mesh)(wishes)


@functools.cache
def _max_on(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))


def largest(value: int) -> int:
    """The largest of all processes' values."""
    return value if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.int64(value)).max())


def collect(value: Any) -> list[Any]:
    """Every process's value, JSON, in the order of the processes."""
    if jax.process_count() == 1:
        return [value]
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    padded = np.zeros(largest(len(mine)), np.uint8)
    padded[: len(mine)] = mine
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row.tobytes().rstrip(b"\0")) for row in rows]


def by_first(work: Callable[[], Any]) -> None:
    """The first process does the work while the others wait for it; where it fails, they raise UserError."""
    error = None
    try:
        if is_first():
            work()
    except Exception as failure:
        error = failure
    ended_well = bool(agree(error is None))
    if error is not None:
        raise error
    if not ended_well:
        raise UserError("the first process failed: its own message says why")
