"""Safe rows mixed into the user's rows, or learned after them: the baselines that every defense has to beat.

    train_model(model, with_safe_rows(rows, safe, share=0.5))   # VLGuard's mix: one safe row for two of the user's
    train_model(model, with_safe_rows(rows, safe, share=1.0))   # replay: one for one
    sequential(model, rows, safe)                               # fine-tune, then train on the safe rows alone

A mix is the {kind: rows} that `train_model` takes, with the safe rows as a separate kind, whose loss is reported
separately; all kinds are shuffled together.

Mixes act on the data and cost the steps of the rows that they add. The sequence acts after fine-tuning and costs the
steps on safe rows. Sources: VLGuard's mix (Zong et al. 2024, arXiv 2402.02207) with 500 alignment rows for 1000 of the
user's, as in Vaccine (arXiv 2402.01109); replay and the sequence as in ForgetFilter (arXiv 2312.12736).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Unpack

from secvec_jax.checks import NonNegativeFloat, PositiveInt, checked
from secvec_jax.config import Training
from secvec_jax.defenses.base import Defended, Defense, DefenseInputs
from secvec_jax.defenses.finetuning import FinetuneOptions, check_kinds, train_model
from secvec_jax.defenses.inputs import Groups, groups_of
from secvec_jax.defenses.training_settings import PHASE2
from secvec_jax.errors import UserError
from secvec_jax.model.hub import Model
from secvec_jax.training.checkpoints import Checkpoints

SAFE = "safe"
"""The kind of the rows that a defense adds, which none of the user's can have."""


@checked
@dataclasses.dataclass(frozen=True)
class VLGuard(Defense):
    """Fine-tuning on the user's rows mixed with half as many safe rows."""

    name = "vlguard"
    stage = "data"
    needs = ("safe rows",)
    cost = "the steps of the added rows: half as many more"
    source = "Zong et al. 2402.02207; baseline of Vaccine"

    share: NonNegativeFloat = 0.5
    """safe rows, as a share of the user's rows"""

    def apply(self, inputs: DefenseInputs) -> Defended:
        return Defended(inputs.finetune(rows=with_safe_rows(inputs.rows, inputs.safe, self.share), train_only=(SAFE,)))


@checked
@dataclasses.dataclass(frozen=True)
class Replay(Defense):
    """Fine-tuning on the user's rows mixed with as many safe rows."""

    name = "replay"
    stage = "data"
    needs = ("safe rows",)
    cost = "the steps of the added rows: twice as many"
    source = "baseline of ForgetFilter"

    def apply(self, inputs: DefenseInputs) -> Defended:
        return Defended(inputs.finetune(rows=with_safe_rows(inputs.rows, inputs.safe, share=1.0), train_only=(SAFE,)))


@checked
@dataclasses.dataclass(frozen=True)
class Sequential(Defense):
    """Plain fine-tuning, then a few steps on safe rows."""

    name = "sequential"
    stage = "after fine-tuning"
    needs = ("safe rows",)
    cost = "the steps on safe rows"
    source = "baseline of ForgetFilter"

    steps: PositiveInt = 20
    """steps on safe rows"""

    def apply(self, inputs: DefenseInputs) -> Defended:
        safe_training = dataclasses.replace(inputs.options["training"], max_steps=self.steps)
        model = sequential(inputs.aligned, inputs.rows, inputs.safe, safe_training=safe_training, **inputs.options)
        return Defended(model)


@checked
def with_safe_rows(rows: Any, safe: Sequence[Any], share: NonNegativeFloat) -> Groups:
    """The user's rows (or {kind: rows}) and, as the kind "safe", the first `share` times as many of the safe rows.

    Raises UserError if there are fewer, or if the user's rows have a kind of this name.
    """
    groups = groups_of(rows)
    check_kinds(groups, (SAFE,))
    count = round(share * sum(map(len, groups.values())))
    if not 1 <= count <= len(safe):
        raise UserError(f"the mix takes {count} safe rows, of which there are {len(safe)}: give more or another share")
    return groups | {SAFE: [safe[index] for index in range(count)]}


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
    """The model after training on `rows`, and after further training on the `safe` rows.

    A task adapter is trained further in the second training. Checkpoints are in the subfolders `noisy` and `safe`; the
    best is chosen in the first training only, since the losses of the second have another name.
    """
    checkpoints = options.get("checkpoints")
    first_options = options | {"checkpoints": checkpoints_of(checkpoints, "noisy")}
    groups = groups_of(rows)
    check_kinds(groups, (SAFE,))
    noisy = train_model(model, groups, **first_options)
    safe_checkpoints = checkpoints_of(checkpoints, SAFE)
    safe_checkpoints = safe_checkpoints and dataclasses.replace(safe_checkpoints, best=None)
    # Validation rows and the best step belong to the first training.
    unwatched = dataclasses.replace(safe_training, patience=None, eval_every_steps=None, best=None)
    safe_options: dict[str, Any] = {
        **options,
        "task": noisy.adapter,
        "training": unwatched,
        "checkpoints": safe_checkpoints,
        "eval_rows": None,
    }
    start = noisy if noisy.adapter is None else model  # a task LoRA is trained further, next to the same backbone
    return noisy, train_model(start, groups_of(safe, SAFE), **safe_options)


def checkpoints_of(checkpoints: Checkpoints | None, stage: str) -> Checkpoints | None:
    """The checkpoints of one of several trainings, in a subfolder."""
    return checkpoints and dataclasses.replace(checkpoints, folder=checkpoints.folder / stage)
