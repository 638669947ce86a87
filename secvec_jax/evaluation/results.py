"""results.json, the single source of what a run found.

The table in the terminal, report.md and the comparison of runs are views of it (`report`), so they cannot disagree:

    {"schema_version": 1, "command": "...", "config": {...}, "environment": {...}, "seconds": {stage: s},
     "rows": [{"name": "...", "metrics": {metric: {"value": v, "n": n, "ci95": [low, high], "rules": 2}}}]}

`schema_version` is the version of this form; files of versions that did not write it have the form of version 1.
`rules` is the version of the rules that scored the replies, for metrics scored by rules (`metrics.RULED`); a score
without it is of version 1.

JSON has no NaN: a number that is not finite is stored as null and shown as "-".
"""

import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path

import numpy as np

from secvec_jax.errors import UserError
from secvec_jax.files import atomic_file, check_regular

FILE = "results.json"
SCHEMA_VERSION = 1
"""Version of the form of results.json: increase it when an older version of this package could not read the file."""
_MAX_NUMBER = 1e15
"""Limit for the numbers of a file: larger ones are not scores, times or counts."""
_MAX_DEPTH = 40
"""Limit for the nesting of a file, in levels."""
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")


@dataclass
class Results:
    """One run: its command and settings, its environment, the seconds of each stage, and a row per model."""

    command: str
    config: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    def save(self, folder: str | Path) -> Path:
        """Write results.json into `folder`, created if missing, and return its path.

        Raises:
            UserError: the contents do not have the form above, or cannot be represented in JSON.
        """
        text = json.dumps(asdict(self.as_stored()), indent=2, allow_nan=False) + "\n"
        path = Path(folder) / FILE
        with atomic_file(path) as staging:
            staging.write_text(text, encoding="utf-8")
        return path

    def as_stored(self) -> "Results":
        """Return these results as read back from a results.json: only numbers, texts, lists and objects.

        Raises:
            UserError: as `save`.
        """
        contents = _jsonable(asdict(self))
        _check(contents, source="these results")
        return Results(**contents)

    @classmethod
    def load(cls, folder: str | Path) -> "Results":
        """Read and check the results.json in `folder`.

        Raises:
            UserError: the file is missing, malformed, or of another schema version.
        """
        path = Path(folder) / FILE
        check_regular(path, max_bytes=2**28)
        try:
            contents = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        except OSError:
            raise UserError(f"no readable {path}: give the folder of a finished run") from None
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}): rerun to rewrite it") from None
        except RecursionError:
            raise UserError(f"{path} is nested too deep: rerun to rewrite it") from None
        if isinstance(contents, dict):
            contents = {"schema_version": 1} | contents  # files of version 0.1 have none
        _check(contents, source=str(path))
        return cls(**{item.name: contents[item.name] for item in fields(cls)})


def environment_facts() -> dict:
    """Return Python's and the packages' versions (None if absent), the platform and the usable CPU count."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only; respects the limits of containers
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": len(affinity(0)) if affinity else os.cpu_count(),
        **{package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not a JSON number")


def _jsonable(value):
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, np.generic):
        return _jsonable(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Path):
        return str(value)
    raise UserError(f"results cannot hold a {type(value).__name__}: convert it to numbers or text first")


def _check(contents, source: str) -> None:
    def require(holds: bool, what: str) -> None:
        if not holds:
            raise UserError(f"{source}: {what}; see secvec_jax/evaluation/results.py for the form")

    require(not _is_deeper(contents, _MAX_DEPTH), f"its values are nested deeper than {_MAX_DEPTH} levels")

    require(isinstance(contents, dict), "not an object")
    version = contents.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise UserError(
            f"{source}: schema_version is {version!r}, and this version of secvec_jax reads {SCHEMA_VERSION}: "
            "use the version that wrote the file, or rerun"
        )
    kinds = {"command": str, "config": dict, "environment": dict, "seconds": dict, "rows": list}
    for name, kind in kinds.items():
        require(isinstance(contents.get(name), kind), f"'{name}' must be a {kind.__name__}")
    for stage, seconds in contents["seconds"].items():
        require(_is_number(seconds), f"the seconds of '{stage}' must be a number")
    for row in contents["rows"]:
        require(isinstance(row, dict) and isinstance(row.get("name"), str), "each row needs a 'name'")
        require(isinstance(row.get("metrics"), dict), f"row '{row['name']}' needs 'metrics'")
        for metric, score in row["metrics"].items():
            require(_is_score(score), f"'{metric}' of row '{row['name']}' needs value, n and ci95 [low, high]")


def _is_deeper(value, levels: int) -> bool:
    """Whether lists and objects are nested deeper than `levels`."""
    level = [value]
    for _ in range(levels):
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return any(isinstance(item, dict | list) for item in level)


def _is_score(score) -> bool:
    if not isinstance(score, dict) or not isinstance(score.get("ci95"), list) or len(score["ci95"]) != 2:
        return False
    return (
        _is_count(score.get("n"))
        and _is_count(score.get("rules", 1))
        and "value" in score
        and all(_is_number(number) for number in (score["value"], *score["ci95"]))
    )


def _is_number(value) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (is_number and abs(value) <= _MAX_NUMBER)  # NaN is not


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_NUMBER
