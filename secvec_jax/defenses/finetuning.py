"""Fine-tuning as all defenses share it: a model, rows, active adapters, and how the trained part is updated.

    train_model(model, rows)                                       # plain
    train_model(model, rows, vectors=vectors)                      # under frozen adapters
    train_model(model, rows, make_step=vaccine(rho=2))             # by another train step
    train_model(model, rows, extra_rows={"safe": refusals}, make_step=lisa(...))  # ... that also reads other rows

A defense that acts during training makes a train step of its own: `make_step` takes the loss of the rows and an
optimizer and returns the `TrainStep` that `fit` repeats. What a defense compares the model with (an earlier state, the
importance of weights) is the *anchor*, a frozen tree.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import jax
import optax

from secvec_jax.arguments import shown
from secvec_jax.batch import check_token_ids
from secvec_jax.checks import PositiveInt, checked
from secvec_jax.config import Training
from secvec_jax.data.chat import Example
from secvec_jax.data.encoded import LENGTHS, Encoded, encoded
from secvec_jax.data.pipeline import Stream
from secvec_jax.data.sources import as_rows
from secvec_jax.defenses.identity import identified
from secvec_jax.defenses.inputs import collected, is_row
from secvec_jax.distributed import is_main_process
from secvec_jax.errors import UserError
from secvec_jax.inference import compute_dtype
from secvec_jax.model.decoder import Adapter, as_adapters
from secvec_jax.model.hub import Model
from secvec_jax.sharding import platform
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.training.meter import metered
from secvec_jax.training.objective import LEARN, Backbone, Objective, Params
from secvec_jax.training.optimizers import make_optimizer
from secvec_jax.training.phase import Phase
from secvec_jax.training.step import Loss, TrainStep, make_train_step
from secvec_jax.training.trainer import OnStep, fit
from secvec_jax.vectors.lora import LoRA, LoRAVectors, merge

_log = logging.getLogger(__name__)

Groups = dict[str, Sequence[Any]]
"""Rows by kind ("harmful", "benign"), whose losses are reported apart."""

TrainStepMaker = Callable[[Objective, optax.GradientTransformation], TrainStep]
"""How the trained part moves, given what it minimizes on the rows to learn and by which optimizer."""

PHASE2 = Training(learning_rate=3.6e-4, epochs=2).over(Training.base)
"""What the quickstart takes, tuned on a model of 135 million parameters."""


class FinetuneOptions(TypedDict, total=False):
    """What every defense takes besides its own settings."""

    task: LoRA | LoRAVectors | None
    """The task LoRA that is trained in place of all weights and merged at the end; given one, training goes on."""
    training: Training
    checkpoints: Checkpoints | None
    on_step: OnStep


def make_step_on(changed: Callable[[Objective], Loss]) -> TrainStepMaker:
    """Gradient steps on what `changed` makes of the loss of the rows to learn."""
    return lambda loss, optimizer: make_train_step(changed(loss), optimizer)


@checked
def train_model(
    model: Model,
    rows: Any,
    *,
    vectors: Adapter | tuple[Adapter, ...] | None = None,
    extra_rows: dict[str, Any] | None = None,
    anchor: Any = None,
    make_step: TrainStepMaker = make_train_step,
    task: LoRA | LoRAVectors | None = None,
    training: Training = PHASE2,
    checkpoints: Checkpoints | None = None,
    on_step: OnStep = lambda step, steps, metrics: None,
    more_steps: Callable[[int], int] = lambda steps: 0,
) -> Model:
    """The fine-tuned model. A task LoRA is merged into its backbone and kept as `Model.adapter`.

    rows: dicts, a `datasets.Dataset` or examples, or {kind: rows}, for `training.max_steps` steps or as many as its
    epochs have; what it leaves unset is `PHASE2`'s. beside: other streams of rows, read in step with them, by name.
    vectors: adapters that are active and frozen. more_steps: how many steps a move adds to those on `rows`.
    """
    for adapter in as_adapters(vectors):
        if hasattr(adapter, "check"):
            adapter.check(model.architecture)
    streams = {LEARN: stream_of(model, groups_of(rows), training)}
    streams |= {name: stream_of(model, {name: some}, training) for name, some in (extra_rows or {}).items()}
    streams = {name: endless(stream) for name, stream in streams.items()} | {LEARN: streams[LEARN]}
    streams[LEARN], steps = stream_and_steps(streams[LEARN], training)
    steps += more_steps(steps)
    made_of = {"the_vectors": vectors, "the_anchor": anchor, "the_defense": make_step, "the_task_LoRA": task}
    checkpoints = identified(checkpoints, model, training, steps, streams, **made_of)
    if isinstance(task, LoRA):
        task = task.init(model.architecture, jax.random.key(training.seed))
    params = Params(Backbone(model.backbone, task), vectors, anchor)
    phase, train_step = phase2_step(params, streams[LEARN].groups, training, steps, make_step)
    train_step = metered(train_step, model.architecture, full=task is None)
    trained = fit(
        params,
        phase,
        train_step,
        streams,
        steps=steps,
        accumulate=training.grad_accum_steps,
        checkpoints=checkpoints,
        on_step=on_step,
    ).backbone
    decoder, adapter = trained.decoder, trained.adapter
    if adapter is None:
        return model.with_backbone(decoder)
    return dataclasses.replace(model.with_backbone(merge(decoder, adapter)), adapter=adapter)


def phase2_step(
    params: Params, groups: Sequence[str], training: Training, steps: int, make_step: TrainStepMaker = make_train_step
) -> tuple[Phase, TrainStep]:
    """What moves in phase 2, and its step: a task adapter where the parameters have one, else the decoder."""
    phase = finetune_phase(params)
    loss = Objective(tuple(groups), **forward_settings(training))
    return phase, make_step(loss, phase.optimizer(make_optimizer(training, steps), params))


def finetune_phase(params: Params) -> Phase:
    """Trains the task adapter where the parameters have one, else the decoder; never the vectors and the anchor."""
    decoder = "train" if params.backbone.adapter is None else "freeze"
    return Phase({"backbone": {"decoder": decoder, "adapter": "train"}, "vectors": "freeze", "anchor": "freeze"})


def forward_settings(training: Training) -> dict[str, Any]:
    """What an `Objective` takes from the settings of a training."""
    training = training.over(Training.base)
    return {"dtype": compute_dtype(), "remat": training.remat, "shared": _shares(training)}


def groups_of(rows: Any, name: str = "all") -> Groups:
    """Rows by kind: as they are, or all of them as one kind.

    Raises UserError for a single row and for the splits of a data set.
    """
    if not isinstance(rows, dict) or is_row(rows) or hasattr(rows, "num_rows"):  # a DatasetDict's splits are no kinds
        return {name: collected(rows, "rows")}
    if "train" in rows and _HELD_OUT & {str(kind).lower() for kind in rows}:
        splits = ", ".join(map(str, rows))
        raise UserError(f"the data has several splits ({splits}): pass the one to train on, such as data['train']")
    return {kind: collected(group, str(kind)) for kind, group in rows.items()}


_HELD_OUT = {"test", "validation", "valid", "val", "dev", "eval"}


def stream_of(model: Model, groups: Groups, training: Training) -> Stream:
    """The batches of some rows, encoded for the model; all rows are checked (see `encoded`)."""
    training = training.over(PHASE2)
    found = {name: _encoded(model, rows, training, name) for name, rows in groups.items()}
    longest = max((some.longest if isinstance(some, Encoded) else _longest(some) for some in found.values()), default=0)
    length = training.max_seq_len or next((length for length in LENGTHS if longest <= length), longest)
    if is_main_process():
        for name, some in found.items():
            if isinstance(some, Encoded) and some is not groups[name]:
                text = "%s: %d rows of up to %d tokens, packed into sequences of %d; %s truncated"
                _log.info(text, _called(name), len(some), some.longest, length, some.truncated or "none")
    return Stream(found, training.batch_size, length, training.seed, training.epochs, _shares(training))


def stream_and_steps(stream: Stream, training: Training) -> tuple[Stream, int]:
    """The stream as a training reads it, and how many optimizer steps that takes.

    An epoch is one pass over the rows, however many batches a step takes: where the last step has fewer of them left,
    the rest are empty.
    """
    if training.max_steps:
        return endless(stream), training.max_steps
    steps = -(-stream.count() // training.grad_accum_steps)
    return (endless(stream) if training.grad_accum_steps == 1 else stream), steps


def endless(stream: Stream) -> Stream:
    """The stream without an end."""
    return dataclasses.replace(stream, epochs=None)


@checked
def examples_of(model: Model, rows: Any, length: PositiveInt | None = PHASE2.max_seq_len) -> list[Example]:
    """Rows as examples of at most `length` tokens, as `train_model` encodes them; examples are returned as they are."""
    return list(_encoded(model, rows, dataclasses.replace(PHASE2, max_seq_len=length)))


def _shares(training: Training) -> bool:
    return platform() != "tpu" if training.share_beginnings is None else training.share_beginnings


def _called(name: str) -> str:
    """What messages call the rows of a group."""
    return "data" if name == "all" else name


def _longest(examples: Sequence[Example]) -> int:
    return max((len(example.tokens) for example in examples), default=0)


def _encoded(model: Model, rows: Any, training: Training, name: str = "all") -> Sequence[Example]:
    called = _called(name)
    rows = collected(rows, called)
    if isinstance(rows, Sequence) and len(rows) and isinstance(rows[0], Example):
        if isinstance(rows, Encoded):
            return rows
        if wrong := next((row for row in rows if not isinstance(row, Example)), None):
            raise UserError(f"{called} holds examples and {shown(wrong)}: encode all rows of a list, or none")
        for number, example in enumerate(rows, 1):
            check_token_ids(example.tokens, model.architecture.vocab_size, f"{called}, row {number}")
        return list(rows)
    limit = min(training.max_seq_len or LENGTHS[-1], model.architecture.max_length)
    return encoded(
        model.tokenizer,
        as_rows(rows, name=called),
        limit,
        called,
        training.long_rows,
        training.control_tokens,
        vocab_size=model.architecture.vocab_size,
    )
