"""The measurements of a cell: its model's outcomes on the evaluation suite, its training, and further probes.

The further probes cost more than the rest of an evaluation, so a grid file asks for them: `probes: [prefill, kl]`.
Those without generated text are as in an audit (`evaluation.audit_measures`).
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from secvec_jax.activations import attention_difference
from secvec_jax.data.rows import with_system
from secvec_jax.defenses.finetuning import FinetuneOptions, train_model
from secvec_jax.errors import UserError
from secvec_jax.evaluation.audit_measures import general_kl, prefill_outcomes
from secvec_jax.evaluation.likelihood import mean_losses
from secvec_jax.evaluation.suite import Outcomes, Suite, outcomes
from secvec_jax.grid.cells import Cell
from secvec_jax.grid.inputs import CellInputs
from secvec_jax.grid.seed_workspace import SeedWorkspace
from secvec_jax.model.hub import Model
from secvec_jax.trees import distance
from secvec_jax.workspace.stage import Stage

FurtherProbe = Literal["prefill", "replies", "kl", "relearning"]
"""Probes that a grid file may ask for.

- prefill: how often a reply turns away after a prefill of 5 or 25 tokens of a compliant one, on the harmful prompts
  that the model before alignment complies with (`prefill_5`, `prefill_25`).
- replies: loss of such compliant replies (`replies_loss`): harmful replies that nothing was trained on, like
  `harmful_loss`, but which look different from AdvBench's.
- kl: KL from the aligned model, on its own replies to benign prompts.
- relearning: refusal of and compliance with harmful prompts after 5 more steps, plain and with the cell's optimizer and
  learning rate, on 8 harmful rows (`relearning`, `relearning_compliance`).
"""

METRIC: dict[FurtherProbe, str] = {
    "prefill": "prefill_5",
    "replies": "replies_loss",
    "kl": "kl",
    "relearning": "relearning",
}
"""A metric by which a cell shows that it has the probe."""

RELEARNED_ROWS, RELEARNING_STEPS = 8, 5


def cell_outcomes(
    workspace: SeedWorkspace, cell: Cell, probes: Sequence[FurtherProbe], seconds_of: dict[str, float]
) -> Outcomes:
    """The outcomes of the cell's model, and measurements of its training.

    The latter are the attack's loss and the gradient norm in the first and in the last step, the drift of the weights,
    and the drift of the attention outputs on harmful rows. seconds_of: filled with what loading the aligned model,
    training and judging took, each with the shared stages that are made for it.
    """
    steps: list[dict[str, float]] = []

    @contextlib.contextmanager
    def timed(name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        seconds_of[name] = time.monotonic() - start

    with timed("loaded"):
        aligned = workspace.aligned

    def work(stage: Stage) -> Outcomes:
        show = stage.on_step()

        def on_step(step: int, num_steps: int, metrics: dict[str, float]) -> None:
            steps.append(metrics)
            show(step, num_steps, metrics)

        options = FinetuneOptions(training=workspace.training(cell), task=workspace.task_lora(cell), on_step=on_step)
        with timed("trained"):
            defended = cell.defense.apply(CellInputs(workspace, cell, options))
        with timed("judged"):
            suite = workspace.suite(cell, defended.system)
            results = outcomes(defended.model, suite, on_reply=stage.replies(suite.size, "evaluating"))
            results["drift"] = [float(distance(defended.model.backbone, aligned.backbone))]
            results["embedding_drift"] = attention_difference(defended.model, aligned, suite.harmful_targets)
            for probe in probes:
                results |= _PROBES[probe](workspace, cell, defended.model, suite, stage)
        return results | {name: [float(value)] for name, value in defended.notes.items()}

    with workspace.workspace.stages.show(cell.defense.label) as stage:
        results = work(stage)
    for when, shown in (("first", steps[:1]), ("last", steps[-1:])):
        for metrics in shown:
            for name in ("loss/attack", "grad_norm"):
                if name in metrics:
                    results[f"{when}_{name.removeprefix('loss/')}"] = [metrics[name]]
    return results


def _prefill(workspace: SeedWorkspace, cell: Cell, model: Model, suite: Suite, stage: Stage) -> Outcomes:
    beginnings = workspace.beginnings
    prompts = [prompt if suite.system is None else with_system(prompt, suite.system) for prompt in suite.harmful]
    count = sum(len(beginning or {}) for beginning in beginnings)
    return prefill_outcomes(model, prompts, beginnings, suite.refusals, stage.replies(count, "prefill"))


def _replies(workspace: SeedWorkspace, cell: Cell, model: Model, suite: Suite, stage: Stage) -> Outcomes:
    unseen = workspace.unseen_replies
    return {"replies_loss": mean_losses(model, unseen)} if unseen else {}


def _kl(workspace: SeedWorkspace, cell: Cell, model: Model, suite: Suite, stage: Stage) -> Outcomes:
    divergences = general_kl(workspace.aligned, model, suite.benign, workspace.aligned_replies)
    if isinstance(divergences, str):
        raise UserError(divergences)
    return {"kl": divergences}


def _relearning(workspace: SeedWorkspace, cell: Cell, model: Model, suite: Suite, stage: Stage) -> Outcomes:
    """Where the cell trains a task LoRA, the further steps train a new one on the merged model."""
    training = dataclasses.replace(
        workspace.training(cell), max_steps=RELEARNING_STEPS, schedule="constant", warmup_steps=0
    )
    rows = workspace.workspace.splits.spare["harmful"][-RELEARNED_ROWS:]
    attacked = train_model(model, {"harmful": rows}, training=training, task=workspace.task_lora(cell))
    asked = Suite(
        suite.refusals,
        suite.harmful,
        reply_tokens=suite.reply_tokens,
        batch_size=suite.batch_size,
        system=suite.system,
    )
    relearned = outcomes(attacked, asked, on_reply=stage.replies(asked.size, "after relearning"))
    return {"relearning": relearned["refusal"], "relearning_compliance": relearned["compliance"]}


_PROBES: dict[FurtherProbe, Callable[[SeedWorkspace, Cell, Model, Suite, Stage], Outcomes]] = {
    "prefill": _prefill,
    "replies": _replies,
    "kl": _kl,
    "relearning": _relearning,
}
