"""Read and check the files of a grid's cells, finished and failed.

`train.py grid` writes one JSON file per cell in `cells/`:

    {"cell": {"defense": "plain", "attack": "harmful", "poison": 0.1, ..., "seed": 0},
     "metrics": {"refusal": [1.0, 0.0, ...], "drift": [0.3], ...}, "seconds": 93.1, "error": null, "rules": 2}

A metric has one number per prompt. null in place of all numbers means undefined (the AUROC of a filter if no row is
harmful), and such a metric counts as missing. A cell that failed has the reason in `error`, in one line. `rules` is the
version of the rules that scored the replies (`scorers.RULES`); a cell without it is of version 1.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TypeGuard

from secvec_jax.errors import UserError
from secvec_jax.files import check_regular

Value = str | int | float | bool | None


@dataclass(frozen=True)
class Record:
    """One cell of a grid: its settings, one number per prompt for each metric, its time, and why it failed."""

    cell: Mapping[str, Value]
    metrics: Mapping[str, Sequence[float]]
    seconds: float
    error: str | None = None
    rules: int = 1
    inputs: Mapping[str, str | None] = field(default_factory=dict)
    """content hashes of the inputs; empty in cells of versions that did not record them"""
    seconds_of: Mapping[str, float] = field(default_factory=dict)
    """what of the time was "loaded", "trained" and "judged", and what of these three "compiled"; empty in cells of
    versions that did not record it"""

    @classmethod
    def from_dict(cls, contents: dict, source: str = "this record") -> "Record":
        """Read the form above; metrics that are null on every prompt are left out.

        Raises:
            UserError: a field is missing, unknown or of another type; the message starts with `source`.
        """

        def require(holds: bool, what: str) -> None:
            if not holds:
                raise UserError(f"{source}: {what}; see secvec_jax/evaluation/records.py for the form")

        known = [item.name for item in fields(cls)]
        require(isinstance(contents, dict), "not an object")
        unknown = set(contents) - set(known)
        require(not unknown, f"unknown {quoted(unknown)}: the fields are {quoted(known)}")
        missing = set(known) - set(contents) - {"rules", "inputs", "seconds_of"}  # which earlier versions did not write
        require(not missing, f"no {quoted(missing)}")
        cell, metrics, error = contents["cell"], contents["metrics"], contents["error"]
        require(isinstance(cell, dict) and isinstance(cell.get("seed"), int), "'cell' must be an object with a seed")
        for name, value in cell.items():
            is_plain = value is None or isinstance(value, str | bool) or is_number(value)
            require(is_plain, f"'{name}' of the cell must be text, a finite number, true, false or null")
        require(is_number(contents["seconds"]), "'seconds' must be a number")
        require(error is None or bool(error and isinstance(error, str)), "'error' must be null or one line")
        rules = contents.get("rules", 1)
        is_version = isinstance(rules, int) and not isinstance(rules, bool) and rules > 0
        require(is_version, "'rules' must be a version, 1 or above")
        require(isinstance(metrics, dict), "'metrics' must be an object")
        require(bool(metrics or error), "neither metrics nor an error")
        for name, values in metrics.items():
            require(isinstance(values, list) and bool(values), f"'{name}' must be a list with one number per prompt")
            is_uniform = all(map(is_number, values)) or all(value is None for value in values)
            require(is_uniform, f"'{name}' must hold finite numbers, or null only")
        defined = {name: tuple(values) for name, values in metrics.items() if values[0] is not None}
        inputs = contents.get("inputs", {})
        require(isinstance(inputs, dict), "'inputs' must be an object")
        seconds_of = contents.get("seconds_of", {})
        is_seconds = isinstance(seconds_of, dict) and all(map(is_number, seconds_of.values()))
        require(is_seconds, "'seconds_of' must be an object of numbers")
        return cls(cell, defined, contents["seconds"], error, rules, inputs, seconds_of)


def read(folder: str | Path) -> list[Record]:
    """Return the records of all finished and failed cells in `folder`/cells, by file name.

    Raises:
        UserError: there are none, or one is malformed.
    """
    paths = sorted((Path(folder) / "cells").glob("*.json"))
    if not paths:
        raise UserError(f"no cells/*.json in {folder}: pass the folder of a grid with finished cells")
    return [read_record(path) for path in paths]


def read_record(path: Path) -> Record:
    """The record in one file. Raises UserError if it is malformed."""
    check_regular(path, max_bytes=2**28)
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): delete it and rerun the grid to rewrite it") from None
    return Record.from_dict(contents, str(path))


def is_number(value: object) -> TypeGuard[float]:
    """Return whether `value` is a finite number and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def quoted(names: Iterable[str]) -> str:
    """Return the names in quotes and in alphabetical order."""
    return ", ".join(f"'{name}'" for name in sorted(names))
