"""Orbax checkpoints of a run: what is needed to go on, written by all processes together, readable on any mesh.

A checkpoint holds the trained part, the optimizer's state and the state of every lane of data; never the frozen part,
whose files the run's settings name. One that cannot be read is told and deleted, and the one before it taken.

`inputs.json` in their folder says what the training is made of: checkpoints of other inputs are refused.
"""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
from orbax.checkpoint import v1 as ocp

from secvec_jax.checks import NonNegativeFloat, PositiveInt, checked
from secvec_jax.config import Training
from secvec_jax.data.feed import Feed
from secvec_jax.digests import difference
from secvec_jax.distributed import all_max, on_main_process
from secvec_jax.errors import UserError
from secvec_jax.files import lock, whole_file
from secvec_jax.trees import Tree

_log = logging.getLogger("secvec_jax")


@checked
@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Where checkpoints lie, how many seconds pass between two, and which are kept.

    keep: the newest so many. best: the name of a metric; the checkpoint where it was lowest is kept too, and is what
    the training returns. A step without it, such as one whose rows are of other kinds, counts with its last value.
    inputs: what goes into the training (see `digests.difference`); `finetune` and `train_vectors` add theirs. A resume
    with others raises UserError. keep_end: save the state after the last step too, so that more steps can follow.
    """

    folder: Path
    every_seconds: NonNegativeFloat = Training.base.save_every_seconds
    keep: PositiveInt = Training.base.max_checkpoints
    best: str | None = None
    inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keep_end: bool = False


class State(Protocol):
    """Everything that a resumed run needs."""

    trained: Tree
    state: Tree
    feeds: dict[str, Feed]
    step: int
    metrics: dict[str, float]
    ending: bool
    ended: bool


class Store:
    """The checkpoints of one run. Raises UserError if they are another's, or another process is writing there."""

    def __init__(self, settings: Checkpoints, run: State):
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(n=settings.keep)]
        if settings.best is not None:
            name = settings.best
            worth = {"get_metric_fn": lambda metrics: -metrics[name], "keep_checkpoints_without_metrics": False}
            kept.append(policies.BestN(**worth, n=1))
        self._settings = settings
        self._last = time.monotonic()
        self._lock: Any = None
        on_main_process(self._hold)
        self._keeper = ocp.training.Checkpointer(
            settings.folder.absolute(),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
            context=_context(run),
        )
        try:
            on_main_process(self._check_inputs)
        except BaseException:
            self.close()
            raise

    def due(self) -> bool:
        return time.monotonic() - self._last >= self._settings.every_seconds

    def save(self, run: State, metrics: dict[str, float]) -> None:
        """Write a checkpoint with the metrics so far; off the CPU, while the next steps run."""
        run.metrics = metrics
        what = {"trained": _named(run.trained), "state": _named(run.state), "data": _data(run)}
        best = self._settings.best
        told = {best: metrics[best]} if best in metrics else None
        if _on_host():  # what a writer in the background still reads, the next step could not reuse
            self._keeper.save_checkpointables(run.step, what, metrics=told)
        else:
            self._keeper.save_checkpointables_async(run.step, what, metrics=told)
        self._last = time.monotonic()

    def restore(self, run: State) -> None:
        """Set the run to the newest checkpoint that can be read, if there is any.

        Raises UserError if there are checkpoints and none can be read.
        """
        while (latest := self._keeper.latest) is not None:
            problem = self._load(run, latest.step)
            if problem is None:
                return
            torn = f"the checkpoint of step {latest.step} in {self._keeper.directory} cannot be read ({problem})"
            if len(self._keeper.checkpoints) == 1:
                raise UserError(f"{torn}: delete that folder to start this stage anew")
            _log.warning("%s: going on from the one before it", torn)
            self._keeper.delete(latest.step)

    def restore_best(self, run: State, metrics: dict[str, float]) -> None:
        """Set the run, at its end, to the checkpoint where the metric `best` was lowest, unless that is now.

        Raises UserError if no step had such a metric.
        """
        best = self._settings.best
        if best is None:
            return
        self._keeper.wait()
        told = {c.step: c.metrics[best] for c in self._keeper.checkpoints if c.metrics}
        if not told and best not in metrics:
            raise UserError(f"best is {best!r}, which no step reported: use one of {', '.join(sorted(metrics))}")
        if told and min(told.values()) < metrics.get(best, math.inf):
            step = min(told, key=told.__getitem__)
            problem = self._load(run, step)
            if problem is not None:
                raise UserError(f"the best checkpoint, of step {step}, cannot be read ({problem})")

    def close(self) -> None:
        try:
            self._keeper.close()
        finally:
            if self._lock is not None:
                self._lock.release()

    def _hold(self) -> None:
        self._lock = lock(self._settings.folder)

    def _check_inputs(self) -> None:
        path, now = self._settings.folder / "inputs.json", dict(self._settings.inputs)
        if self._keeper.latest is not None and path.exists():
            changed = difference(json.loads(path.read_text()), now)
            if changed is not None:
                raise UserError(
                    f"{changed} since the training in {path.parent} was begun, which cannot go on with it: train in "
                    "another folder, or delete that one to train from the start"
                )
        if now:
            with whole_file(path) as staging:
                staging.write_text(json.dumps(now, indent=2) + "\n")

    def _load(self, run: State, step: int) -> str | None:
        """What is wrong with a checkpoint; None once the run is set to it."""
        abstract = jax.tree.map(_abstract, (run.trained, run.state))
        problem, loaded = None, {}
        try:
            loaded = self._keeper.load_checkpointables(
                step, {"trained": _named(abstract[0]), "state": _named(abstract[1]), "data": None}
            )
            kept = loaded["data"]
            feeds = kept.get("feeds", kept)  # earlier versions kept nothing else
            for name, feed in run.feeds.items():
                feed.set_state(feeds[name])
        except (ValueError, KeyError, TypeError, OSError) as error:
            problem = (str(error).splitlines() or [type(error).__name__])[0]
        if all_max(problem is not None):
            return problem or "another process cannot read it"
        run.trained, run.state = _unnamed(loaded["trained"], run.trained), _unnamed(loaded["state"], run.state)
        run.step = step
        run.metrics = kept.get("metrics", {})
        run.ending, run.ended = (bool(kept.get(name, False)) for name in ("ending", "ended"))
        return None


def _data(run: State) -> dict[str, Any]:
    feeds = {name: feed.get_state() for name, feed in run.feeds.items()}
    return {"feeds": feeds, "metrics": run.metrics, "ending": run.ending, "ended": run.ended}


def _named(tree: Tree) -> dict[str, Any]:
    """The leaves by their paths: Orbax then needs to know nothing of our node types."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _unnamed(leaves: dict[str, Any], like: Tree) -> Tree:
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[jax.tree_util.keystr(path)], like)


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _on_host() -> bool:
    return jax.default_backend() == "cpu"


def _context(run: State) -> ocp.Context:
    """Data states as JSON; on a CPU, where the devices' memory is the host's, copies of a few arrays at a time."""
    context = ocp.Context()
    context.checkpointables.registry = ocp.handlers.local_registry()
    context.checkpointables.registry.add(ocp.handlers.JsonHandler, checkpointable_name="data")
    if _on_host():
        largest_leaf = max((leaf.nbytes for leaf in jax.tree.leaves((run.trained, run.state))), default=0)
        memory = context.memory
        memory.write_concurrent_bytes = memory.transfer_concurrent_bytes = max(largest_leaf, _HOST_BYTES)
        memory.read_concurrent_bytes = memory.write_concurrent_bytes
    return context


_HOST_BYTES = 128 * 2**20
