"""Measure a step: tokens, model FLOPs, tokens/s, MFU, memory, learning rate, epoch.

Tokens and FLOPs are counted on the devices, alongside the step, and read together with its losses, one step later:
nothing waits for them. They do not depend on where or when a run is resumed; time and memory do, and are not among the
metrics of a step.
"""

import resource
import time
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp

from secvec_jax.batch import Batch
from secvec_jax.model.architecture import Architecture
from secvec_jax.model.flops import PEAK_FLOPS, forward_flops, training_flops
from secvec_jax.sharding import shard
from secvec_jax.training.objective import KEEP
from secvec_jax.training.step import Metrics, TrainStep
from secvec_jax.training.trainer import OnStep
from secvec_jax.trees import Tree


def metered(train_step: TrainStep, architecture: Architecture, full: bool) -> TrainStep:
    """The train step with `tokens` and model `flops` added to its metrics (see `counted`)."""

    def step(trained: Tree, state: Tree, frozen: Tree, batch: dict[str, Batch]) -> tuple[Tree, Tree, Metrics]:
        counts = counted(batch, architecture, full)
        trained, state, metrics = train_step.step(trained, state, frozen, batch)
        return trained, state, metrics | counts

    return train_step._replace(step=step)


@partial(jax.jit, static_argnames=("architecture", "full"))
def counted(batch: dict[str, Batch], architecture: Architecture, full: bool) -> Metrics:
    """`tokens` of all streams, padding left out, and the model `flops` of one plain step on them: see `model.flops`.

    full: whether the backbone's weights are trained.
    """
    tokens = flops = jnp.float32(0)
    for stream, part in batch.items():
        real = part["segments"] != 0
        count = real.sum(dtype=jnp.float32)
        visible = jnp.sum((part["positions"] + 1.0) * real)
        tokens += count
        flops += training_flops(architecture, count, visible, full)
        if stream == KEEP:
            flops += forward_flops(architecture, count, visible)
    return shard({"tokens": tokens, "flops": flops})


def with_schedule(on_step: OnStep, learning_rate: Callable[[int], float], steps_per_epoch: float) -> OnStep:
    """`on_step` with the `learning_rate` of the step, and the `epoch` at its end, added to the metrics."""

    def scheduled(step: int, steps: int, metrics: dict[str, float]) -> None:
        on_step(step, steps, metrics | {"learning_rate": learning_rate(step), "epoch": step / steps_per_epoch})

    return scheduled


class Pace:
    """Measures a step's seconds, tokens per second and MFU, and the peak memory so far; called once per step."""

    def __init__(self) -> None:
        self._last: float | None = None
        kinds = {device.device_kind for device in jax.devices()}
        self._peak = PEAK_FLOPS.get(kinds.pop(), 0.0) * jax.device_count() if len(kinds) == 1 else 0.0

    def of(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """`memory_gib` (of the fullest device, or of the process on a CPU); from the second step on also `seconds`,
        `tokens_per_second` and, where the devices' peak is known, `mfu`. The first step's time is its compilation's."""
        now = time.monotonic()
        before, self._last = self._last, now
        measured = {"memory_gib": _memory() / 2**30}
        if before is None:
            return measured
        seconds = max(now - before, 1e-9)
        measured["seconds"] = seconds
        if "tokens" in metrics:
            measured["tokens_per_second"] = metrics["tokens"] / seconds
        if "flops" in metrics and self._peak:
            measured["mfu"] = metrics["flops"] / seconds / self._peak
        return measured


def _memory() -> float:
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [float(of_device.get("peak_bytes_in_use", 0)) for of_device in stats if of_device]
    return max(peaks) if peaks else 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
