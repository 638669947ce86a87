"""A running stage: its progress bar, or its lines where there is no terminal, and the log of its steps."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from secvec_jax.distributed import is_main_process
from secvec_jax.terminal import Console
from secvec_jax.training.meter import Pace
from secvec_jax.workspace.trackers import Tracker

_SECONDS_BETWEEN_LINES = 10.0
"""Seconds between two progress lines, where there is no terminal for a bar."""


@contextlib.contextmanager
def showing(name: str, folder: Path, console: Console) -> Iterator["Stage"]:
    """A stage of the run in `folder` while it runs."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    tracker = Tracker(folder, name)
    with contextlib.closing(tracker), Progress(*columns, console=console, transient=True) as progress:
        yield Stage(name, tracker, progress)


class Stage:
    """A running stage: its progress, and the log of its steps."""

    def __init__(self, name: str, tracker: Tracker, progress: Progress):
        self.name, self._tracker, self._progress = name, tracker, progress
        self._last_line = time.monotonic()
        self._task = progress.add_task(name, total=None, note="")

    def on_step(self) -> Callable[[int, int, dict[str, float]], None]:
        """A callback for `fit` that updates the bar, or prints lines where there is no terminal, and logs the step (see
        `Tracker`)."""
        pace = Pace()
        first_step: int | None = None
        start, tokens = time.monotonic(), 0.0

        def on_step(step: int, total: int, metrics: dict[str, float]) -> None:
            nonlocal first_step, start, tokens
            now = time.monotonic()
            is_first = first_step is None
            if first_step is None:
                first_step, start = step, now  # its time is mostly compilation
                if step > 1:
                    self.print(f"{self.name}: resumed at step {step} of {total}")
            speed = pace.of(metrics)
            tokens += 0.0 if is_first else metrics.get("tokens", 0.0)
            # The last two steps are reported together, so their times mean nothing.
            shown = _average(tokens, now - start) if step == total else speed
            note = _note(metrics, shown)
            self._progress.update(self._task, completed=step, total=total, note=note)
            if self._is_due(now, now_due=is_first or step == total or "eval/loss" in metrics):
                left = _left(now - start, step - first_step, total - step)
                self.print(f"{self.name}: step {step}/{total}, {note}{left}")
            if is_main_process():
                self._tracker.log(step, metrics, speed)

        return on_step

    def print(self, line: str) -> None:
        """Print a line without wrapping it."""
        self._progress.console.print(line, soft_wrap=True)

    def replies(self, total: int, what: str) -> Callable[[int], None]:
        """A progress callback for `total` replies."""
        self._progress.update(self._task, note="replies")
        count = self.requests()
        count(what, 0, total)
        return lambda done: count(what, done, total)

    def requests(self) -> Callable[[str, int, int], None]:
        """A progress callback for work of unknown kinds and sizes, called with (name, number done, total). It updates
        the bar, or prints a line now and then where there is no terminal."""
        start, current = time.monotonic(), ""

        def on_request(what: str, done: int, total: int) -> None:
            nonlocal start, current
            self._progress.update(self._task, description=f"{self.name}: {what}", completed=done, total=total)
            now = time.monotonic()
            if what != current:
                current, start = what, now
            if self._is_due(now):
                self.print(f"{self.name}: {what}, {done}/{total}{_left(now - start, done, total - done)}")

        return on_request

    def _is_due(self, now: float, now_due: bool = False) -> bool:
        """Whether to print a progress line; the next one is due a few seconds later. now_due: print this one in any
        case."""
        is_due = now_due or now - self._last_line > _SECONDS_BETWEEN_LINES
        if is_due:
            self._last_line = now
        return is_due and not self._progress.console.is_terminal

    def say(self, what: str) -> None:
        """Show what is being done."""
        self._progress.update(self._task, description=f"{self.name}: {what}")
        if not self._progress.console.is_terminal:
            self.print(f"{self.name}: {what}")


def _average(tokens: float, seconds: float) -> dict[str, float]:
    return {"tokens_per_second": tokens / seconds} if tokens and seconds > 0 else {}


def _note(metrics: dict[str, float], pace: dict[str, float]) -> str:
    """The epoch, the losses by name, and the speed of a step."""
    parts = [f"epoch {metrics['epoch']:.2f}"] if "epoch" in metrics else []
    losses = [key for key in sorted(metrics) if key in ("loss", "kl") or "loss/" in key or key.endswith("/loss")]
    if "loss/all" in losses:  # the loss, of rows of one kind
        losses.remove("loss/all")
    parts += [f"{key} {metrics[key]:z.3f}" for key in losses]  # z: a KL of 0 may be rounded to less
    if "tokens_per_second" in pace:
        parts.append(f"{pace['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in pace:
        parts.append(f"{100 * pace['mfu']:.1f}% MFU")
    return ", ".join(parts)


def _left(seconds: float, done: float, to_do: float) -> str:
    """The time left, to follow a line; empty where it is not known."""
    left = time_left(seconds, done, to_do)
    return f", {left} left" if left else ""


def time_left(seconds: float, done: float, to_do: float) -> str:
    """The time left if `done` took so many seconds; empty if nothing is done or nothing is left."""
    return _duration(seconds / done * to_do) if done and to_do else ""


def _duration(seconds: float) -> str:
    """Such as 0:45 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
