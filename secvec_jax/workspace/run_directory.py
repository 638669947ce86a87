"""Create and resume run directories: each is for one set of settings and inputs, and resumes with these only.

runs/NAME/config.yaml     all settings
runs/NAME/inputs.json     digests of what they name (see `workspace.inputs`), and the versions of the format and of
                          this library
runs/NAME/run.lock        locked by the process that is running here
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import secvec_jax
from secvec_jax import config
from secvec_jax.data.columns import without_columns
from secvec_jax.digests import difference, of_values
from secvec_jax.errors import UserError, WriteError
from secvec_jax.evaluation.records import is_number
from secvec_jax.files import LOCK, atomic_file, clear_unfinished, expanded, lock, read_kept, resolved
from secvec_jax.output_checks import check_own
from secvec_jax.workspace.inputs import Inputs

VERSION = secvec_jax.__version__

FORMAT = 1
"""The version of what runs compute and store; increased when the same inputs would give another result."""

CONFIG, INPUTS = "config.yaml", "inputs.json"

_MADE = (
    CONFIG, INPUTS, "metrics.jsonl", "stages", "checkpoints", "results.json", "report.md", "report.html", "vectors",
    "model", "task", "aligned", "system_prompt.txt", "own-replies.json", "scores.jsonl", "tensorboard", "cells",
    "scores.png", "losses.png", "histogram.png", "suspects.jsonl", "profile",
)  # fmt: skip
"""What runs write into their folder, in addition to a grid's seed folders."""

_FREE = frozenset({"out", "overwrite", "save_every_seconds", "max_checkpoints", "concurrency", "retries", "timeout",
                   "key_variable", "json", "inspect", "preset", "profile"})  # fmt: skip
"""Settings that do not change any result: they may differ between starts, `out` because a folder may be moved."""

_FREE_GROUPS = ("limits",)
"""Groups of such settings: limits apply to what was measured, whenever that was."""

_LENGTH = frozenset({"training.max_steps", "training.epochs"})
"""Settings that determine how long a training runs."""

_locks: dict[Path, Any] = {}


def claim(
    settings: Any, folder: str | Path, inputs: Inputs, *, overwrite: bool = False, exclusive: bool = True
) -> Path:
    """Create the run directory for these settings and inputs, or resume the matching run that it contains.

    A different run is replaced if it failed before its first step, or with `overwrite`. A training with a constant
    schedule may be extended: its finished stages are then reopened. exclusive: lock the folder until `release`.

    Raises UserError if the directory contains files but no run; if it contains a different run with results, naming the
    first difference; if that run was written by an older version; if another process is running there; or if it cannot
    be written.
    """
    folder = Path(folder)
    try:
        check_own(folder, (LOCK, INPUTS))
        if exclusive:
            acquire(folder)
        clear_unfinished(folder, within=(*_MADE, "seed-*"))
        if overwrite and _has_progress(folder):
            _clear(folder, inputs)
        if not _has_progress(folder):
            _write(settings, folder, inputs)
        else:
            _check_version(settings, folder)
            longer = _check_settings(settings, folder)
            _check_inputs(folder, inputs)
            if longer:
                _open_stages(folder)
            _write(settings, folder, _recorded(folder) | {k: v for k, v in inputs.items() if v is not None})
    except WriteError:
        raise
    except OSError as error:
        raise UserError(f"cannot write into {folder} ({error.strerror or error}): give another --out") from error
    return folder


def check_not_of_run(path: Path, flag: str, folder: str | Path) -> None:
    """Raise UserError if a file to be written, which `flag` names, is one of the run's files."""
    for name in (*_MADE, LOCK):
        if resolved(path).is_relative_to(resolved(Path(folder) / name)):
            raise UserError(f"{flag} {path} is a file of the run itself: give it another name")


def acquire(folder: Path) -> None:
    """Let no other process run in the folder until `release`, or until this one ends."""
    if resolved(folder) not in _locks:
        _locks[resolved(folder)] = lock(folder)


def release(folder: Path) -> None:
    """Let other processes run in the folder again."""
    folder_lock = _locks.pop(resolved(folder), None)
    if folder_lock is not None:
        folder_lock.release()


def settings_of_run(settings: Any) -> Any:
    """The settings without those that apply only to one start of the run, such as `overwrite`."""
    return dataclasses.replace(settings, overwrite=False) if getattr(settings, "overwrite", False) else settings


def flat(settings: Any) -> dict[str, Any]:
    """The settings that a result may depend on, as plain values: {"training.max_steps": 3}."""
    values = config.flat(config.to_dict(settings))
    return {
        key: value
        for key, value in values.items()
        if key.rpartition(".")[2] not in _FREE and key.partition(".")[0] not in _FREE_GROUPS
    }


def preset_of_run(settings: Any) -> tuple[bool, str | None]:
    """Whether the settings resume a run, and the name of the preset that it was started with."""
    folder = Path(settings.out)
    if settings.overwrite or not _has_progress(folder):
        return False, None
    try:
        name = config.read(folder / CONFIG).get("preset")
    except (UserError, AttributeError):
        return True, None
    return True, name if isinstance(name, str) else None


def inputs_of_run(folder: str | Path) -> Inputs:
    """The inputs that a run directory was made from; empty if it has none recorded."""
    return _recorded(Path(folder))


def _has_progress(folder: Path) -> bool:
    has_config = (folder / CONFIG).exists()
    return has_config and ((folder / "metrics.jsonl").exists() or any(folder.glob("stages/*.json")))


def _write(settings: Any, folder: Path, inputs: Mapping[str, Any]) -> None:
    with atomic_file(folder / INPUTS) as staging:  # first: it marks the folder as a run's
        staging.write_text(json.dumps(dict(inputs) | {"format": FORMAT, "version": VERSION}, indent=2) + "\n")
    config.save(settings_of_run(settings), folder / CONFIG)


def _clear(folder: Path, inputs: Inputs) -> None:
    """Delete what a run has made. Raises UserError if an input of the new run is among it, or is missing."""
    made = [folder / name for name in _MADE] + [*folder.glob("seed-*")]
    for label, content in inputs.items():
        name = without_columns(label.partition(" ")[2])
        if not label.startswith("--"):
            continue
        if any(resolved(expanded(name)).is_relative_to(resolved(path)) for path in made):
            raise UserError(f"{label} is in {folder}, which --overwrite would delete: give another --out")
        if content is None:
            raise UserError(f"{label} cannot be read: {folder} is left as it is")
    for path in made:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _check_version(settings: Any, folder: Path) -> None:
    """Raise UserError for a run of a version before 0.2.0, and for one whose settings this version does not know."""
    version = _recorded(folder).get("version")
    is_readable = True
    if version != VERSION:
        try:
            config.load(type(settings), folder / CONFIG)
        except UserError:
            is_readable = False
    if version is None or not is_readable:
        raise UserError(
            f"{folder} was written by secvec_jax {version or '0.1.0'} (this is {VERSION}): choose another --out, or "
            "pass --overwrite"
        )


def _check_settings(settings: Any, folder: Path) -> bool:
    """Whether the run is being extended. Raises UserError if it is a different run."""
    before: dict[str, Any] = {}
    with contextlib.suppress(UserError, RecursionError):
        stored = config.read(folder / CONFIG)
        if isinstance(stored, dict) and stored:
            before = config.flat(stored)
            with contextlib.suppress(UserError):  # settings added in a later version have their defaults
                before = flat(config.from_dict(type(settings), stored))
    now = flat(settings)
    differing = [key for key in {**before, **now} if before.get(key, _absent) != now.get(key, _absent)]
    if not differing:
        return False
    if set(differing) <= _LENGTH:
        _check_length(folder, before, now)
        return True
    key = differing[0]
    changed = f"{key} was {_shown(before, key)}, is now {_shown(now, key)}" if before else f"{CONFIG} cannot be read"
    raise UserError(
        f"{folder} already contains a run with different settings ({changed}): pass --overwrite to replace it, or give "
        "another --out"
    )


_absent = object()


def _shown(values: dict[str, Any], key: str) -> str:
    """A setting as errors show it; as a mapping if it is a group of settings."""
    group = {name.removeprefix(f"{key}."): value for name, value in values.items() if name.startswith(f"{key}.")}
    return repr(group or values.get(key))


def _check_length(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UserError if what the run has done is not the beginning of a run of the new length."""
    lengths = [f"{key} was {before.get(key)!r}, is now {now.get(key)!r}" for key in sorted(_LENGTH)
               if before.get(key) != now.get(key)]  # fmt: skip
    changed, schedule = ", ".join(lengths), now.get("training.schedule")
    if schedule != "constant":
        raise UserError(
            f"{folder} already contains a run with different settings ({changed}), and it cannot be extended: its "
            f"{schedule} schedule depends on the number of steps, so a longer run would have had other learning rates. "
            "Pass --overwrite to train again, or give another --out; runs with --schedule constant can be extended"
        )
    for key in _LENGTH:
        old, new = before.get(key), now.get(key)
        if isinstance(old, int) and isinstance(new, int) and new < old:
            raise UserError(
                f"{folder} already contains a longer run ({changed}): pass --overwrite, or give another --out"
            )


def _open_stages(folder: Path) -> None:
    """Let the finished stages run again: they continue from their last checkpoint."""
    for path in folder.glob("stages/*.json"):
        with atomic_file(path.with_suffix(".seconds")) as staging:
            staging.write_text(json.dumps({"seconds": read_stage(path)["seconds"]}))
        path.unlink()


def stage_record(seconds: float, done: dict[str, Any]) -> dict[str, Any]:
    """The record of a finished stage: its seconds, what was done, and the digest of that."""
    done = json.loads(json.dumps(done))  # as it will be read
    return {"seconds": seconds, **done, "digest": of_values([done])}


def read_stage(path: Path) -> dict[str, Any]:
    """The record of a finished stage. Raises UserError if it is damaged."""
    fix = "delete it, and the stage runs again"
    record = read_kept(path, fix)
    if (
        not isinstance(record, dict)
        or not {"result", "digest"} <= record.keys()
        or not is_number(record.get("seconds"))
    ):
        raise UserError(f"{path} is damaged, or of an older version (it lacks seconds, result or digest): {fix}")
    done = {key: value for key, value in record.items() if key not in ("seconds", "digest")}
    if record.get("digest") != of_values([done]):
        raise UserError(f"{path} is damaged (it differs from its digest): {fix}")
    if not all(isinstance(record.get(key) or {}, dict) for key in ("inputs", "makes")):
        raise UserError(f"{path} is damaged (its inputs are not an object): {fix}")
    return record


def _check_inputs(folder: Path, inputs: Inputs) -> None:
    before = _recorded(folder)
    changed = difference(before, {"format": FORMAT} | inputs)
    if changed is not None:
        raise UserError(
            f"{changed} since {folder} was started, so its results are not those of this command: pass --overwrite to "
            "run again from the start, or give another --out"
        )


def _recorded(folder: Path) -> Inputs:
    try:
        recorded = read_kept(folder / INPUTS, "pass --overwrite to replace the run")
    except UserError:
        return {}
    return recorded if isinstance(recorded, dict) else {}
