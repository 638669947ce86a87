"""Orbax checkpoints of a run: what is needed to resume, written by all processes together, readable on any mesh.

A checkpoint contains the trained part, the optimizer's state, the state of every substream of data, and checksums of
all of these; never the frozen part, whose files the run's settings name. One that cannot be read, or differs from its
checksums, is reported and deleted, and the previous one is used.

`inputs.json` in their folder records the inputs of the training: checkpoints of other inputs are refused.
`diverged.json` records the step at which the training last diverged.
"""

import contextlib
import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from secvec_jax.checks import NonNegativeFloat, PositiveInt, checked
from secvec_jax.config import Training
from secvec_jax.digests import difference, of_values
from secvec_jax.distributed import all_max, is_main_process, on_main_process
from secvec_jax.errors import UserError
from secvec_jax.files import atomic_file, check_regular, lock, read_kept, writing
from secvec_jax.training.state import TrainingState
from secvec_jax.training.validation import EarlyStopping
from secvec_jax.trees import Tree, checksums, first_not_finite

_log = logging.getLogger("secvec_jax")

_ABSENT = "absent"
"""An input that a training does not have, such as rows of a kind."""


@checked
@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Where checkpoints are stored, the seconds between two of them, and which are kept.

    max_checkpoints: how many of the newest. best: the name of a metric; the checkpoint where it was lowest is kept too,
    and is what the training returns. A step without it, such as one on other kinds of rows, counts with its last value;
    a validation loss counts only where it was measured. inputs: identify what the training reads (see
    `digests.difference`); `finetune` and `train_vectors` add theirs. A resume with others raises UserError. keep_end:
    save the state after the last step too, so that more steps can follow. private: only the owner can read them.
    """

    folder: Path
    save_every_seconds: NonNegativeFloat = Training.base.save_every_seconds
    max_checkpoints: PositiveInt = Training.base.max_checkpoints
    best: str | None = None
    inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keep_end: bool = False
    private: bool = False

    @classmethod
    def of(cls, folder: Path, training: Training) -> "Checkpoints":
        """Checkpoints in a folder, with the settings of a training."""
        training = training.over(Training.base)
        return cls(folder, training.save_every_seconds, training.max_checkpoints, training.best)


class Store:
    """The checkpoints of one run. Raises UserError if they belong to another training or are in use."""

    def __init__(self, settings: Checkpoints, state: TrainingState):
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(n=settings.max_checkpoints)]
        if settings.best is not None:
            name = settings.best
            by_metric = {"get_metric_fn": lambda metrics: -metrics[name], "keep_checkpoints_without_metrics": False}
            kept.append(policies.BestN(**by_metric, n=1))
        self._settings = settings
        self._last = time.monotonic()
        self._lowest: tuple[int, float] | None = None
        self._lock: Any = None
        on_main_process(self._lock_folder)
        self._checkpointer: Any = None
        try:
            on_main_process(self._check_files)
            with _listing(settings.folder):
                self._checkpointer = ocp.training.Checkpointer(
                    settings.folder.absolute(),
                    save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                    preservation_policy=policies.AnyPreservationPolicy(kept),
                    cleanup_tmp_directories=True,
                    context=_context(state),
                )
            on_main_process(self._check_inputs)
        except BaseException:
            self.close()
            raise

    def due(self) -> bool:
        return time.monotonic() - self._last >= self._settings.save_every_seconds

    def save(self, state: TrainingState, metrics: dict[str, float], evaluated: bool = False) -> None:
        """Write a checkpoint with the metrics so far; in the background, except on a CPU.

        evaluated: whether the validation losses among the metrics are this step's. Raises UserError if the trained
        parameters are not finite.
        """
        if (wrong := first_not_finite(state.trained)) is not None:
            raise UserError(self.diverged(state.step, f"the parameters {wrong} are not finite after step {state.step}"))
        state.metrics = metrics
        items = {"trained": _named(state.trained), "state": _named(state.opt_state), "data": _data(state)}
        best = self._settings.best
        counts = best in metrics and (evaluated or not str(best).startswith("eval/"))
        reported = {best: metrics[best]} if best is not None and counts else None
        with writing(self._settings.folder / str(state.step)):
            if _on_host():  # the next step could not reuse memory that a background writer still reads
                self._checkpointer.save_checkpointables(state.step, items, metrics=reported)
            else:
                self._checkpointer.save_checkpointables_async(state.step, items, metrics=reported)
        self._last = time.monotonic()

    def restore(self, state: TrainingState) -> None:
        """Set the run to the newest checkpoint that can be read, if there is any.

        Raises UserError if there are checkpoints and none can be read.
        """
        while (latest := self._latest()) is not None:
            problem = self._load(state, latest.step)
            if problem is None:
                return
            unreadable = (
                f"the checkpoint of step {latest.step} in {self._checkpointer.directory} is damaged ({problem})"
            )
            if len(self._checkpointer.checkpoints) == 1:
                raise UserError(f"{unreadable}: delete that folder to start this stage from the beginning")
            _log.warning("%s: resuming from the one before it", unreadable)
            self._checkpointer.delete(latest.step)

    def restore_best(self, state: TrainingState, metrics: dict[str, float]) -> None:
        """Set the run, at its end, to the checkpoint where the metric `best` was lowest, unless that is now.

        Raises UserError if no step had such a metric.
        """
        best = self._settings.best
        if best is None:
            return
        self._checkpointer.wait()
        values = {c.step: c.metrics[best] for c in self._checkpointer.checkpoints if c.metrics}
        if not values and best not in metrics:
            raise UserError(f"best is {best!r}, which no step reported: use one of {', '.join(sorted(metrics))}")
        self._note_missed(min(values.values(), default=math.inf), metrics.get(best, math.inf))
        if values and min(values.values()) < metrics.get(best, math.inf):
            step = min(values, key=values.__getitem__)
            problem = self._load(state, step)
            if problem is not None:
                raise UserError(
                    f"the best checkpoint, {self._checkpointer.directory / str(step)}, is damaged ({problem}): delete "
                    "that folder, and the training ends with the best of the others"
                )

    def note(self, step: int, metrics: Mapping[str, float]) -> None:
        """Remember at which step the metric `best` was lowest."""
        value = metrics.get(self._settings.best or "")
        if value is not None and (self._lowest is None or value < self._lowest[1]):
            self._lowest = step, value

    def _note_missed(self, kept: float, at_end: float) -> None:
        """Warn if the metric `best` was lower at a step without a checkpoint than where the training ends."""
        if self._lowest is None or self._lowest[1] >= min(kept, at_end) or not is_main_process():
            return
        step, value = self._lowest
        _log.warning(
            "%s was lowest at step %d (%.4g), of which there is no checkpoint: the training ends with the lowest of "
            "its checkpoints and its last step (%.4g); lower save_every_seconds (now %g)",
            self._settings.best, step, value, min(kept, at_end), self._settings.save_every_seconds,
        )  # fmt: skip

    def diverged(self, step: int, problem: str) -> str:
        """The error message for a training that diverged at a step, which is recorded for the next start."""
        path = self._settings.folder / "diverged.json"
        self._checkpointer.wait()
        latest = self._latest()
        kept = f"the checkpoint of step {latest.step} is kept" if latest is not None else "there is no checkpoint"
        before = _recorded_step(path)
        again = ", as at an earlier start with these settings" if before == step else ""
        if is_main_process():
            with atomic_file(path) as staging:
                staging.write_text(json.dumps({"step": step, "problem": problem}) + "\n")
        return (
            f"{problem}{again}: {kept} in {path.parent}, and a restart would diverge again: lower the learning rate, "
            "and train in another folder or delete that one"
        )

    def close(self) -> None:
        try:
            if self._checkpointer is not None:
                with writing(self._settings.folder):
                    self._checkpointer.close()
        finally:
            if self._lock is not None:
                self._lock.release()

    def _latest(self) -> Any:
        """The newest checkpoint; None if there is none. Raises UserError if the folder cannot be read."""
        with _listing(self._settings.folder):
            return self._checkpointer.latest

    def _lock_folder(self) -> None:
        self._lock = lock(self._settings.folder)
        if self._settings.private:
            self._settings.folder.chmod(0o700)

    def _check_files(self) -> None:
        """Raise UserError for what is neither a file nor a folder: Orbax would wait for a pipe, or read without end."""
        for path in self._settings.folder.rglob("*"):
            if not path.is_dir():
                check_regular(path)

    def _check_inputs(self) -> None:
        path, now = self._settings.folder / "inputs.json", dict(self._settings.inputs)
        if self._latest() is not None and path.exists():
            before = self._kept_inputs(path)
            labels = before | now
            changed = difference(
                {label: before.get(label, _ABSENT) for label in labels},
                {label: now.get(label, _ABSENT) for label in labels},
            )
            if changed is not None:
                raise UserError(
                    f"{changed} since the training in {path.parent} was started, which cannot resume with it: train in "
                    "another folder, or delete that one to train from the start"
                )
        if now:
            with atomic_file(path) as staging:
                staging.write_text(json.dumps(now, indent=2) + "\n")

    @staticmethod
    def _kept_inputs(path: Path) -> dict[str, Any]:
        fix = f"delete {path.parent} to train from the start"
        kept = read_kept(path, fix)
        if not isinstance(kept, dict):
            raise UserError(f"{path} is damaged: {fix}")
        return kept

    def _load(self, state: TrainingState, step: int) -> str | None:
        """Set the run to a checkpoint and return None, or return why it cannot be read."""
        abstract = jax.tree.map(_abstract, (state.trained, state.opt_state))
        problem, loaded = None, {}
        try:
            loaded = self._checkpointer.load_checkpointables(
                step, {"trained": _named(abstract[0]), "state": _named(abstract[1]), "data": None}
            )
            kept = loaded["data"]
            if kept.pop("digest", None) != of_values([kept]):
                raise ValueError("its data differ from their digest")
            for name, batches in state.batches.items():
                batches.set_state(kept["batches"][name])
        except Exception as error:  # damaged files raise errors of many kinds
            problem = (str(error).splitlines() or [type(error).__name__])[0]
        if all_max(problem is not None):
            return problem or "another process cannot read it"
        for part, expected in kept["checksums"].items():
            if wrong := [name for name, value in checksums(loaded[part]).items() if value != expected.get(name)]:
                return f"the checksum of {part}{wrong[0]} differs"
        state.trained = _unnamed(loaded["trained"], state.trained)
        state.opt_state = _unnamed(loaded["state"], state.opt_state)
        state.step = step
        state.metrics, state.stops_after_next_step, state.finished = kept["metrics"], kept["ending"], kept["ended"]
        state.stopping = EarlyStopping(**kept["stopping"])
        return None


@contextlib.contextmanager
def _listing(folder: Path) -> Iterator[None]:
    """Raise UserError, with the fix, for what Orbax raises when it cannot make out which checkpoints there are."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the checkpoints in {folder} are damaged ({reason}): delete that folder to start this stage from the "
            "beginning"
        ) from error


def _data(state: TrainingState) -> dict[str, Any]:
    """The content of a checkpoint besides arrays; its last entry is the digest of the others."""
    data = {
        "batches": {name: batches.get_state() for name, batches in state.batches.items()},
        "metrics": state.metrics,
        "ending": state.stops_after_next_step,
        "ended": state.finished,
        "stopping": dataclasses.asdict(state.stopping),
        "checksums": {"trained": checksums(_named(state.trained)), "state": checksums(_named(state.opt_state))},
    }
    return data | {"digest": of_values([data])}


def _recorded_step(path: Path) -> int | None:
    """The step in a record of a divergence; None if there is none that can be read."""
    try:
        return read_kept(path, "delete it")["step"]
    except (UserError, KeyError, TypeError):
        return None


def _named(tree: Tree) -> dict[str, Any]:
    """The leaves by their paths, so that Orbax need not know our node types."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _unnamed(leaves: dict[str, Any], like: Tree) -> Tree:
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[jax.tree_util.keystr(path)], like)


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _on_host() -> bool:
    return jax.default_backend() == "cpu"


def _context(state: TrainingState) -> ocp.Context:
    """Data states as JSON; on a CPU, where the devices' memory is the host's, copies of a few arrays at a time."""
    context = ocp.Context()
    context.checkpointables.registry = ocp.handlers.local_registry()
    context.checkpointables.registry.add(ocp.handlers.JsonHandler, checkpointable_name="data")
    if _on_host():
        largest_leaf = max((leaf.nbytes for leaf in jax.tree.leaves((state.trained, state.opt_state))), default=0)
        memory = context.memory
        memory.write_concurrent_bytes = memory.transfer_concurrent_bytes = max(largest_leaf, _HOST_BYTES)
        memory.read_concurrent_bytes = memory.write_concurrent_bytes
    return context


_HOST_BYTES = 128 * 2**20
