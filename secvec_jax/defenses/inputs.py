"""What a caller passes to a training, checked before any work begins: rows in any of their forms, a task, options."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np

from secvec_jax.arguments import callback, instance, path, shown
from secvec_jax.batch import check_token_ids
from secvec_jax.config import Training
from secvec_jax.data.chat import Example
from secvec_jax.data.columns import split_columns
from secvec_jax.data.encoded import LENGTHS, Examples, encode_rows
from secvec_jax.data.frames import records_of
from secvec_jax.data.sources import as_rows, load_rows
from secvec_jax.data.stored import Rows
from secvec_jax.errors import UserError
from secvec_jax.model.hub import Model
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.training.trainer import OnStep
from secvec_jax.vectors.lora import LoRA, LoRAVectors

Groups = dict[str, Sequence[Any]]
"""Rows by kind ("harmful", "benign"), whose losses are reported separately."""


def as_task(task: Any) -> LoRA | LoRAVectors | None:
    """The task LoRA, fresh or trained. Raises UserError for anything else, such as a rank or a class."""
    if task is None or isinstance(task, LoRA | LoRAVectors):
        return task
    raise UserError(f"task is {shown(task)}: pass sv.LoRA(rank=16), or None to train all weights")


def as_options(training: Training, checkpoints: Any, on_step: Any) -> tuple[Checkpoints | None, OnStep | None]:
    """The checkpoints, given as such or as a folder, and the step callback. Raises UserError if either is invalid."""
    if isinstance(checkpoints, str | os.PathLike):
        folder = path("checkpoints", checkpoints, "a folder")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"checkpoints is {str(folder)!r}, which is a file: pass a folder")
        checkpoints = Checkpoints.of(folder, training)
    instance("checkpoints", checkpoints, (Checkpoints, type(None)), "pass a folder, or None to keep none")
    return checkpoints, None if on_step is None else callback("on_step", on_step)


def as_row_source(rows: Any, name: str) -> Any:
    """Rows that can be counted and read more than once; those of a file, a packaged benchmark or the hub loaded.

    Raises UserError for a single row and for anything that contains no rows.
    """
    if isinstance(rows, str | os.PathLike):
        source, columns = split_columns(str(rows))
        path(name, source, "a list of rows, or the path of a file with rows")
        return load_rows(source, columns=columns)
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


def groups_of(rows: Any, name: str = "all") -> Groups:
    """Rows by kind: as they are, or all of them as one kind.

    Raises UserError for a single row and for the splits of a dataset.
    """
    if not isinstance(rows, dict) or is_row(rows) or hasattr(rows, "num_rows"):  # a DatasetDict's splits are no kinds
        return {name: as_row_source(rows, "rows")}
    if "train" in rows and _HELD_OUT & {str(kind).lower() for kind in rows}:
        splits = ", ".join(map(str, rows))
        raise UserError(f"the data has several splits ({splits}): pass the one to train on, such as data['train']")
    return {kind: as_row_source(group, str(kind)) for kind, group in rows.items()}


_HELD_OUT = {"test", "validation", "valid", "val", "dev", "eval"}


def shown_name_of(name: str) -> str:
    """The name of a group of rows in messages."""
    return "data" if name == "all" else name


def longest_example(examples: Sequence[Example]) -> int:
    """The most tokens that an example has; 0 if there are none."""
    if isinstance(examples, Examples):
        return examples.longest
    return max((len(example.tokens) for example in examples), default=0)


def select_rows(rows: Any, indices: np.ndarray) -> Any:
    """The rows at these indices."""
    positions = indices.tolist()
    return rows.select(positions) if isinstance(rows, Rows) else [rows[position] for position in positions]


def row_keys(rows: Any) -> list[bytes]:
    """A key of each row or example, equal for copies and only for copies."""

    def key(row: Any) -> bytes:
        if isinstance(row, Example):
            content = row.tokens.tobytes() + row.supervised.tobytes()
        else:
            content = json.dumps(row["messages"]).encode()
        return hashlib.blake2b(content, digest_size=12).digest()

    return [key(rows[index]) for index in range(len(rows))]


def choose_held_out(keys: Sequence[bytes], order: Sequence[int], count: int, elsewhere: Set[bytes]) -> list[int]:
    """The indices of about `count` rows to hold out, the first in `order`, sorted; copies of a row are held out
    together.

    keys: those of `row_keys`. elsewhere: keys of rows that are trained on in any case. A row with more copies than are
    still needed is skipped, unless there is no other. Empty if all rows are copies of one.
    """
    copies: dict[bytes, list[int]] = {}
    for index, key in enumerate(keys):
        if key not in elsewhere:
            copies.setdefault(key, []).append(index)
    in_order = [copies[key] for key in dict.fromkeys(keys[index] for index in order) if key in copies]
    chosen: list[int] = []
    for group in in_order:
        if len(chosen) + len(group) <= count:
            chosen += group
    if not chosen and count and in_order:
        fewest = min(in_order, key=len)
        chosen = fewest if len(fewest) < len(keys) else []
    return sorted(chosen)


def as_examples_or_rows(rows: Any, name: str) -> Any:
    """Examples as they are, anything else as `Rows`."""
    rows = as_row_source(rows, shown_name_of(name))
    return rows if _are_examples(rows, shown_name_of(name)) else as_rows(rows, name=shown_name_of(name))


def _are_examples(rows: Any, shown_name: str) -> bool:
    """Whether rows are encoded already. Raises UserError for a list whose first item is, and another is not."""
    if isinstance(rows, Examples):
        return True
    if not isinstance(rows, Sequence) or isinstance(rows, Rows) or not len(rows) or not isinstance(rows[0], Example):
        return False
    if wrong := [row for row in rows if not isinstance(row, Example)]:
        raise UserError(f"{shown_name} contains examples and {shown(wrong[0])}: encode all rows of a list, or none")
    return True


def as_examples(model: Model, rows: Any, training: Training, name: str = "all") -> Sequence[Example]:
    """Rows as examples of at most `training.max_seq_len` tokens; examples as they are, their token ids checked.

    Raises UserError for a list of both, a token id outside the vocabulary, and what `encode_rows` refuses.
    """
    shown_name = shown_name_of(name)
    rows = as_row_source(rows, shown_name)
    if isinstance(rows, Examples):
        return rows
    if _are_examples(rows, shown_name):
        for number, example in enumerate(rows, 1):
            check_token_ids(example.tokens, model.architecture.vocab_size, f"{shown_name}, row {number}")
        return list(rows)
    limit = min(training.max_seq_len or LENGTHS[-1], model.architecture.max_length)
    return encode_rows(
        model.tokenizer,
        as_rows(rows, name=shown_name),
        limit,
        shown_name,
        training.long_rows,
        training.control_tokens,
        vocab_size=model.architecture.vocab_size,
    )
