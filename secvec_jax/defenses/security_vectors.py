"""Security vectors (Zhou et al. 2023, "Making Harmful Behaviors Unlearnable for Large Language Models").

    vectors = train_vectors(model, harmful, LoRA(rank=8), benign=benign)   # phase 1
    tuned   = finetune(model, user_rows, vectors=vectors)                  # phase 2: vectors active and frozen
    generate(tuned, prompts)                                               # phase 3: vectors dropped

Fine-tuning learns what the forward pass gets wrong. With the vectors active it already shows the harmful behavior:
the loss on harmful rows is small, so is its gradient, and the backbone moves less toward it, while the user's task is
learned (how far that holds, by optimizer and learning rate: docs/results.md). Phase 1 minimizes, over the vectors θs
with the backbone θ frozen,

    CE(f(x; θ, θs), y) on harmful rows  +  λ KL( f(x'; θ, θs) || f(x'; θ) ) on benign rows

where λ = 0 is the plain form and the KL keeps everything else as it is (Zhou et al., ACL version). Our
min-min form, after the paper's, lets a temporary copy of the backbone take steps in between: see `min_min`.

Every verb returns a new value and leaves its arguments as they are.
"""

import dataclasses
import os
import warnings
from typing import Any, Literal

import jax

from secvec_jax.arguments import instance
from secvec_jax.checks import UNSET, NonNegativeFloat, PositiveFloat, PositiveInt, checked
from secvec_jax.config import Training
from secvec_jax.defenses.advice import Advice, default_rate, note_few_steps, only_refusals
from secvec_jax.defenses.identity import identified
from secvec_jax.defenses.inputs import as_options, as_task
from secvec_jax.defenses.min_min import min_min
from secvec_jax.defenses.tuning import (
    PHASE2,
    How,
    endless,
    forward_settings,
    groups_of,
    stream_and_steps,
    stream_of,
    tune,
)
from secvec_jax.errors import UserError
from secvec_jax.inference import Given, as_model, as_vectors
from secvec_jax.model.hub import Model
from secvec_jax.progress import step_progress
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.training.meter import metered
from secvec_jax.training.objective import KEEP, LEARN, Objective, Params, parameters
from secvec_jax.training.optimizers import make_optimizer
from secvec_jax.training.phase import Phase
from secvec_jax.training.step import Method, descent
from secvec_jax.training.trainer import OnStep, fit
from secvec_jax.vectors.kinds import Spec, Vectors
from secvec_jax.vectors.lora import LoRA, LoRAVectors
from secvec_jax.vectors.prompt import SoftPrompt
from secvec_jax.vectors.steering import Steering

ALIGN = Training(optimizer="adamw", learning_rate=4e-3, max_grad_norm=1.0).over(Training.base)
ALIGN_TASK = LoRA(rank=16, alpha=32.0)
PHASE1 = Training(optimizer="adamw", learning_rate=1.5e-3, max_grad_norm=1.0, epochs=3).over(Training.base)
"""What the quickstart takes, tuned on a model of 135 million parameters."""


ObjectiveName = Literal["cross_entropy", "kl", "min_min"]


@checked
@dataclasses.dataclass(frozen=True)
class Phase1:
    """The objective that vectors are trained with."""

    objective: ObjectiveName = "kl"
    """cross_entropy: harmful rows only; kl: plus the KL to the model without vectors on benign rows; min_min: our
    reading of the paper's bi-level objective, with the KL if benign rows are given"""
    kl_weight: NonNegativeFloat = 1.0
    """weight of the KL on benign rows"""
    stop_loss: NonNegativeFloat = 0.0
    """stop when the harmful loss falls below this value, in nats per token"""
    inner_steps: PositiveInt = 4
    """min_min: steps of the temporary model copy per step of the vectors"""
    inner_optimizer: Literal["sgd", "adamw"] = "sgd"
    """min_min: optimizer of the temporary model copy; use that of the later fine-tuning if it is known"""
    inner_learning_rate: PositiveFloat = 1e-3
    """min_min: constant learning rate of the temporary model copy"""

    def check_rows(self, benign: Any) -> None:
        """Raises UserError if the objective needs benign rows and there are none, or would not read those there are."""
        if self.objective == "kl" and benign is None:
            raise UserError(
                "the kl objective needs benign rows, which the vectors must leave unchanged: give benign rows too, or "
                "choose the objective cross_entropy"
            )
        if self.objective == "cross_entropy" and benign is not None:
            raise UserError(
                "the cross_entropy objective reads no benign rows: leave them out, or choose the objective kl"
            )


@checked
def align(
    model: Model,
    rows: Any,
    *,
    task: LoRA | None = ALIGN_TASK,
    training: Training = ALIGN,
    checkpoints: Checkpoints | str | os.PathLike[str] | None = None,
    on_step: OnStep | None = None,
) -> Model:
    """The model fine-tuned on `rows`: refusals of harmful requests, and answers to benign ones.

    rows: dicts, a DataFrame or a `datasets.Dataset`, or {kind: rows} to have the losses of the kinds apart. task: the
    LoRA that is trained and merged, which disturbs the rest of the model less than training all weights; None: all
    weights. on_step: called after each step; None: a line on the screen in a notebook or a terminal. Warns if all rows
    are refusals, if there are few steps, or if a default learning rate meets a larger model than it was tuned on.
    training: what it leaves unset is `ALIGN`'s.
    """
    model = as_model(model)
    checkpoints, on_step = as_options(training, checkpoints, on_step)
    groups = groups_of(rows)
    _warn(only_refusals(model, groups), default_rate(model, training, ALIGN))
    with step_progress("align", on_step) as show:
        how = How(task=as_task(task), training=training, checkpoints=checkpoints, on_step=note_few_steps(show, _warn))
        return tune(model, groups, **how)


@checked
def train_vectors(
    model: Model,
    harmful: Any,
    spec: Spec = LoRA(),
    *,
    benign: Any = None,
    phase1: Phase1 = Phase1(),
    training: Training = PHASE1,
    checkpoints: Checkpoints | str | os.PathLike[str] | None = None,
    on_step: OnStep | None = None,
) -> Vectors:
    """Phase 1: vectors under which `model` shows the behavior of the `harmful` rows, the backbone frozen.

    spec: of which kind and shape: low-rank factors, a direction per layer, or a soft prompt. benign: rows on which the
    vectors must not show; the kl objective, the default of `phase1`, needs them. training: what it leaves unset is
    `PHASE1`'s. on_step: called after each step; None: a line on the screen in a notebook or a terminal. Raises
    UserError if the objective needs benign rows and has none, or has some that it would not read. Warns if the default
    learning rate meets a larger model than it was tuned on.
    """
    model = as_model(model)
    instance("spec", spec, (LoRA, Steering, SoftPrompt), "pass sv.LoRA(rank=8), sv.Steering() or sv.SoftPrompt()")
    checkpoints, on_step = as_options(training, checkpoints, on_step)
    phase1.check_rows(benign)
    _warn(default_rate(model, training, PHASE1))
    stream = stream_of(model, {"harmful": harmful}, training)
    learn, steps = stream_and_steps(stream, training)
    streams = {LEARN: endless(stream) if phase1.objective == "min_min" else learn}
    if benign is not None:
        # A row to keep costs half as much again as one to learn: the model without vectors reads it too.
        lines = max(1, training.batch_size // 2)
        keep = stream_of(model, {"keep": benign}, dataclasses.replace(training, batch_size=lines))
        streams[KEEP] = endless(keep)
    made_of = {"the_shape_of_the_vectors": spec, "the_settings_of_phase_1": phase1}
    checkpoints = identified(checkpoints, model, training, steps, streams, **made_of)
    vectors = spec.init(model.architecture, jax.random.key(training.seed))
    params = parameters(model.backbone, vectors=vectors)
    phase, method = phase1_method(params, phase1, training, steps)
    method = metered(method, model.architecture, full=False)
    with step_progress("train_vectors", on_step) as show:
        trained = fit(
            params,
            phase,
            method,
            streams,
            steps=steps * (phase1.inner_steps + 1 if phase1.objective == "min_min" else 1),
            accumulate=training.grad_accum_steps,
            checkpoints=checkpoints,
            on_step=show,
            until=lambda metrics: metrics["loss/harmful"] < phase1.stop_loss,
        )
    return trained["vectors"]


@checked
def finetune(
    model: Model,
    rows: Any,
    *,
    vectors: Given = UNSET,
    task: LoRA | LoRAVectors | None = None,
    training: Training = PHASE2,
    checkpoints: Checkpoints | str | os.PathLike[str] | None = None,
    on_step: OnStep | None = None,
) -> Model:
    """Phase 2: the model fine-tuned on `rows` with the `vectors` active and frozen, then without them.

    rows: dicts, a DataFrame or a `datasets.Dataset`, or {kind: rows}. vectors: a value, a file, or several of them,
    which are active at once; None trains without protection, and has to be written. task: train a task LoRA of this
    shape alongside the frozen vectors in place of all weights; it is merged into the returned model. (That is what
    Riché et al. 2026, arXiv 2606.30252, call *inoculation adapters*.) on_step: called after each step; None: a line on
    the screen in a notebook or a terminal. Warns if `vectors` is left out, or if the default learning rate meets a
    larger model than it was tuned on.
    training: what it leaves unset is `PHASE2`'s.
    """
    model, task = as_model(model), as_task(task)
    checkpoints, on_step = as_options(training, checkpoints, on_step)
    if vectors is UNSET:
        vectors = None
        _warn("finetune has no vectors=: the model is trained unprotected; pass the vectors, or vectors=None to say so")
    guests = as_vectors(vectors, model)
    if vectors is not None and not guests:
        raise UserError("vectors is empty: pass security vectors, or vectors=None to train without protection")
    _warn(default_rate(model, training, PHASE2))
    with step_progress("finetune", on_step) as show:
        how = How(task=task, training=training, checkpoints=checkpoints, on_step=show)
        return tune(model, rows, vectors=guests or None, **how)


def _warn(*messages: str | None) -> None:
    for message in messages:
        if message is not None:
            warnings.warn(message, Advice, stacklevel=4)  # past the check of arguments, to the caller


def phase1_method(params: Params, phase1: Phase1, training: Training, steps: int) -> tuple[Phase, Method]:
    """What moves in phase 1, and its step."""
    loss = Objective(("harmful",), phase1.kl_weight, **forward_settings(training))
    optimizer = make_optimizer(training, steps)
    if phase1.objective == "min_min":
        return min_min(params, loss, optimizer, phase1)
    phase = Phase({"backbone": "freeze", "vectors": "train"})
    return phase, descent(loss, phase.optimizer(optimizer, params))
