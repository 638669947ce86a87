"""Stages of a run: each done once, timed, shown as a progress bar, and skipped when the run is started again."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from secvec_jax.digests import difference
from secvec_jax.distributed import (
    broadcast_from_first,
    is_clustered,
    is_main_process,
    on_main_process,
    require_same,
)
from secvec_jax.errors import UserError, WriteError
from secvec_jax.evaluation.records import is_number
from secvec_jax.files import atomic_file, read_kept, read_log
from secvec_jax.memory import return_freed_memory
from secvec_jax.terminal import Console
from secvec_jax.workspace import inputs, run_directory
from secvec_jax.workspace.inputs import Inputs
from secvec_jax.workspace.stage import Stage, showing, time_left


class Stages:
    """The stages of the run in `folder`; results are stored in `folder/stages`, losses per step in metrics.jsonl."""

    def __init__(self, folder: Path, console: Console):
        self.folder = folder
        self.console = console
        self.seconds: dict[str, float] = {}
        self._shares: dict[str, float] = {}
        self._seconds_within = 0.0
        """The seconds of the stages that ran within the current one."""

    def expect(self, shares: Mapping[str, float]) -> None:
        """Set how long each stage of the run takes, in any unit, to estimate the time left after each."""
        self._shares = dict(shares)

    def run(
        self,
        name: str,
        work: Callable[[Stage], Any],
        *,
        reads: Mapping[str, Path | str] | None = None,
        makes: Mapping[str, Path] | None = None,
        forget: Callable[[], None] = lambda: None,
    ) -> Any:
        """Return the JSON value of `work(stage)`, or the stored one if the stage was completed before.

        reads: label -> a file, model folder or digest that the stage reads from other stages. If one has changed since
        the stage started, `forget()` deletes what the stage has made, and it runs again. makes: label -> a file that it
        writes. If one has changed since the stage ended, the stage runs again with the file as it is now.
        """
        path = self.folder / "stages" / f"{file_name(name)}.json"
        started = path.with_suffix(".seconds")
        now = _contents(reads or {})

        def check() -> str | None:
            done = _record(path)
            changed = difference(_record(started).get("inputs") or done.get("inputs") or {}, now)
            if changed is not None:
                forget()
                started.unlink(missing_ok=True)
            elif done:
                changed = difference(done.get("makes") or {}, _contents(makes or {}))
            if changed is not None:
                path.unlink(missing_ok=True)
            return changed

        changed = None

        def note_change() -> None:
            nonlocal changed
            changed = check()

        on_main_process(note_change)
        if changed is not None:
            self.console.print(f"{name}: {changed}, so it runs again", soft_wrap=True)
        if broadcast_from_first(path.exists()):
            record = run_directory.read_stage(path)
            self.seconds[name] = record["seconds"]
            self.console.print(f"{name}: done before, {record['seconds']:.0f} s", style="dim")
            return record["result"]
        before = float(_record(started).get("seconds", 0.0))
        start, seconds_outside = time.monotonic(), self._seconds_within
        self._seconds_within = 0.0

        def elapsed() -> float:
            """The stage's time, without that of the stages within it."""
            return before + time.monotonic() - start - self._seconds_within

        if not self.console.is_terminal:
            self.console.print(f"{name}: started", soft_wrap=True)

        def record_time(seconds: float) -> None:
            write(started, json.dumps({"seconds": seconds, "inputs": now}))

        on_main_process(lambda: record_time(before))
        try:
            with self.show(name) as stage:
                result = work(stage)
        except BaseException as error:
            was_refused = isinstance(error, UserError) and not isinstance(error, WriteError)
            if is_main_process() and not was_refused:  # else nothing was done
                with contextlib.suppress(WriteError):  # the first error says more
                    record_time(elapsed())
            raise
        finally:
            self.seconds[name] = elapsed()
            self._seconds_within = seconds_outside + time.monotonic() - start

        def record_result() -> None:
            done = {"inputs": now, "makes": _contents(makes or {}), "result": result}
            write(path, json.dumps(run_directory.stage_record(self.seconds[name], done)))
            started.unlink(missing_ok=True)

        on_main_process(record_result)
        return_freed_memory()
        self.console.print(f"{name}: {self.seconds[name]:.0f} s{self._time_left()}")
        return result

    def _time_left(self) -> str:
        """The time that the remaining stages will take, to follow a line; empty where it is not known."""
        done = self._shares.keys() & self.seconds.keys()
        to_do = self._shares.keys() - done
        left = time_left(
            sum(self.seconds[name] for name in done),
            sum(self._shares[name] for name in done),
            sum(self._shares[name] for name in to_do),
        )
        return f"; about {left} left for the whole run" if left else ""

    @contextlib.contextmanager
    def show(self, name: str) -> Iterator[Stage]:
        """A running stage that is neither timed nor stored."""
        with showing(name, self.folder, self.console) as stage:
            yield stage


def _contents(named: Mapping[str, Path | str]) -> Inputs:
    """Label -> the digest of a file or a model folder, None where there is none; digests as they are."""
    if not is_main_process():
        return {}
    read = {label: inputs.of_path if isinstance(where, Path) else str for label, where in named.items()}
    return {label: inputs.known(read[label], where) for label, where in named.items()}


def _record(path: Path) -> dict[str, Any]:
    """The content of a file in `stages`; empty if it is absent. Earlier versions wrote the seconds alone.

    Raises UserError if it is damaged.
    """
    if not path.exists():
        return {}
    if path.suffix == ".json":
        return run_directory.read_stage(path)
    content = read_kept(path, "delete it")
    record = content if isinstance(content, dict) else {"seconds": content}
    if not is_number(record.get("seconds", 0.0)) or not isinstance(record.get("inputs", {}), dict):
        raise UserError(f"{path} is damaged: delete it")
    return record


def write(path: Path, text: str) -> None:
    """Write the text to a file atomically."""
    with atomic_file(path) as staging:
        staging.write_text(text)


def file_name(name: str) -> str:
    """The file name for a stage, model or cell of this name."""
    return name.replace(" ", "-").replace("/", "-")


def claim(settings: Any, more: Callable[[], Inputs] = dict, *, exclusive: bool = True) -> Path:
    """Claim the run directory of the settings on the main process (see `run_directory.claim`), and return it.

    more: inputs that the settings do not name. Raises UserError if the processes of a cluster read other contents.
    """
    if not settings.out.strip():  # Path would take it for the current folder
        raise UserError("--out is empty: name a folder")
    folder, again = Path(settings.out), bool(getattr(settings, "overwrite", False))

    read = read_by_all(settings, more)
    on_main_process(lambda: run_directory.claim(settings, folder, read, overwrite=again, exclusive=exclusive))
    return folder


def read_by_all(settings: Any, more: Callable[[], Inputs] = dict) -> Inputs:
    """The inputs of a command, empty on processes that do not need them.

    Raises UserError if the processes of a cluster read other contents, or have other kinds of devices.
    """
    read: Inputs = {}
    if is_main_process() or is_clustered():
        read = inputs.inputs_of(settings) | more()
    require_same(read | {"the kind of device": jax.local_devices()[0].device_kind})
    return read


def release(folder: Path) -> None:
    """Release the directory of a finished run: other processes may claim it."""
    on_main_process(lambda: run_directory.release(folder))


def devices() -> dict[str, str]:
    """The devices, as reported in a run's results."""
    mesh, kinds = jax.sharding.get_mesh(), [device.device_kind for device in jax.devices()]
    environment = {"devices": ", ".join(f"{kinds.count(kind)} x {kind}" for kind in sorted(set(kinds)))}
    if not mesh.empty:
        environment["mesh"] = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
        environment["processes"] = str(jax.process_count())
    return environment


def screen() -> Console:
    """The console; in a cluster, only the main process prints. If output is piped, it is wide enough for a table, and
    no line of text is broken."""
    console = Console()
    width = console.width if console.is_terminal else max(console.width, 118)
    return Console(width=width, soft_wrap=not console.is_terminal, quiet=not is_main_process())


def curves(log: Path, stages: dict[str, str]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """The harmful and benign losses of stages, {row: {"harmful": [(step, loss)], "benign": [...]}}.

    stages: stage name -> row name. A step that a resumed run repeated counts once. "benign" is the mean over all
    kinds of rows but the harmful.
    """
    losses_by_row: dict[str, dict[str, dict[int, float]]] = {}
    for record in read_log(log):
        stage, step = record.get("stage"), record.get("step")
        if not isinstance(stage, str) or stage not in stages or not isinstance(step, int):
            continue  # of another stage, or damaged
        row = losses_by_row.setdefault(stages[stage], {"harmful": {}, "benign": {}})
        losses = {
            key.removeprefix("loss/"): value
            for key, value in record.items()
            if key.startswith("loss/") and is_number(value)
        }
        harmful = losses.pop("harmful", None)
        if harmful is not None:
            row["harmful"][step] = harmful
        if losses:
            row["benign"][step] = sum(losses.values()) / len(losses)
    return {name: {kind: sorted(points.items()) for kind, points in row.items()} for name, row in losses_by_row.items()}
