"""Security vectors (Zhou et al. 2023, "Making Harmful Behaviors Unlearnable for Large Language Models").

    vectors = train_vectors(model, harmful, LoRA(rank=8), benign=benign)   # phase 1
    tuned   = finetune(model, user_rows, vectors=vectors)                  # phase 2: vectors active and frozen
    generate(tuned, prompts)                                               # phase 3: vectors dropped

Fine-tuning learns what the forward pass gets wrong. With the vectors active it already shows the harmful behavior:
the loss on harmful rows is small, so is its gradient, and the backbone changes less toward it, while the user's task is
learned (how far that holds, by optimizer and learning rate: docs/results.md). Phase 1 minimizes, over the vectors θs
with the backbone θ frozen,

    CE(f(x; θ, θs), y) on harmful rows  +  λ KL( f(x'; θ, θs) || f(x'; θ) ) on benign rows

where λ = 0 is the plain form and the KL keeps everything else unchanged (Zhou et al., ACL version). In the min-min
form, ours after the paper's, a temporary copy of the backbone takes steps in between: see `min_min`.

Every function returns a new value and does not change its arguments.
"""

import dataclasses
import os
import warnings
from typing import Any, Literal

import jax

from secvec_jax.arguments import instance
from secvec_jax.checks import UNSET, NonNegativeFloat, PositiveFloat, PositiveInt, checked
from secvec_jax.config import Training
from secvec_jax.defenses.advice import Advice, also_benign, default_rate, note_few_steps, only_refusals, other_precision
from secvec_jax.defenses.base import Defended, Defense, DefenseInputs, Need, changed_settings, lora_of_rank
from secvec_jax.defenses.finetuning import (
    FinetuneOptions,
    TrainStepMaker,
    check_trainable,
    endless,
    forward_settings,
    log_summary,
    note_long_warmup,
    stream_and_steps,
    stream_of,
    train_model,
)
from secvec_jax.defenses.floor import floored
from secvec_jax.defenses.identity import with_inputs
from secvec_jax.defenses.inputs import as_examples_or_rows, as_options, as_task, groups_of
from secvec_jax.defenses.min_min import min_min
from secvec_jax.defenses.mixing import SAFE, with_safe_rows
from secvec_jax.defenses.training_settings import PHASE2, check_trained_weights, check_unused
from secvec_jax.errors import UserError
from secvec_jax.inference import VectorsLike, as_model, as_vectors
from secvec_jax.model.hub import Model
from secvec_jax.progress import step_progress
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.training.meter import metered, with_schedule
from secvec_jax.training.objective import KEEP, LEARN, Backbone, Objective, Params
from secvec_jax.training.optimizers import learning_rate_at, make_optimizer
from secvec_jax.training.phase import Phase
from secvec_jax.training.step import TrainStep, make_train_step
from secvec_jax.training.trainer import OnStep, fit
from secvec_jax.vectors.kinds import Spec, Vectors
from secvec_jax.vectors.lora import LoRA, LoRAVectors
from secvec_jax.vectors.origin import with_origin
from secvec_jax.vectors.prompt import SoftPrompt
from secvec_jax.vectors.steering import Steering

ALIGN = Training(optimizer="adamw", learning_rate=4e-3, max_grad_norm=1.0).over(Training.base)
ALIGN_TASK = LoRA(rank=16, alpha=32.0)
PHASE1 = Training(optimizer="adamw", learning_rate=1.5e-3, max_grad_norm=1.0, epochs=3).over(Training.base)
"""The settings of the quickstart, tuned on a model of 135 million parameters."""


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
        """Raises UserError if the objective needs benign rows and has none, or has some and does not read them."""
        if self.objective == "kl" and benign is None:
            raise UserError(
                "the kl objective needs benign rows, on which the vectors must not change the model's outputs: give "
                "benign rows too, or choose the objective cross_entropy"
            )
        if self.objective == "cross_entropy" and benign is not None:
            raise UserError(
                "the cross_entropy objective reads no benign rows: leave them out, or choose the objective kl"
            )

    def unused(self, benign: Any) -> str | None:
        """The warning about settings of another objective, which do nothing; None if there are none."""
        unused = [] if self.objective == "min_min" else ["inner_steps", "inner_optimizer", "inner_learning_rate"]
        unused += ["kl_weight"] if benign is None else []
        changed = [setting for setting in changed_settings(self) if setting.partition("=")[0] in unused]
        if not changed:
            return None
        rows = "" if benign is not None else " without benign rows"
        return f"{', '.join(changed)}: not used by the objective {self.objective}{rows}; leave it out"


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

    rows: dicts, a DataFrame or a `datasets.Dataset`, or {kind: rows} to have the loss of each kind reported. task: the
    LoRA that is trained and merged, which changes the rest of the model less than training all weights does; None: all
    weights. on_step: called after each step; None: a progress line in a notebook or terminal. training: unset settings
    are those of `ALIGN`. Warns if all rows are refusals, if there are few steps, or if the default learning rate is
    used for a larger model than it was tuned on.
    """
    model = as_model(model)
    checkpoints, on_step = as_options(training, checkpoints, on_step)
    groups = groups_of(rows)
    _warn(only_refusals(model, groups), default_rate(model, training, ALIGN))
    with step_progress("align", on_step) as show:
        options = FinetuneOptions(
            task=as_task(task), training=training, checkpoints=checkpoints, on_step=note_few_steps(show, _warn)
        )
        return train_model(model, groups, **options)


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
    """Phase 1: vectors under which `model` shows the behavior of the `harmful` rows; the backbone is frozen.

    spec: their kind and shape: low-rank factors, a direction per layer, or a soft prompt. benign: rows on which the
    vectors must not change the model's outputs; the kl objective, the default of `phase1`, needs them. training: unset
    settings are those of `PHASE1`. on_step: called after each step; None: a progress line in a notebook or terminal.
    Raises UserError if the objective needs benign rows and has none, or is given rows that it does not use. Warns if
    the default learning rate is used for a larger model than it was tuned on.
    """
    model = as_model(model)
    instance("spec", spec, (LoRA, Steering, SoftPrompt), "pass sv.LoRA(rank=8), sv.Steering() or sv.SoftPrompt()")
    checkpoints, on_step = as_options(training, checkpoints, on_step)
    phase1.check_rows(benign)
    check_trained_weights(training.over(PHASE1), full=False)
    check_unused(training, validates=False, keeps=checkpoints is not None)
    if phase1.objective == "min_min":
        check_trainable(model)
    harmful = as_examples_or_rows(harmful, "harmful")
    benign = None if benign is None else as_examples_or_rows(benign, "benign")
    _warn(default_rate(model, training, PHASE1), phase1.unused(benign), also_benign(harmful, benign))
    stream = stream_of(model, {"harmful": harmful}, training)
    learn, steps, steps_per_epoch = stream_and_steps(stream, training)
    note_long_warmup(training, steps)
    streams = {LEARN: endless(stream) if phase1.objective == "min_min" else learn}
    if benign is not None:
        # A benign row costs 1.5 times as much as a harmful one: the model without vectors reads it, too.
        batch_size = max(1, training.batch_size // 2)
        keep = stream_of(model, {"keep": benign}, dataclasses.replace(training, batch_size=batch_size))
        streams[KEEP] = endless(keep)
    further_inputs: dict[str, Any] = {"the_shape_of_the_vectors": spec, "the_settings_of_phase_1": phase1}
    checkpoints = with_inputs(checkpoints, model, training, steps, streams, **further_inputs)
    if checkpoints is not None:
        checkpoints = dataclasses.replace(checkpoints, private=True)
    vectors = spec.init(model.architecture, jax.random.key(training.seed))
    params = Params(Backbone(model.backbone), vectors)
    phase, train_step = phase1_step(params, phase1, training, steps)
    train_step = metered(train_step, model.architecture, full=False)
    steps_per_vector_step = phase1.inner_steps + 1 if phase1.objective == "min_min" else 1

    def learning_rate(step: int) -> float:
        return learning_rate_at(training, steps, -(-step // steps_per_vector_step))

    log_summary(stream, training, steps * steps_per_vector_step, steps_per_epoch, params, phase)
    with step_progress("train_vectors", on_step) as show:
        trained = fit(
            params,
            phase,
            train_step,
            streams,
            steps=steps * steps_per_vector_step,
            grad_accum_steps=training.grad_accum_steps,
            checkpoints=checkpoints,
            on_step=with_schedule(show, learning_rate, steps_per_epoch),
            until=lambda metrics: metrics["loss/harmful"] < phase1.stop_loss,
        )
    return with_origin(trained.vectors, model)


@checked
def finetune(
    model: Model,
    rows: Any,
    *,
    vectors: VectorsLike = UNSET,
    task: LoRA | LoRAVectors | None = None,
    training: Training = PHASE2,
    eval_rows: Any = None,
    checkpoints: Checkpoints | str | os.PathLike[str] | None = None,
    on_step: OnStep | None = None,
) -> Model:
    """Phase 2: the model fine-tuned on `rows` with the `vectors` active and frozen, then without them.

    rows: dicts, a DataFrame or a `datasets.Dataset`, or {kind: rows}.
    vectors: a value, a file, or several of them, which are active at once. `vectors=None` trains without protection and
        has to be written out: without the argument there is a warning.
    task: train a task LoRA of this shape, alongside the frozen vectors, in place of all weights. The returned model has
        it merged into its weights, and also separately, as `model.adapter`, which may be trained further with the model
        that it was trained on. (Riché et al. 2026, arXiv 2606.30252, call this *inoculation adapters*.)
    training: unset settings are those of `PHASE2`.
    eval_rows: rows, or the fraction of `rows` to hold out, such as 0.05, whose loss is measured every epoch or every
        `training.eval_every_steps`, with the vectors active: the metric `eval/loss`. With `checkpoints` the model
        returned is the one where it was lowest. `training.patience` ends the training early.
    checkpoints: a folder from which an interrupted training run resumes exactly.
    on_step: called after each step with its number, the number of steps and the metrics; None: a progress line in a
        notebook or terminal.

    Warns if `vectors` is left out, or if the default learning rate is used for a larger model than it was tuned on or
    for a task LoRA. Raises UserError for rows or vectors that cannot be read, for vectors of another model, for
    settings that this training does not use, and if the training diverges.
    """
    model, task = as_model(model), as_task(task)
    checkpoints, on_step = as_options(training, checkpoints, on_step)
    if vectors is UNSET:
        vectors = None
        _warn("finetune has no vectors=: the model is trained unprotected; pass the vectors, or vectors=None to say so")
    adapters = as_vectors(vectors, model)
    if any(task is adapter for adapter in adapters):
        raise UserError("the task is also among the vectors, and would act twice: leave it out of one of them")
    if vectors is not None and not adapters:
        raise UserError("vectors is empty: pass security vectors, or vectors=None to train without protection")
    _warn(default_rate(model, training, PHASE2, task), *(other_precision(adapter, model) for adapter in adapters))
    with step_progress("finetune", on_step) as show:
        options = FinetuneOptions(
            task=task, training=training, eval_rows=eval_rows, checkpoints=checkpoints, on_step=show
        )
        return train_model(model, rows, vectors=adapters or None, **options)


def _warn(*messages: str | None) -> None:
    for message in messages:
        if message is not None:
            warnings.warn(message, Advice, stacklevel=4)  # past the check of arguments, to the caller


Kind = Literal["lora", "steering", "prompt"]


@checked
@dataclasses.dataclass(frozen=True)
class SecurityVectors(Defense):
    """Fine-tuning under frozen security vectors, which are dropped afterwards."""

    name = "security vectors"
    stage = "fine-tuning"
    needs = ("security vectors",)
    cost = "training the vectors, once; 3% per step"
    source = (
        "Zhou et al. 2311.02105; soft prompts: Li & Liang 2101.00190; a task LoRA under them: Riché et al. 2606.30252"
    )

    kind: Kind = "lora"
    """kind of the vectors: low-rank factors, a direction per layer, or a soft prompt"""
    objective: ObjectiveName = "kl"
    """objective of phase 1"""
    rank: PositiveInt = 8
    """rank of the low-rank factors; alpha is twice the rank"""
    floor: NonNegativeFloat = 0.0
    """tokens with a loss of at most this, in nats, contribute no gradient"""
    both: str = ""
    """another behavior whose vectors are active as well"""
    safe: NonNegativeFloat = 0.0
    """safe rows mixed in, as a share of the user's rows; they are learned under the vectors, too"""
    inner: bool = False
    """min_min: the temporary model copy is trained with the optimizer and learning rate of the fine-tuning"""

    def apply(self, inputs: DefenseInputs) -> Defended:
        vectors: Any = self._vectors(inputs)
        if self.both:
            vectors = (vectors, self._vectors(inputs, self.both))
        make_step: TrainStepMaker = floored(self.floor) if self.floor else make_train_step
        rows, added = inputs.rows, (SAFE,) if self.safe else ()
        if self.safe:
            rows = with_safe_rows(rows, inputs.safe, self.safe)
        return Defended(inputs.finetune(rows=rows, train_only=added, vectors=vectors, make_step=make_step))

    @property
    def unusable(self) -> str:
        return "it takes vectors of another behavior by name; give several vectors instead" if self.both else ""

    @property
    def reads(self) -> tuple[Need, ...]:
        return (*self.needs, "safe rows") if self.safe else self.needs

    def _vectors(self, inputs: DefenseInputs, behavior: str | None = None) -> Vectors:
        phase1: dict[str, Any] = {"objective": self.objective}
        if self.inner:
            training = inputs.options["training"]
            phase1 |= {"inner_optimizer": training.optimizer, "inner_learning_rate": training.learning_rate}
        return inputs.vectors(self._spec(), behavior, **phase1)

    def _spec(self) -> Spec:
        # The scales of 8 were not tuned: they make a learning rate that suits LoRA suit these kinds, too.
        if self.kind == "steering":
            return Steering(scale=8.0)
        if self.kind == "prompt":
            return SoftPrompt(scale=8.0)
        return lora_of_rank(self.rank)


def phase1_step(params: Params, phase1: Phase1, training: Training, steps: int) -> tuple[Phase, TrainStep]:
    """The phase and the train step of phase 1."""
    loss = Objective(("harmful",), phase1.kl_weight, **forward_settings(training))
    optimizer = make_optimizer(training, steps)
    if phase1.objective == "min_min":
        return min_min(params, loss, optimizer, phase1)
    phase = Phase({"backbone": "freeze", "vectors": "train"})
    return phase, make_train_step(loss, phase.optimizer(optimizer, params))
