"""Log per-step metrics: always to metrics.jsonl and TensorBoard, and to Weights & Biases on request.

tensorboard --logdir runs
WANDB_PROJECT=mine python train.py ...       # needs the extra `wandb`; WANDB_MODE=offline keeps it on this machine
"""

import hashlib
import importlib.util
import json
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from secvec_jax.errors import UserError
from secvec_jax.files import append_line

_log = logging.getLogger("secvec_jax")

Numbers = dict[str, float]


class Tracker:
    """Metrics logger for one stage of the run in `folder`; files are created at the first step.

    A run needs its metrics.jsonl. TensorBoard and Weights & Biases are switched off if they fail, and the run
    continues.
    """

    def __init__(self, folder: Path, stage: str):
        self._folder, self._stage = folder, stage
        self._trackers: dict[str, Any] | None = None

    def log(self, step: int, metrics: Numbers, pace: Numbers) -> None:
        """Log a step's metrics and speed.

        Raises UserError if WANDB_PROJECT is set and wandb is not installed, and WriteError if metrics.jsonl cannot be
        written.
        """
        if self._trackers is None:
            self._trackers = {}
            self._open(step)
        numbers = metrics | pace
        append_line(self._folder / "metrics.jsonl", json.dumps({"stage": self._stage, "step": step} | numbers))
        for name, tracker in list(self._trackers.items()):
            self._try(name, partial(tracker.log, numbers, step=step))

    def close(self) -> None:
        """Flush and close all logs."""
        for name, tracker in list((self._trackers or {}).items()):
            self._try(name, tracker.finish)

    def _open(self, step: int) -> None:
        board = self._folder / "tensorboard" / self._stage.replace("/", "-").replace(" ", "-")
        self._add("TensorBoard", lambda: _Board(board, step))
        project = os.environ.get("WANDB_PROJECT")
        if not project:
            return
        if importlib.util.find_spec("wandb") is None:
            raise UserError("WANDB_PROJECT is set, but wandb is not installed: pip install wandb, or unset it")
        self._add("Weights & Biases", lambda: self._start_biases(project, board))

    def _add(self, name: str, start: Callable[[], Any]) -> None:
        tracker = self._try(name, start)
        if tracker is not None and self._trackers is not None:
            self._trackers[name] = tracker

    def _try(self, name: str, work: Callable[[], Any]) -> Any:
        """The value of `work()`; None if it fails, after which the tracker is no longer used."""
        try:
            return work()
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            _log.warning("%s failed (%s): it is switched off, and the run continues without it", name, reason)
            (self._trackers or {}).pop(name, None)
            return None

    def _start_biases(self, project: str, board: Path) -> Any:
        import wandb

        name = f"{self._folder.name}/{self._stage}"
        identity = hashlib.sha256(str(board.resolve()).encode()).hexdigest()[:16]
        return wandb.init(
            project=project,
            dir=str(self._folder),
            name=name,
            group=self._folder.name,
            id=identity,
            resume="allow",
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        )


class _Board:
    """An event file of TensorBoard, written by the caller's thread.

    tensorboardX's own writer has a thread: if that dies, as on a full disk, the next step waits forever.
    """

    def __init__(self, folder: Path, step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        self._writer, self._event = EventsWriter(str(folder / "events")), Event
        # Steps that a resumed run repeats replace the earlier ones.
        self._write(Event(step=step, file_version="brain.Event:2"))
        self._write(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
        self._writer.flush()
        self._last_flush = time.monotonic()

    def log(self, numbers: Numbers, step: int) -> None:
        from tensorboardX.summary import scalar

        for name, value in numbers.items():
            self._write(self._event(step=step, summary=scalar(name, value)))
        if time.monotonic() - self._last_flush > _FLUSH_EVERY:
            self._writer.flush()
            self._last_flush = time.monotonic()

    def finish(self) -> None:
        self._writer.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)


_FLUSH_EVERY = 30.0
"""Seconds, since a flush waits for the disk."""
