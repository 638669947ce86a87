"""Plan a run without access to its TPUs or GPUs: compile the train step for their topology, report memory and time.

The step is the one that a run would execute, traced on abstract weights; nothing is computed. Memory is the compiler's
own figure for the program. Time is not measured: on TPUs it is estimated from the program's schedule (see `schedule`),
on GPUs bounded from below (see `roofline`).
"""

import dataclasses
import importlib.util
import math
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from secvec_jax.batch import KEYS
from secvec_jax.errors import UserError
from secvec_jax.model.architecture import Architecture
from secvec_jax.model.flops import forward_flops, training_flops
from secvec_jax.planning.gpus import BY_KIND, GPUS_PER_HOST, Gpu, names_gpus, parse_gpus
from secvec_jax.planning.roofline import Roofline, roofline
from secvec_jax.planning.schedule import Account, account
from secvec_jax.planning.torus import CHIPS, Chip
from secvec_jax.sharding import make_mesh, named_sharding, num_shards, parse_mesh, platform, shard
from secvec_jax.training.loss import CHUNK
from secvec_jax.training.objective import KEEP, LEARN, Params
from secvec_jax.training.phase import Phase
from secvec_jax.training.step import TrainStep

KERNEL_EFFICIENCY = 0.35
"""Assumed share of the published peak that the fused attention kernel reaches on the blocks that it computes."""

_BLOCK = 512
"""Block size of the kernel, in tokens; blocks above the diagonal are skipped."""


class TooLarge(UserError):
    """The program does not fit into the memory of a chip."""


@dataclasses.dataclass(frozen=True)
class Work:
    """The model FLOPs of one training step.

    learn, keep: tokens per step, on all devices: keep, those of the stream `keep`; learn, those of all others (the
    user's rows, and a defense's safe rows). full: whether the backbone's weights are trained.
    """

    learn: int
    keep: int
    full: bool

    @property
    def formula(self) -> str:
        base = "6N+3a" if self.full else "4N+3a"
        return base + (" per token, and 2N+a more per token to keep" if self.keep else " per token")

    def flops(self, architecture: Architecture, length: int) -> float:
        """Return the FLOPs of one step on all chips, for sequences of `length` tokens (see `model.flops`).

        With causal attention, a token attends to half of its sequence on average.
        """
        tokens = float(self.learn + self.keep)
        train = training_flops(architecture, tokens, tokens * length / 2, self.full)
        return train + forward_flops(architecture, float(self.keep), self.keep * length / 2)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A compiled step. Figures are per chip unless noted, in bytes, seconds and FLOPs."""

    chip: Chip | Gpu
    chips: int
    parameters: int
    optimizer: int
    activations: int
    """all temporary memory: activations, gradients, gathered weights"""
    total: int
    flops: float
    """model FLOPs per step and chip, by `formula`"""
    formula: str
    tokens: int
    """tokens per step on all chips, of all streams: the user's rows, and those to keep or safe ones"""
    account: Account | Roofline
    compile_seconds: float

    @property
    def seconds(self) -> float:
        return self.account.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: the formula's FLOPs per second over the chip's published bf16 peak."""
        return self.flops / self.chip.peak / self.seconds


def topology_mesh(topology: str, mesh: str) -> Mesh:
    """Return the mesh over the chips of a topology such as "v5e:4x4" or "h100:8"; empty `mesh`: fsdp over all of them.

    Raises UserError if the compiler is not installed, for an unknown topology, and for a mesh that does not fit it.
    """
    devices = _gpus(topology) if names_gpus(topology) else _tpus(topology)
    return make_mesh(**(parse_mesh(mesh) if mesh else {"fsdp": len(devices)}), devices=devices)


def _gpus(topology: str) -> Any:
    """The GPUs of a topology, as devices to compile for."""
    gpu, count = parse_gpus(topology)
    if not any(importlib.util.find_spec(plugin) for plugin in ("jax_cuda13_plugin", "jax_cuda12_plugin")):
        raise UserError('planning for GPUs needs the CUDA compiler, but no GPU: pip install "secvec_jax[cuda]"')
    from jax.experimental import topologies

    hosts, on_host = max(count // GPUS_PER_HOST, 1), min(count, GPUS_PER_HOST)
    return topologies.get_topology_desc(
        platform="cuda", target_config=gpu.target_config, topology=f"1x{hosts}x{on_host}"
    ).devices


def _tpus(topology: str) -> Any:
    """The chips of a slice, as devices to compile for."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError('planning needs the TPU compiler, libtpu, but no TPU: pip install "jax[tpu]"')
    # Do not look for a TPU or claim one, and keep the compiler quiet.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_STDERR_LOG_LEVEL": "4",
        "TPU_MIN_LOG_LEVEL": "4",
    }
    from jax.experimental import topologies

    try:
        devices: Any = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"unknown TPU topology {topology!r} ({reason}): use one such as v5e:4x4, v6e:2x4, v5p:2x2x1"
        ) from error
    if devices[0].device_kind not in CHIPS:
        supported = ", ".join(chip.name for chip in CHIPS.values())
        raise UserError(f"the planner does not support {devices[0].device_kind}, only {supported}")
    return devices


def plan_step(
    architecture: Architecture,
    params: Params,
    phase: Phase,
    train_step: TrainStep,
    batch_sizes: dict[str, int],
    length: int,
    micro_batches: int = 1,
) -> Plan:
    """Compile the train step of a phase for the ambient mesh, whose devices need not be attached.

    params: abstract. batch_sizes: stream -> sequences per batch; all streams but `keep` are learned, with a forward and
    a backward pass each, for each of `micro_batches`. length: tokens per sequence.

    Raises TooLarge if the step does not fit into a chip's memory, and UserError if the mesh does not divide a batch.
    """
    mesh, parts = jax.sharding.get_mesh(), num_shards("batch")
    for stream, count in batch_sizes.items():
        if count % parts:
            raise UserError(
                f"{count} sequences of the stream {stream} cannot be sharded over {parts} devices: change --batch-size"
            )
    kind = mesh.devices.flat[0].device_kind
    chip = BY_KIND[kind] if kind in BY_KIND else CHIPS[kind]
    trained, frozen = phase.split(shard(params))
    state = shard(jax.eval_shape(train_step.init, trained))
    parameters, optimizer = _bytes((trained, frozen)), _bytes(state)
    size = f"the {chip.memory / 2**30:.0f} GiB of a {chip.name}"
    if parameters + optimizer > chip.memory:  # compiling takes long, with the same outcome
        size_of_state = f"{(parameters + optimizer) / 2**30:.1f} GiB"
        raise TooLarge(f"it does not fit into {size}: parameters and optimizer state alone take {size_of_state}")
    batch = {stream: _batch(micro_batches, count, length) for stream, count in batch_sizes.items()}
    start = time.monotonic()
    try:
        jitted: Any = train_step.step
        compiled = jitted.lower(trained, state, frozen, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        on_chip = any(words in str(error) for words in ("memory space vmem", "Shared memory"))
        if "RESOURCE_EXHAUSTED" not in str(error) or on_chip:
            raise  # a kernel that exceeds on-chip memory does so regardless of the size of the model or the batch
        reason = next((line for line in str(error).splitlines() if "Used" in line), str(error).splitlines()[0])
        raise TooLarge(f"it does not fit into {size} ({reason.strip()})") from error
    compile_seconds = time.monotonic() - start
    memory = compiled.memory_analysis()
    total = program_bytes(compiled) + memory.generated_code_size_in_bytes
    if total > chip.memory:  # the compiler has accepted a program of 16.8 GiB for a chip of 16
        raise TooLarge(f"{total / 2**30:.1f} GiB do not fit into {size}")
    local = max(batch_sizes.values()) // parts
    chunks = -(-local * length // CHUNK[platform()])  # of the loss, which has a loop for each stream
    text = compiled.as_text()
    cost: Account | Roofline
    if isinstance(chip, Gpu):
        cost = roofline(text, chip, mesh.size, trips=chunks)
    else:
        kernels = _kernels(architecture, batch_sizes, length, chip)
        cost = account(text, chip, [device.coords for device in mesh.devices.flat], trips=chunks, kernels=kernels)
    is_full = bool(jax.tree.leaves(trained.backbone.decoder))
    keep = batch_sizes.get(KEEP, 0)
    learn = sum(batch_sizes.values()) - keep
    work = Work(micro_batches * learn * length, micro_batches * keep * length, is_full)
    return Plan(
        chip=chip,
        chips=mesh.size,
        parameters=parameters,
        optimizer=optimizer,
        activations=memory.temp_size_in_bytes,
        total=total,
        flops=work.flops(architecture, length) / mesh.size,
        formula=work.formula,
        tokens=work.learn + work.keep,
        account=cost,
        compile_seconds=compile_seconds,
    )


def program_bytes(program: jax.stages.Compiled) -> int:
    """Return the memory that a program takes on one device, as reported by the compiler; donated buffers count once."""
    memory: Any = program.memory_analysis()
    live = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return live + memory.temp_size_in_bytes


def _batch(micro_batches: int, sequences: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    shape, sharding = (micro_batches, sequences, length), named_sharding(None, "batch")
    dtypes = {key: jnp.float32 if key == "weights" else jnp.int32 for key in KEYS}
    return {key: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for key, dtype in dtypes.items()}


def _kernels(
    architecture: Architecture, batch_sizes: dict[str, int], length: int, chip: Chip
) -> dict[str, tuple[float, float]]:
    """Return (FLOPs, seconds) of one call of the fused attention kernel: two products forward, five backward."""
    a = architecture
    blocks = max(length // _BLOCK, 1)
    computed = (blocks + 1) / (2 * blocks)
    heads = 2 * batch_sizes[LEARN] // num_shards("batch") * a.num_heads // num_shards("heads")
    one = heads * a.head_dim * length**2 * computed
    costs = {"splash_mha_fwd": 2 * one, "splash_mha_dkv": 5 * one}
    return {name: (flops, flops / chip.peak / KERNEL_EFFICIENCY) for name, flops in costs.items()}


def _bytes(tree: Any) -> int:
    """Return the bytes of a sharded tree on one chip."""
    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree))
