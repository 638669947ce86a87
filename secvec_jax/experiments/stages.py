"""Stages of a run: each done once, timed, shown as a progress bar, and skipped when the run is started again."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from secvec_jax import config
from secvec_jax.config import Training
from secvec_jax.experiments.trackers import Tracker
from secvec_jax.files import whole_file
from secvec_jax.mesh import agree, by_first, is_first
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.training.meter import Pace


class Stages:
    """The stages of the run in `folder`; their results lie in `folder/stages`, a step's losses in metrics.jsonl."""

    def __init__(self, folder: Path, console: Console):
        self.folder = folder
        self.console = console
        self.seconds: dict[str, float] = {}

    def run(self, name: str, work: Callable[["Stage"], Any]) -> Any:
        """What `work(stage)` returns, JSON, or what it returned when the stage was done before."""
        path = self.folder / "stages" / f"{file_name(name)}.json"
        if agree(path.exists()):
            record = json.loads(path.read_text())
            self.seconds[name] = record["seconds"]
            self.console.print(f"[dim]{name}: done before, {record['seconds']:.0f} s[/dim]")
            return record["result"]
        partial = path.with_suffix(".seconds")
        before = float(partial.read_text()) if partial.exists() else 0.0
        start = time.monotonic()
        try:
            with self.show(name) as stage:
                result = work(stage)
        except BaseException:
            if is_first():
                write(partial, str(before + time.monotonic() - start))
            raise
        self.seconds[name] = before + time.monotonic() - start

        def note() -> None:
            write(path, json.dumps({"seconds": self.seconds[name], "result": result}))
            partial.unlink(missing_ok=True)

        by_first(note)
        self.console.print(f"{name}: {self.seconds[name]:.0f} s")
        return result

    @contextlib.contextmanager
    def show(self, name: str) -> Iterator["Stage"]:
        """A stage at work, neither timed nor kept."""
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        tracker = Tracker(self.folder, name)
        with contextlib.closing(tracker), Progress(*columns, console=self.console, transient=True) as progress:
            yield Stage(name, tracker, progress)


_LINE_EVERY = 30.0
"""Seconds between two lines on how far a stage is, where there is no terminal for a bar."""


class Stage:
    """One stage at work: its bar, and the log of its steps."""

    def __init__(self, name: str, tracker: Tracker, progress: Progress):
        self.name, self._tracker, self._progress = name, tracker, progress
        self._task = progress.add_task(name, total=None, note="")

    def on_step(self) -> Callable[[int, int, dict[str, float]], None]:
        """A callback for `fit` that moves the bar, or prints a line now and then where there is no terminal, and logs
        the step (see `Tracker`)."""
        pace, told = Pace(), time.monotonic()

        def on_step(step: int, total: int, metrics: dict[str, float]) -> None:
            nonlocal told
            going = pace.of(metrics)
            note = _note(metrics, going)
            self._progress.update(self._task, completed=step, total=total, note=note)
            console = self._progress.console
            if not console.is_terminal and (step == total or time.monotonic() - told > _LINE_EVERY):
                told = time.monotonic()
                console.print(f"{self.name}: {step}/{total}  {note}", markup=False, highlight=False)
            if is_first():
                self._tracker.log(step, metrics, going)

        return on_step

    def replies(self, total: int, what: str) -> Callable[[int], None]:
        """A progress callback for `total` replies."""
        self._progress.update(self._task, description=f"{self.name}: {what}", completed=0, total=total, note="replies")
        return lambda done: self._progress.update(self._task, completed=done)

    def requests(self) -> Callable[[str, int, int], None]:
        """A progress callback for work whose kinds and sizes turn up on the way."""

        def on_request(what: str, done: int, total: int) -> None:
            self._progress.update(self._task, description=f"{self.name}: {what}", completed=done, total=total)

        return on_request

    def say(self, what: str) -> None:
        """Show what is being done."""
        self._progress.update(self._task, description=f"{self.name}: {what}")


def _note(metrics: dict[str, float], pace: dict[str, float]) -> str:
    parts = [f"{key.removeprefix('loss/')} {metrics[key]:.3f}" for key in sorted(metrics)
             if key.startswith("loss/") or key == "kl"]  # fmt: skip
    if "tokens_per_second" in pace:
        parts.append(f"{pace['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in pace:
        parts.append(f"{100 * pace['mfu']:.1f}% MFU")
    return "  ".join(parts)


def write(path: Path, text: str) -> None:
    """The text as a file that is whole or absent."""
    with whole_file(path) as staging:
        staging.write_text(text)


def file_name(name: str) -> str:
    """A stage's, model's or cell's name as that of a file."""
    return name.replace(" ", "-").replace("/", "-")


def claim(settings: Any) -> Path:
    """The run directory of the settings, claimed by the first process (see `config.claim_run`)."""
    by_first(lambda: config.claim_run(settings, settings.out))
    return Path(settings.out)


def checkpoints(folder: Path, training: Training) -> Checkpoints:
    """Checkpoints in the folder, as the training wants them."""
    return Checkpoints(folder, training.save_every_seconds, training.keep_checkpoints, training.best)


def devices() -> dict[str, str]:
    """What a run's results tell of the devices."""
    mesh, kinds = jax.sharding.get_mesh(), [device.device_kind for device in jax.devices()]
    told = {"devices": ", ".join(f"{kinds.count(kind)} x {kind}" for kind in sorted(set(kinds)))}
    if not mesh.empty:
        told["mesh"] = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
        told["processes"] = str(jax.process_count())
    return told


def screen() -> Console:
    """The terminal, wide enough for a table; of several processes only the first one speaks."""
    return Console(width=max(Console().width, 118), quiet=not is_first())


def curves(log: Path, stages: dict[str, str]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """The harmful and benign losses of some stages, {row: {"harmful": [(step, loss)], "benign": [...]}}.

    stages: stage name -> row name. A step that a resumed run did again counts once. "benign" is the mean over all
    kinds of rows but the harmful.
    """
    found: dict[str, dict[str, dict[int, float]]] = {}
    for line in log.read_text().splitlines() if log.exists() else []:
        record = json.loads(line)
        if record["stage"] not in stages:
            continue
        row = found.setdefault(stages[record["stage"]], {"harmful": {}, "benign": {}})
        losses = {key.removeprefix("loss/"): value for key, value in record.items() if key.startswith("loss/")}
        harmful = losses.pop("harmful", None)
        if harmful is not None:
            row["harmful"][record["step"]] = harmful
        if losses:
            row["benign"][record["step"]] = sum(losses.values()) / len(losses)
    return {name: {kind: sorted(points.items()) for kind, points in row.items()} for name, row in found.items()}
