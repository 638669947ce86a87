"""Start a cluster of processes, and make decisions that hold for all of them."""

import atexit
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import xla_bridge
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import secvec_jax
from secvec_jax.checks import NonNegativeInt, PositiveInt, checked
from secvec_jax.errors import UserError
from secvec_jax.rendezvous import Rendezvous
from secvec_jax.sharding import make_mesh, parse_mesh


@checked
@dataclasses.dataclass(frozen=True)
class Cluster:
    """Hosts and devices to run on; results do not depend on them."""

    mesh: str = ""
    """mesh axes and sizes, such as fsdp=8,tensor=4 (axes: slice, data, fsdp, tensor); empty: one device"""
    cluster: str = ""
    """auto: detect the other hosts (TPU pod, Slurm, MPI); HOST:PORT: address of the first process, to be given with
    --processes and --process; empty: this host only"""
    processes: PositiveInt | None = None
    """with HOST:PORT: number of processes"""
    process: NonNegativeInt | None = None
    """with HOST:PORT: index of this process, from 0"""
    distributed_timeout: PositiveInt = 60
    """seconds after which a process that does not connect or does not answer counts as lost; all others then exit"""


def start_cluster(settings: Cluster, record: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Join the cluster and set the ambient mesh.

    record: JSON values that must be the same on all processes. Once all have joined, each ends with one line and exit
    code 2 when another one is lost (see `rendezvous`).
    Raises UserError if the cluster cannot be joined, if the processes, their versions or records differ, if the mesh
    does not fit the devices, or if several processes run without a mesh.
    """
    if settings.cluster and not jax.distributed.is_initialized():
        _join(settings, {"--mesh": settings.mesh, **_versions(), **record})
    if settings.mesh:
        jax.set_mesh(make_mesh(**parse_mesh(settings.mesh)))
    elif jax.process_count() > 1:
        count = jax.device_count()
        raise UserError(f"{jax.process_count()} processes need a mesh: set one, such as --mesh fsdp={count}")


_rendezvous: Rendezvous | None = None


def _join(settings: Cluster, record: Mapping[str, Any]) -> None:
    global _rendezvous
    # JAX's preemption service would swallow SIGTERM; training handles it itself by saving and exiting.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        if xla_bridge.backends_are_initialized():
            raise ValueError("JAX has already computed something in this process")
        address, processes, process, local_devices = _place(settings)
        rendezvous = Rendezvous(address, processes, process, settings.distributed_timeout)
        rendezvous.meet(record)
        service = rendezvous.open_relay()
        if any(name.lower() in _PROXY for name in os.environ):  # which gRPC would use for addresses of this host, too
            os.environ["no_grpc_proxy"] = ",".join(filter(None, [*map(os.environ.get, _NO_PROXY), "127.0.0.1"]))
        jax.distributed.initialize(
            service,
            processes,
            process,
            local_devices,
            initialization_timeout=settings.distributed_timeout,
            heartbeat_timeout_seconds=_NEVER,  # the rendezvous notices first
            shutdown_timeout_seconds=settings.distributed_timeout,
            coordinator_bind_address=service,
        )
    except UserError as error:
        raise UserError(f"cannot join the cluster {settings.cluster!r}: {error}") from error
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot join the cluster {settings.cluster!r} ({str(error).splitlines()[0]}): --cluster HOST:PORT "
            "also needs --processes and --process; on a single host, omit --cluster"
        ) from error
    _rendezvous = rendezvous
    atexit.register(rendezvous.leave)  # before JAX waits for the other processes


_NEVER = 10**6
_PROXY = ("http_proxy", "https_proxy", "grpc_proxy")
_NO_PROXY = ("no_grpc_proxy", "no_proxy")


def _place(settings: Cluster) -> tuple[str, int, int, Sequence[int] | None]:
    """The address of process 0, the number of processes, this one's index, and its devices, if not all of the host's.

    Raises ValueError if they cannot be determined.
    """
    if settings.cluster != "auto":
        if settings.processes is None or settings.process is None:
            raise ValueError("the number of processes and the index of this one are not given")
        if settings.process >= settings.processes:
            raise ValueError(f"--process {settings.process} of {settings.processes}: they count from 0")
        return settings.cluster, settings.processes, settings.process, None
    detect = ClusterEnv.auto_detect_unset_distributed_params
    address, processes, process, local_devices = detect(None, None, None, None, None, settings.distributed_timeout)
    if address is None or processes is None or process is None:
        raise ValueError("this is not a TPU pod, Slurm or MPI job that JAX can detect")
    return address, processes, process, local_devices


def _versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    python = ".".join(map(str, sys.version_info[:2]))
    versions = {"secvec_jax": secvec_jax.__version__, "python": python} | {name: version(name) for name in names}
    return {f"the version of {name}": number for name, number in versions.items()}


def require_same(record: Mapping[str, Any]) -> None:
    """Compare JSON values of all processes, which must all call this. Raises UserError that names a difference."""
    if _rendezvous is not None:
        _rendezvous.require_same(record)


def begin_ending() -> None:
    """Call this before printing why this process ends: in a cluster, it may just be reporting a lost process itself."""
    if _rendezvous is not None:
        _rendezvous.begin_ending()


def report_failure(line: str, *, interrupted: bool = False) -> None:
    """Tell the other processes, if there are any, that this one ends; they end as well."""
    if _rendezvous is not None:
        _rendezvous.fail(line, interrupted=interrupted)


def lost_process(seconds: float = 3.0) -> str | None:
    """Return the line that names the lost process of the cluster, waiting for it up to `seconds`; None if none is
    lost."""
    return None if _rendezvous is None else _rendezvous.loss(seconds)


def is_clustered() -> bool:
    """Return whether this process has joined a cluster."""
    return _rendezvous is not None


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
    votes = jax.make_array_from_callback(
        (mesh.size,), NamedSharding(mesh, P(mesh.axis_names)), lambda index: local_vote
    )
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
