"""Fine-tuning, shared by all defenses: a model, rows, active adapters, and how the trained part is updated.

    train_model(model, rows)                                       # plain
    train_model(model, rows, eval_rows=0.05)                       # with a twentieth of the rows held out
    train_model(model, rows, vectors=vectors)                      # under frozen adapters
    train_model(model, rows, make_step=vaccine(rho=2))             # by another train step
    train_model(model, rows, extra_rows={"safe": refusals}, make_step=lisa(...))  # ... that also reads other rows

A defense that acts during training makes its own train step: `make_step` takes the loss of the rows and an
optimizer and returns the `TrainStep` that `fit` repeats. What a defense compares the model with (an earlier state, the
importance of weights) is the *anchor*, a frozen tree.
"""

import dataclasses
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import optax

from secvec_jax.checks import PositiveFraction, PositiveInt, checked
from secvec_jax.config import Training
from secvec_jax.data.chat import ControlTokens, Example
from secvec_jax.data.encoded import LENGTHS, Examples
from secvec_jax.data.pipeline import Stream
from secvec_jax.defenses.held_out import hold_out
from secvec_jax.defenses.identity import with_inputs
from secvec_jax.defenses.inputs import (
    Groups,
    as_examples,
    groups_of,
    longest_example,
    shown_name_of,
)
from secvec_jax.defenses.training_settings import PHASE2, check_trained_weights, check_unused, extra_batch_size
from secvec_jax.distributed import is_main_process
from secvec_jax.errors import UserError
from secvec_jax.inference import check_fits, compute_dtype
from secvec_jax.model.adapter import Adapter, as_adapters
from secvec_jax.model.hub import Model
from secvec_jax.model.quantized import with_precision
from secvec_jax.sharding import platform
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.training.frozen import FrozenTrees
from secvec_jax.training.meter import metered, with_schedule
from secvec_jax.training.objective import LEARN, Backbone, Objective, Params
from secvec_jax.training.optimizers import learning_rate_at, make_optimizer
from secvec_jax.training.phase import Phase
from secvec_jax.training.step import Loss, TrainStep, make_train_step
from secvec_jax.training.summary import summary
from secvec_jax.training.trainer import OnStep, fit
from secvec_jax.training.validation import EVAL_LOSS, Validation
from secvec_jax.trees import Tree
from secvec_jax.vectors.lora import LoRA, LoRAVectors, merge
from secvec_jax.vectors.origin import with_origin
from secvec_jax.vectors.steering import SteeringVectors

_log = logging.getLogger(__name__)

TrainStepMaker = Callable[[Objective, optax.GradientTransformation], TrainStep]
"""Makes the train step, given what is minimized on the rows to learn and the optimizer."""


class FinetuneOptions(TypedDict, total=False):
    """The options that every defense takes, in addition to its settings."""

    task: LoRA | LoRAVectors | None
    """The task LoRA that is trained in place of all weights and merged at the end; a trained one is trained further."""
    training: Training
    eval_rows: Any
    """Rows whose loss is measured during training, or the fraction of the rows that is held out for it."""
    checkpoints: Checkpoints | None
    on_step: OnStep
    frozen: FrozenTrees | None
    """Verifies that frozen parameters do not change."""


def make_step_on(changed: Callable[[Objective], Loss]) -> TrainStepMaker:
    """Gradient steps on the loss that `changed` returns, given that of the rows to learn."""
    return lambda loss, optimizer: make_train_step(changed(loss), optimizer)


@checked
def train_model(
    model: Model,
    rows: Any,
    *,
    vectors: Adapter | tuple[Adapter, ...] | None = None,
    extra_rows: dict[str, Any] | None = None,
    extra_batch: PositiveFraction = 1.0,
    eval_rows: Any = None,
    train_only: Collection[str] = (),
    anchor: Any = None,
    make_step: TrainStepMaker = make_train_step,
    task: LoRA | LoRAVectors | None = None,
    training: Training = PHASE2,
    checkpoints: Checkpoints | None = None,
    on_step: OnStep = lambda step, steps, metrics: None,
    more_steps: Callable[[int], int] = lambda steps: 0,
    frozen: FrozenTrees | None = None,
) -> Model:
    """The fine-tuned model. A task LoRA is merged into its backbone and kept as `Model.adapter`.

    rows: dicts, a `datasets.Dataset` or examples, or {kind: rows}, for `training.max_steps` steps or as many as its
    epochs have; unset settings are those of `PHASE2`. extra_rows: further rows that each step reads, {name of the
    stream: rows}; extra_batch: the batch size of each, as a share of `training.batch_size`. vectors: adapters that are
    active and frozen. more_steps: how many steps a train step adds to those on `rows`. eval_rows: rows, or the fraction
    of `rows` that is held out, whose loss under the vectors is measured every epoch or every
    `training.eval_every_steps`; with checkpoints the model returned is then the one where it was lowest, unless
    `training.best` names another metric; train_only: kinds of which no row is held out. The training ends early after
    `training.patience` evaluations without a new lowest loss. frozen: takes the fingerprints of what is frozen before
    and after, and raises UserError if they differ. Raises UserError for a kind that is named like one of the extra
    rows.
    """
    in_bfloat16 = check_trained_weights(training, task is None)
    if task is None and not (in_bfloat16 and model.precision == "bfloat16"):
        check_trainable(model)
    for adapter in as_adapters(vectors, task if isinstance(task, LoRAVectors) else None):
        check_fits(adapter, model)
    check_unused(training, validates=eval_rows is not None, keeps=checkpoints is not None)
    _note_zero_vectors(as_adapters(vectors))
    groups, eval_groups = hold_out(groups_of(rows), eval_rows, training.over(PHASE2).seed, train_only)
    streams = {LEARN: stream_of(model, groups, training)}
    if extra_rows:
        check_kinds(groups, extra_rows)
        extra_training = dataclasses.replace(training, batch_size=extra_batch_size(training, extra_batch))
        streams |= {name: stream_of(model, {name: group}, extra_training) for name, group in extra_rows.items()}
    streams = {name: endless(stream) for name, stream in streams.items()} | {LEARN: streams[LEARN]}
    streams[LEARN], learn_steps, steps_per_epoch = stream_and_steps(streams[LEARN], training)
    steps = learn_steps + more_steps(learn_steps)
    note_long_warmup(training, steps)
    steps_per_epoch *= steps / learn_steps
    validation = None if eval_groups is None else validation_of(model, eval_groups, training, steps_per_epoch)
    if validation is not None and checkpoints is not None and checkpoints.best is None:
        checkpoints = dataclasses.replace(checkpoints, best=EVAL_LOSS)
    further_inputs = {"the_vectors": vectors, "the_anchor": anchor, "the_defense": make_step, "the_task_LoRA": task}
    eval_stream = None if validation is None else validation.stream
    checkpoints = with_inputs(checkpoints, model, training, steps, streams, eval_stream, **further_inputs)
    if isinstance(task, LoRA):
        task = task.init(model.architecture, jax.random.key(training.seed))
    backbone = with_precision(model.backbone, "bfloat16") if in_bfloat16 else model.backbone
    params = Params(Backbone(backbone, task), vectors, anchor)
    phase, train_step = phase2_step(params, streams[LEARN].groups, training, steps, make_step)
    train_step = metered(train_step, model.architecture, full=task is None)
    log_summary(streams[LEARN], training, steps, steps_per_epoch, params, phase)
    if frozen is not None:
        frozen.record(_frozen_trees(params))
    trained = fit(
        params,
        phase,
        train_step,
        streams,
        steps=steps,
        grad_accum_steps=training.grad_accum_steps,
        validation=validation,
        checkpoints=checkpoints,
        on_step=with_schedule(on_step, lambda step: learning_rate_at(training, steps, step), steps_per_epoch),
    )
    if frozen is not None:
        frozen.verify(_frozen_trees(trained))
    decoder, adapter = trained.backbone.decoder, trained.backbone.adapter
    if adapter is None:
        return model.with_backbone(decoder)
    return model.with_merged(merge(decoder, adapter), with_origin(adapter, model))


def check_kinds(groups: Collection[str], reserved: Collection[str]) -> None:
    """Raises UserError if a kind of the user's rows has the name of rows that a defense adds, whose loss has it."""
    if both := [name for name in groups if name in reserved]:
        raise UserError(f'the rows have a kind named "{both[0]}", reserved for those of the defense: name it otherwise')


def _note_zero_vectors(vectors: Sequence[Adapter]) -> None:
    """Warn of vectors as they are before they are trained, under which a training is one without vectors."""
    for adapter in vectors:
        updates = {}
        if isinstance(adapter, LoRAVectors):
            updates = {name: factors["b"] for name, factors in adapter.factors.items()}
        elif isinstance(adapter, SteeringVectors):
            updates = adapter.factors
        changes = any([bool(jnp.any(array)) for array in updates.values()])  # every process computes all
        if updates and not changes and is_main_process():
            _log.warning(
                "%r still have their initial values, so this training equals one without vectors; pass what "
                "sv.train_vectors returned",
                adapter,
            )


def check_trainable(model: Model) -> None:
    """Raises UserError if the backbone's precision is lower than training needs."""
    if model.precision != "float32":
        raise UserError(
            f"the model's weights are in {model.precision}, which is for frozen weights, and this trains them: "
            "train a task LoRA instead, or load the model in float32"
        )


def phase2_step(
    params: Params, groups: Sequence[str], training: Training, steps: int, make_step: TrainStepMaker = make_train_step
) -> tuple[Phase, TrainStep]:
    """The phase and the train step of phase 2: a task adapter is trained where the parameters have one, else the
    decoder."""
    phase = finetune_phase(params)
    loss = Objective(tuple(groups), **forward_settings(training))
    return phase, make_step(loss, phase.optimizer(make_optimizer(training, steps), params))


def finetune_phase(params: Params) -> Phase:
    """Trains the task adapter where the parameters have one, else the decoder; never the vectors and the anchor."""
    decoder = "train" if params.backbone.adapter is None else "freeze"
    return Phase({"backbone": {"decoder": decoder, "adapter": "train"}, "vectors": "freeze", "anchor": "freeze"})


def _frozen_trees(params: Params) -> dict[str, Tree]:
    """What `finetune_phase` keeps frozen, by name."""
    trees = {"vectors": params.vectors, "anchor": params.anchor}
    if params.backbone.adapter is not None:
        trees["backbone"] = params.backbone.decoder
    return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}


def forward_settings(training: Training) -> dict[str, Any]:
    """What an `Objective` takes from the settings of a training."""
    training = training.over(Training.base)
    return {"dtype": compute_dtype(), "remat": training.remat, "share_prefix": _shares_prefix(training)}


def stream_of(model: Model, groups: Groups, training: Training) -> Stream:
    """A stream of batches of the rows, all of which are encoded for the model and checked first (see `encoded`)."""
    training = training.over(PHASE2)
    examples = {name: as_examples(model, rows, training, name) for name, rows in groups.items()}
    longest = max((longest_example(group) for group in examples.values()), default=0)
    length = training.max_seq_len or next((length for length in LENGTHS if longest <= length), longest)
    if is_main_process():
        for name, group in examples.items():
            if isinstance(group, Examples) and group is not groups[name]:
                text = "%s: %d rows of up to %d tokens; %s truncated"
                _log.info(text, shown_name_of(name), len(group), group.longest, group.truncated or "none")
    return Stream(examples, training.batch_size, length, training.seed, training.epochs, _shares_prefix(training))


def stream_and_steps(stream: Stream, training: Training) -> tuple[Stream, int, float]:
    """The stream as a training reads it, how many optimizer steps that takes, and how many one pass takes.

    `epochs` are as many passes over the rows, however many sequences and batches a step takes; the last step has what
    is left. Under a constant schedule, whose training can be extended, the last step is filled from the next pass
    instead, as it would be in the middle of a longer training.
    """
    batches_per_epoch = dataclasses.replace(stream, epochs=1).count()
    steps_per_epoch = batches_per_epoch / training.grad_accum_steps
    if training.max_steps:
        return endless(stream), training.max_steps, steps_per_epoch
    batches = batches_per_epoch if stream.epochs == 1 else stream.count()  # counting packs all rows
    steps = -(-batches // training.grad_accum_steps)
    return (endless(stream) if training.schedule == "constant" else stream), steps, steps_per_epoch


def validation_of(model: Model, groups: Groups, training: Training, steps_per_epoch: float) -> Validation:
    """The validation that measures the loss of these rows during a training, computed as in training."""
    training = training.over(PHASE2)
    stream = dataclasses.replace(stream_of(model, groups, training), epochs=1)
    every_steps = training.eval_every_steps or max(round(steps_per_epoch), 1)
    return Validation(Objective(stream.groups, **forward_settings(training)), stream, every_steps, training.patience)


def log_summary(
    stream: Stream, training: Training, steps: int, steps_per_epoch: float, params: Params, phase: Phase
) -> None:
    """Log a summary of a training."""
    if is_main_process():
        accumulated = training.over(PHASE2).grad_accum_steps
        _log.info("%s", summary(stream, accumulated, steps, steps_per_epoch, params, phase, compute_dtype()))


def note_long_warmup(training: Training, steps: int) -> None:
    """Warn of a warm-up that is as long as the training, unless it is the default's few steps."""
    training = training.over(PHASE2)
    if training.warmup_steps >= steps and training.warmup_steps != Training.base.warmup_steps and is_main_process():
        _log.warning(
            "warmup_steps is %d, and the training has %d step%s: the learning rate reaches %g in the last step only; "
            "lower warmup_steps, or train for more steps",
            training.warmup_steps,
            steps,
            "s" * (steps > 1),
            training.learning_rate,
        )


def endless(stream: Stream) -> Stream:
    """The stream, repeated endlessly."""
    return dataclasses.replace(stream, epochs=None)


@checked
def examples_of(
    model: Model,
    rows: Any,
    length: PositiveInt | None = PHASE2.max_seq_len,
    control_tokens: ControlTokens = "text",
) -> list[Example]:
    """Rows as examples of at most `length` tokens, as `train_model` encodes them; examples are returned as they are."""
    settings = dataclasses.replace(PHASE2, max_seq_len=length, control_tokens=control_tokens)
    return list(as_examples(model, rows, settings))


def _shares_prefix(training: Training) -> bool:
    return platform() != "tpu" if training.share_prefix is None else training.share_prefix
