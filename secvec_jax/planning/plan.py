"""A train step for TPUs that are not here: compiled for their true topology, and what the compiler says of it.

The step is the one that a run would take, traced on abstract weights; nothing is ever computed. Memory is the
compiler's own account of the program. Time is read off its schedule (see `schedule`), which is an estimate at compile
time: no clock ran, and no TPU was near.
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
from secvec_jax.planning.schedule import Account, account
from secvec_jax.planning.torus import CHIPS, Chip
from secvec_jax.sharding import make_mesh, named_sharding, num_shards, parse_mesh, shard
from secvec_jax.training.loss import CHUNK
from secvec_jax.training.objective import KEEP, LEARN, Params
from secvec_jax.training.phase import Phase
from secvec_jax.training.step import TrainStep

KERNEL_EFFICIENCY = 0.35
"""The share of the published peak that the fused attention kernel is taken to reach on the blocks that it computes."""

_BLOCK = 512
"""Of the kernel, in tokens: blocks above the diagonal are skipped."""


class TooLarge(UserError):
    """The program does not fit into a chip's memory."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What one step of a phase comes to, in tokens of a step.

    learn, keep: tokens of the two streams. full: whether the backbone's weights are trained.
    """

    learn: int
    keep: int
    full: bool

    @property
    def formula(self) -> str:
        base = "6N+3a" if self.full else "4N+3a"
        return base + (" per token, and 2N+a more per token to keep" if self.keep else " per token")

    def flops(self, architecture: Architecture, length: int) -> float:
        """Of one step on all chips, in rows of `length` tokens, of which a token sees half: see `model.flops`."""
        tokens = float(self.learn + self.keep)
        train = training_flops(architecture, tokens, tokens * length / 2, self.full)
        return train + forward_flops(architecture, float(self.keep), self.keep * length / 2)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A compiled step, per chip. Bytes, seconds, FLOPs."""

    chip: Chip
    chips: int
    parameters: int
    optimizer: int
    activations: int
    """whatever the program allocates for itself: activations, gradients, gathered weights"""
    total: int
    flops: float
    """of one step and one chip, by `formula`"""
    formula: str
    tokens: int
    """of one step, on all chips"""
    account: Account
    compile_seconds: float

    @property
    def seconds(self) -> float:
        return self.account.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: the formula's FLOPs over what the chip's published bf16 peak could do meanwhile."""
        return self.flops / self.chip.peak / self.seconds


def topology_mesh(topology: str, mesh: str) -> Mesh:
    """The mesh over the chips of a topology such as "v5e:4x4"; an empty `mesh` is fsdp over all of them.

    Raises UserError without the TPU compiler, for an unknown topology, and for a mesh that does not fit it.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError('planning needs the TPU compiler, libtpu: pip install "jax[tpu]"; no TPU is needed')
    # No TPU is looked for or claimed, and the compiler is quiet.
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
            f"no TPU topology {topology!r} ({reason}): name one such as v5e:4x4, v6e:2x4, v5p:2x2x1"
        ) from error
    if devices[0].device_kind not in CHIPS:
        raise UserError(
            f"{devices[0].device_kind} is not known to the planner: {', '.join(c.name for c in CHIPS.values())} are"
        )
    return make_mesh(**(parse_mesh(mesh) if mesh else {"fsdp": len(devices)}), devices=devices)


def plan(
    architecture: Architecture, params: Params, phase: Phase, train_step: TrainStep, lines: dict[str, int], length: int
) -> Plan:
    """The step of a phase, compiled for the ambient mesh, which is of devices that need not be here.

    params: abstract. lines: lines in a batch of each stream. Raises TooLarge if a chip's memory does not hold it, and
    UserError if the mesh does not divide a batch.
    """
    mesh, parts = jax.sharding.get_mesh(), num_shards("batch")
    for stream, count in lines.items():
        if count % parts:
            raise UserError(
                f"{count} sequences of the stream {stream} cannot be sharded over {parts} devices: change --batch-size"
            )
    chip = CHIPS[mesh.devices.flat[0].device_kind]
    trained, frozen = phase.split(shard(params))
    state = shard(jax.eval_shape(train_step.init, trained))
    batch = {stream: _batch(count, length) for stream, count in lines.items()}
    start = time.monotonic()
    try:
        jitted: Any = train_step.step
        compiled = jitted.lower(trained, state, frozen, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or "memory space vmem" in str(error):
            raise  # a kernel that asks for too much VMEM is no matter of how large the model or the batch is
        told = next((line for line in str(error).splitlines() if "Used" in line), str(error).splitlines()[0])
        raise TooLarge(
            f"it does not fit into the {chip.memory / 2**30:.0f} GiB of a {chip.name} ({told.strip()})"
        ) from error
    took = time.monotonic() - start
    memory = compiled.memory_analysis()
    total = program_bytes(compiled) + memory.generated_code_size_in_bytes
    if total > chip.memory:  # the compiler itself was seen to let 16.8 GiB pass for a chip of 16
        raise TooLarge(f"{total / 2**30:.1f} GiB do not fit into the {chip.memory / 2**30:.0f} GiB of a {chip.name}")
    local = sum(lines.values()) // parts
    found = account(
        compiled.as_text(),
        chip,
        [device.coords for device in mesh.devices.flat],
        trips=-(-local * length // CHUNK["tpu"]),
        kernels=_kernels(architecture, lines, length, chip),
    )
    work = Work(lines[LEARN] * length, lines.get(KEEP, 0) * length, bool(jax.tree.leaves(trained.backbone.decoder)))
    return Plan(
        chip=chip,
        chips=mesh.size,
        parameters=_bytes((trained, frozen)),
        optimizer=_bytes(state),
        activations=memory.temp_size_in_bytes,
        total=total,
        flops=work.flops(architecture, length) / mesh.size,
        formula=work.formula,
        tokens=work.learn + work.keep,
        account=found,
        compile_seconds=took,
    )


def program_bytes(program: jax.stages.Compiled) -> int:
    """Memory of a device that a program takes, by the compiler's account: what is reused counts once."""
    memory: Any = program.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held + memory.temp_size_in_bytes


def _batch(lines: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    where = named_sharding(None, "batch")
    return {
        key: jax.ShapeDtypeStruct((1, lines, length), jnp.float32 if key == "weights" else jnp.int32, sharding=where)
        for key in KEYS
    }


def _kernels(
    architecture: Architecture, lines: dict[str, int], length: int, chip: Chip
) -> dict[str, tuple[float, float]]:
    """FLOPs and seconds of a call of the fused attention kernel: two products forward, five backward."""
    a = architecture
    blocks = max(length // _BLOCK, 1)
    computed = (blocks + 1) / (2 * blocks)
    one = (
        2 * lines[LEARN] // num_shards("batch") * a.num_heads // num_shards("heads") * a.head_dim * length**2 * computed
    )
    costs = {"splash_mha_fwd": 2 * one, "splash_mha_dkv": 5 * one}
    return {name: (flops, flops / chip.peak / KERNEL_EFFICIENCY) for name, flops in costs.items()}


def _bytes(tree: Any) -> int:
    """Of a chip."""
    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree))
