"""Safe rows beside the user's or behind them: the baselines that every defense has to beat.

    train_model(model, vlguard(rows, safe))        # VLGuard's mix: one safe row for two of the user's
    train_model(model, replay(rows, safe))         # Replay: one for one
    sequential(model, rows, safe)           # fine-tune, then on the safe rows alone

A mix is `train_model`'s {kind: rows}, with the safe rows as a kind of their own, so that their loss is reported
separately; all kinds are shuffled together.

Mixes act in the data; they cost the steps of the rows that they add. The sequence acts after fine-tuning and costs a
second one. Sources: VLGuard's mix (Zong et al. 2024, arXiv 2402.02207) with 500 alignment rows for 1000 of the user's,
as Vaccine (arXiv 2402.01109) compares with it; replay and the sequence as ForgetFilter (arXiv 2312.12736) does.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Unpack

from secvec_jax.checks import NonNegativeFloat, checked
from secvec_jax.config import Training
from secvec_jax.defenses.finetuning import PHASE2, FinetuneOptions, Groups, groups_of, train_model
from secvec_jax.errors import UserError
from secvec_jax.model.hub import Model
from secvec_jax.training.checkpoints import Checkpoints

SAFE = "safe"
"""The kind of the rows that a defense adds."""


@checked
def vlguard(rows: Any, safe: Sequence[Any], share: NonNegativeFloat = 0.5) -> Groups:
    """The user's rows (or {kind: rows}) and, as the kind "safe", the first `share` times as many of the safe ones.

    Raises UserError if there are fewer, or if the user's rows have a kind of this name.
    """
    groups = groups_of(rows)
    if SAFE in groups:
        raise UserError(f'the rows have a kind named "{SAFE}", as the rows to be added have: give it another name')
    count = round(share * sum(map(len, groups.values())))
    if not 1 <= count <= len(safe):
        raise UserError(f"the mix takes {count} safe rows, of which there are {len(safe)}: give more or another share")
    return groups | {SAFE: [safe[index] for index in range(count)]}


def replay(rows: Any, safe: Sequence[Any]) -> Groups:
    """The user's rows and as many safe ones; see `vlguard`."""
    return vlguard(rows, safe, share=1.0)


@checked
def sequential(
    model: Model, rows: Any, safe: Any, *, safe_training: Training = PHASE2, **options: Unpack[FinetuneOptions]
) -> Model:
    """The model fine-tuned on `rows` and then, with `safe_training`, on `safe`; see `successive`."""
    return successive(model, rows, safe, safe_training=safe_training, **options)[1]


@checked
def successive(
    model: Model,
    rows: Any,
    safe: Any,
    *,
    safe_training: Training = PHASE2,
    **options: Unpack[FinetuneOptions],
) -> tuple[Model, Model]:
    """The model after `rows`, and after the `safe` rows behind them.

    A task adapter goes on from the one to the other. Checkpoints lie in folders of their own, `noisy` and `safe`; the
    best is chosen of the first training's alone, as the second has losses of another name.
    """
    checkpoints = options.get("checkpoints")
    first = options | {"checkpoints": checkpoints_of(checkpoints, "noisy")}
    noisy = train_model(model, groups_of(rows), **first)
    second = checkpoints_of(checkpoints, SAFE)
    second = second and dataclasses.replace(second, best=None)
    then: dict[str, Any] = {**options, "task": noisy.adapter, "training": safe_training, "checkpoints": second}
    then["eval_rows"] = None  # they are the first training's
    start = noisy if noisy.adapter is None else model  # a task LoRA is trained further, next to the same backbone
    return noisy, train_model(start, groups_of(safe, SAFE), **then)


def checkpoints_of(checkpoints: Checkpoints | None, stage: str) -> Checkpoints | None:
    """Checkpoints of one of several trainings, in a folder of its own."""
    return checkpoints and dataclasses.replace(checkpoints, folder=checkpoints.folder / stage)
