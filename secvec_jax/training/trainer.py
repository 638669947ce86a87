"""fit(): the loop around the step, with checkpoints and exact resume.

A checkpoint holds the trained part, the optimizer's state and the state of every data stream. A run that was killed
at any moment and is started again goes on from its newest checkpoint and ends bit-identical to one never killed.
Ctrl-C and SIGTERM finish the step in flight, save, and raise KeyboardInterrupt.
"""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from secvec_jax.config import Training
from secvec_jax.data.pipeline import Stream
from secvec_jax.errors import UserError
from secvec_jax.training.phase import Phase, merge
from secvec_jax.training.step import Method
from secvec_jax.trees import Tree

OnStep = Callable[[int, int, dict[str, float]], None]
"""Called with the step, counted from 1, the number of steps there are, and the metrics as numbers."""


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Where checkpoints lie, how many seconds pass between two, and how many are kept."""

    folder: Path
    every_seconds: float = Training.save_every_seconds
    keep: int = 1


def fit(
    params: Tree,
    phase: Phase,
    method: Method,
    streams: dict[str, Stream],
    *,
    steps: int,
    accumulate: int = 1,
    checkpoints: Checkpoints | None = None,
    on_step: OnStep = lambda step, steps, metrics: None,
    until: Callable[[dict[str, float]], bool] = lambda metrics: False,
) -> Tree:
    """The parameters after `steps` steps of `phase`; `params` themselves stay as they are.

    method: how the trained part moves, as `training.step.descent` makes it. streams: name -> stream of batches;
    each step takes `accumulate` batches of each. on_step is called once for every step, counted from 1, while a
    later one runs; after a resume it starts behind the checkpoint. until(metrics) ends the training one step after
    it holds. Raises UserError if the loss is not finite; the last good checkpoint is kept.
    """
    trained, frozen = phase.split(params)
    trained = jax.tree.map(lambda leaf: leaf.copy(), trained)  # the step donates it
    run = _Run(trained, method.init(trained), {name: iter(s.batches()) for name, s in streams.items()})
    with _store(checkpoints, run) as store, _interruptible() as interrupted:
        if store is not None:
            run = store.restore(run)
        pending: dict[str, Any] = {}
        ending: Any = False
        while run.step < steps:
            batch = {name: _micro_batches(batches, accumulate) for name, batches in run.data.items()}
            run.trained, run.state, metrics = method.step(run.trained, run.state, frozen, batch)
            run.step += 1
            # One step behind, so that the device never waits for a number to be read.
            ending = ending or (pending and until(_report(pending, run.step - 1, steps, on_step)))
            if ending:
                _report(metrics, run.step, steps, on_step)
                break
            pending = metrics
            due = store is not None and store.due()
            if due or interrupted() or run.step == steps:
                ending = until(_report(pending, run.step, steps, on_step))
                pending = {}
                if store is not None and run.step < steps and not ending:  # or a resumed run would not end
                    store.save(run)
                if interrupted():
                    raise KeyboardInterrupt
    return merge(run.trained, frozen)


@dataclasses.dataclass
class _Run:
    """Everything that a resumed run needs."""

    trained: Tree
    state: Tree
    data: dict[str, Iterator[Any]]
    step: int = 0


def _micro_batches(batches: Iterator[Any], count: int) -> dict[str, np.ndarray]:
    return jax.tree.map(lambda *parts: np.stack(parts), *[next(batches) for _ in range(count)])


def _report(metrics: dict[str, Any], step: int, steps: int, on_step: OnStep) -> dict[str, float]:
    """The metrics as numbers, (sum, count) pairs divided; waits for the step. Raises UserError if not finite."""
    values = {}
    for name, value in jax.device_get(metrics).items():
        if isinstance(value, tuple):
            if value[1] > 0:
                values[name] = float(value[0] / value[1])
        else:
            values[name] = float(value)
    if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
        raise UserError(
            f"the loss is {values['loss']} and the gradient norm {values['grad_norm']} at step {step}: lower the "
            "learning rate; the last good checkpoint is kept"
        )
    on_step(step, steps, values)
    return values


class _Store:
    """Orbax checkpoints of a `_Run`."""

    def __init__(self, settings: Checkpoints, run: _Run):
        self._every = settings.every_seconds
        self._last = time.monotonic()
        self._keeper = ocp.training.Checkpointer(
            settings.folder.absolute(),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(n=settings.keep),
            cleanup_tmp_directories=True,
            context=_context(run),
        )

    def due(self) -> bool:
        return time.monotonic() - self._last >= self._every

    def save(self, run: _Run) -> None:
        what = {"trained": _named(run.trained), "state": _named(run.state)} | _data(run)
        if _on_host():  # what a writer in the background still reads, the next step could not reuse
            self._keeper.save_checkpointables(run.step, what)
        else:
            self._keeper.save_checkpointables_async(run.step, what)
        self._last = time.monotonic()

    def restore(self, run: _Run) -> _Run:
        """The run as the newest checkpoint has it, or as it is where there is none."""
        latest = self._keeper.latest
        if latest is None:
            return run
        abstract = jax.tree.map(_abstract, (run.trained, run.state))
        try:
            loaded = self._keeper.load_checkpointables(
                latest.step, {"trained": _named(abstract[0]), "state": _named(abstract[1])} | _data(run)
            )
        except (ValueError, KeyError, OSError) as error:
            raise UserError(
                f"the checkpoint in {self._keeper.directory} cannot be read ({str(error).splitlines()[0]}): "
                "delete that folder to start this stage anew"
            ) from error
        return dataclasses.replace(
            run,
            trained=_unnamed(loaded["trained"], run.trained),
            state=_unnamed(loaded["state"], run.state),
            step=latest.step,
        )

    def close(self) -> None:
        self._keeper.close()


def _data(run: _Run) -> dict[str, Any]:
    return {f"data_{name}": batches for name, batches in run.data.items()}


def _named(tree: Tree) -> dict[str, Any]:
    """The leaves by their paths: Orbax then needs to know nothing of our node types."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _unnamed(leaves: dict[str, Any], like: Tree) -> Tree:
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[jax.tree_util.keystr(path)], like)


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _on_host() -> bool:
    return jax.default_backend() == "cpu"


def _context(run: _Run) -> ocp.Context:
    """On a CPU, where the devices' memory is the host's: copies of a few arrays at a time, not of the whole run."""
    context = ocp.Context()
    if _on_host():
        largest = max((leaf.nbytes for leaf in jax.tree.leaves((run.trained, run.state))), default=0)
        memory = context.memory
        memory.write_concurrent_bytes = memory.transfer_concurrent_bytes = max(largest, _HOST_BYTES)
        memory.read_concurrent_bytes = memory.write_concurrent_bytes
    return context


_HOST_BYTES = 128 * 2**20


@contextlib.contextmanager
def _store(settings: Checkpoints | None, run: _Run) -> Iterator[_Store | None]:
    if settings is None:
        yield None
        return
    store = _Store(settings, run)
    try:
        yield store
    finally:
        store.close()


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM came; a second one interrupts at once. Off the main thread nothing is caught."""
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        before = {}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
