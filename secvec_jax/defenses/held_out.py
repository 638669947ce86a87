"""Rows that are held out of a training for its validation, and those that should be."""

import logging
from collections.abc import Collection
from typing import Any

import numpy as np

from secvec_jax.defenses.inputs import Groups, as_examples_or_rows, choose_held_out, groups_of, row_keys, select_rows
from secvec_jax.distributed import is_main_process
from secvec_jax.errors import UserError

_log = logging.getLogger(__name__)


def hold_out(
    groups: Groups, eval_rows: Any, seed: int, train_only: Collection[str] = ()
) -> tuple[Groups, Groups | None]:
    """The rows to train on, and those to validate on.

    eval_rows: rows, by kind or not; or the fraction of each kind that is held out, chosen by the seed; or None. Copies
    of a row are held out together, and a row of several kinds is not. train_only: kinds that are not held out. Raises
    UserError for a fraction that holds out no row or all of them.
    """
    if eval_rows is None:
        return groups, None
    if isinstance(eval_rows, float | int) and not 0 < eval_rows < 1:
        raise UserError(f"eval_rows is {eval_rows}: pass rows, or the fraction of the rows to hold out, such as 0.05")
    groups = {name: as_examples_or_rows(rows, name) for name, rows in groups.items()}
    if not isinstance(eval_rows, float | int):
        held_out = {name: as_examples_or_rows(rows, name) for name, rows in groups_of(eval_rows).items()}
        _note_trained_on(groups, held_out)
        return groups, held_out
    kept: Groups = {}
    held_out = {}
    keys = {name: row_keys(rows) for name, rows in groups.items()}
    for number, (name, rows) in enumerate(groups.items()):
        if name in train_only:
            kept[name] = rows
            continue
        count = min(max(round(eval_rows * len(rows)), 1), len(rows) - 1)
        order = np.random.default_rng([seed, number]).permutation(len(rows))
        elsewhere = {key for other, of_other in keys.items() if other != name for key in of_other}
        chosen = choose_held_out(keys[name], order.tolist(), count, elsewhere)
        kept[name] = select_rows(rows, np.setdiff1d(np.arange(len(rows)), chosen))
        if chosen:
            held_out[name] = select_rows(rows, np.asarray(chosen))
    if not held_out:
        raise UserError(
            "there are too few rows, or too few different ones, to hold any out for validation: pass eval_rows"
        )
    return kept, held_out


def _note_trained_on(groups: Groups, held_out: Groups) -> None:
    """Warn of rows to validate on that are trained on, too: their loss falls as they are memorized."""
    trained_on = {key for rows in groups.values() for key in row_keys(rows)}
    keys = [key for rows in held_out.values() for key in row_keys(rows)]
    copies = sum(key in trained_on for key in keys)
    if copies and is_main_process():
        _log.warning(
            "%d of %d validation rows are also among the rows to train on, so eval/loss shows how well they are "
            "memorized: remove them from either, or hold rows out with eval_rows=0.05 (--eval-fraction 0.05)",
            copies,
            len(keys),
        )
