"""Check what a caller passes to a training before any work begins: rows in any of their forms, a task, options."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from secvec_jax.arguments import callback, instance, path, shown
from secvec_jax.config import Training
from secvec_jax.data.frames import records_of
from secvec_jax.data.sources import load_rows
from secvec_jax.errors import UserError
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.training.trainer import OnStep
from secvec_jax.vectors.lora import LoRA, LoRAVectors


def as_task(task: Any) -> LoRA | LoRAVectors | None:
    """The task LoRA, fresh or trained. Raises UserError for anything else, such as a rank or a class."""
    if task is None or isinstance(task, LoRA | LoRAVectors):
        return task
    raise UserError(f"task is {shown(task)}: pass sv.LoRA(rank=16), or None to train all weights")


def as_options(training: Training, checkpoints: Any, on_step: Any) -> tuple[Checkpoints | None, OnStep | None]:
    """The checkpoints, given as such or as a folder, and the step callback. Raises UserError if either is invalid."""
    if isinstance(checkpoints, str | os.PathLike):
        folder = path("checkpoints", checkpoints, "a folder")
        checkpoints = Checkpoints.of(folder, training)
    instance("checkpoints", checkpoints, (Checkpoints, type(None)), "pass a folder, or None to keep none")
    return checkpoints, None if on_step is None else callback("on_step", on_step)


def as_row_source(rows: Any, name: str) -> Any:
    """Rows that can be counted and read more than once; those of a file, a packaged benchmark or the hub loaded.

    Raises UserError for a single row and for anything that contains no rows.
    """
    if isinstance(rows, str | os.PathLike):
        return load_rows(str(path(name, rows, "a list of rows, or the path of a file with rows")))
    rows = records_of(rows)
    if isinstance(rows, Mapping) and is_row(rows):
        raise UserError(f"{name} is a single row: pass a list, [row]")
    if isinstance(rows, Mapping) and hasattr(rows, "num_rows"):
        raise UserError(
            f"{name} has several splits ({', '.join(map(str, rows))}): pass one of them, such as data['train']"
        )
    if isinstance(rows, Mapping | bytes | set | frozenset | type) or not isinstance(rows, Iterable):
        raise UserError(f"{name} is {shown(rows)}: pass a list of rows, a DataFrame or a datasets.Dataset")
    return rows if hasattr(rows, "__len__") else list(rows)


_PROMPTS = ("prompt", "question", "goal", "instruction")


def is_row(value: Mapping[Any, Any]) -> bool:
    """Whether a dict is a row, and not rows by kind."""
    fields = [value.get(name) for name in ("messages", "conversations", *_PROMPTS)]
    turns = [turn for field in fields if isinstance(field, list | tuple) for turn in field]
    return any(isinstance(field, str) for field in fields) or any(
        isinstance(turn, Mapping) and {"role", "from"} & set(turn) for turn in turns
    )
