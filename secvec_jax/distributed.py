"""Start a cluster of processes, and make decisions that hold for all of them."""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from secvec_jax.checks import NonNegativeInt, PositiveInt, checked
from secvec_jax.errors import UserError
from secvec_jax.sharding import MESH_AXES, make_mesh, parse_mesh


@checked
@dataclasses.dataclass(frozen=True)
class Cluster:
    """Hosts and devices to run on; results do not depend on them."""

    mesh: str = ""
    """mesh axes and sizes, such as fsdp=8,tensor=4 (axes: data, fsdp, tensor); empty: one device"""
    cluster: str = ""
    """auto: detect the other hosts (TPU pod, Slurm, MPI); HOST:PORT: address of the first process, to be given with
    --processes and --process; empty: this host only"""
    processes: PositiveInt | None = None
    """with HOST:PORT: number of processes"""
    process: NonNegativeInt | None = None
    """with HOST:PORT: index of this process, from 0"""


def start_cluster(settings: Cluster) -> None:
    """Join the cluster and set the ambient mesh.

    Raises UserError if the cluster cannot be joined, if the mesh does not fit the devices, or if several processes run
    without a mesh.
    """
    if settings.cluster and not jax.distributed.is_initialized():
        # JAX's preemption service would swallow SIGTERM; training handles it itself by saving and exiting.
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
                f"cannot join the cluster {settings.cluster!r} ({str(error).splitlines()[0]}): --cluster HOST:PORT "
                "also needs --processes and --process; on a single host, omit --cluster"
            ) from error
    if settings.mesh:
        jax.set_mesh(make_mesh(**parse_mesh(settings.mesh)))
    elif jax.process_count() > 1:
        count = jax.device_count()
        raise UserError(f"{jax.process_count()} processes need a mesh: set one, such as --mesh fsdp={count}")


def is_main_process() -> bool:
    """Return whether this is the process that writes files and prints."""
    return jax.process_index() == 0


def broadcast_from_first(value: Any) -> Any:
    """Return the first process's numbers on every process, for decisions that must be the same on all of them."""
    return value if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(value)


class Consensus:
    """The maximum of all processes' votes, identical on every process.

    On a cluster, a vote takes effect at the next call: the devices exchange it alongside the training steps, so that no
    process blocks.
    """

    def __init__(self) -> None:
        self._pending: jax.Array | None = None

    def __call__(self, vote: int) -> int:
        if jax.process_count() == 1:
            return vote
        result, self._pending = self._pending, _largest_vote(vote)
        return 0 if result is None else int(result)


def _largest_vote(vote: int) -> jax.Array:
    mesh = jax.sharding.get_mesh()
    local_vote = np.full(1, vote, np.int32)
    votes = jax.make_array_from_callback((mesh.size,), NamedSharding(mesh, P(MESH_AXES)), lambda index: local_vote)
    return _max_on(mesh)(votes)


@functools.cache
def _max_on(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))


def all_max(value: int) -> int:
    """Return the maximum of all processes' values."""
    return value if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.int64(value)).max())


def all_gather_json(value: Any) -> list[Any]:
    """Return every process's JSON value, in process order."""
    if jax.process_count() == 1:
        return [value]
    encoded = np.frombuffer(json.dumps(value).encode(), np.uint8)
    padded = np.zeros(all_max(len(encoded)), np.uint8)
    padded[: len(encoded)] = encoded
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row.tobytes().rstrip(b"\0")) for row in rows]


def on_main_process(work: Callable[[], Any]) -> None:
    """Run `work` on the main process while the others wait; if it raises, the others raise UserError."""
    error = None
    try:
        if is_main_process():
            work()
    except Exception as failure:
        error = failure
    succeeded = bool(broadcast_from_first(error is None))
    if error is not None:
        raise error
    if not succeeded:
        raise UserError("the main process failed: see its error message")
