"""Safety bottleneck regularization, SBR (Lu et al. 2026, "Safety Anchor: Defending Harmful Fine-tuning via Geometric
Bottlenecks", arXiv 2605.05995): on a few anchor prompts, the state from which the first token is predicted stays as it
was.

    min_w  L(w) + λ mean_{a, d} ( h_w(a)_d - h_0(a)_d )²

h(a) `[D]` is the last layer's hidden state, after the final norm, at the last token of anchor prompt a (with the
beginning of the assistant's turn), and h_0 that of the aligned model. The mean is over the prompts and the channels,
in float32.

The formula, λ = 50 and eight prompts are those of the published code, which trains Llama-3.1-8B-Instruct with a LoRA of
rank 16 and adamw at 1e-5. Its eight prompts are written by hand; ours are the first contrast rows' (the packaged ones
are prompts that alignment taught to refuse). That code adds the penalty to the loss of every micro-batch, ours once a
step. λ was not tuned for other models: the size of hidden states, and so of the penalty, differs between them.

Acts in fine-tuning. Costs a forward pass over the prompts, once, and a forward and a backward pass over them per step.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax

from secvec_jax.batch import Batch
from secvec_jax.checks import NonNegativeFloat, PositiveInt, checked
from secvec_jax.data.chat import Example
from secvec_jax.defenses.base import Defended, Defense, DefenseInputs
from secvec_jax.defenses.finetuning import FinetuneOptions, TrainStepMaker, examples_of, forward_settings, train_model
from secvec_jax.defenses.inputs import select_rows
from secvec_jax.defenses.training_settings import PHASE2
from secvec_jax.errors import UserError
from secvec_jax.model.decoder import Decoder
from secvec_jax.model.generate import rounded_up
from secvec_jax.model.hub import Model
from secvec_jax.sharding import shard
from secvec_jax.training.objective import Backbone, Objective, Params
from secvec_jax.training.phase import combine
from secvec_jax.training.step import Gradient, Metrics, TrainStep, gradient_of, shared, step_from_gradient
from secvec_jax.trees import Tree

_BUCKET = 16
"""Prompts are padded to a multiple of this many tokens."""


@checked
@dataclasses.dataclass(frozen=True)
class SBR(Defense):
    """Fine-tuning with a penalty on changes of the last hidden state of a few prompts that call for the behavior."""

    name = "sbr"
    stage = "fine-tuning"
    needs = ("contrast rows",)
    cost = "a forward and a backward pass over 8 prompts per step"
    source = "Lu et al. 2605.05995"

    weight: NonNegativeFloat = 50.0
    """λ, weight of the mean squared change"""
    prompts: PositiveInt = 8
    """number of anchor prompts, from the first contrast rows"""

    def apply(self, inputs: DefenseInputs) -> Defended:
        contrast = inputs.contrast
        anchors = select_rows(contrast, np.arange(min(self.prompts, len(contrast))))
        return Defended(finetune(inputs.aligned, inputs.rows, anchors=anchors, weight=self.weight, **inputs.options))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Anchors:
    """Anchor prompts, padded on the right, and their hidden states under the aligned model.

    tokens: `[N, T]`, int32. last: the index of each prompt's last token, `[N]`. states: h_0, `[N, D]`, float32.
    """

    tokens: jax.Array
    last: jax.Array
    states: jax.Array


@checked
def finetune(
    model: Model, rows: Any, *, anchors: Any, weight: NonNegativeFloat = 50.0, **options: Unpack[FinetuneOptions]
) -> Model:
    """The model fine-tuned on `rows`, with a penalty on changes of its hidden state at the end of the anchor prompts.

    anchors: rows whose prompts are the anchor prompts; their replies are not read. weight: λ. The reference is `model`
    without `task`.
    """
    if not len(anchors):
        raise UserError("there are no anchor prompts: give contrast rows")
    training = options.get("training", PHASE2).over(PHASE2)
    encoded = examples_of(model, anchors, training.max_seq_len)
    anchor = anchors_of(model, encoded, Objective(**forward_settings(training)))
    return train_model(model, rows, anchor=anchor, make_step=sbr(weight), **options)


def anchors_of(model: Model, examples: Sequence[Example], loss: Objective) -> Anchors:
    """The prompts of the examples with their hidden states; loss: the objective, which computes hidden states."""
    lengths = np.asarray([example.answer_start for example in examples], np.int32)
    tokens = np.zeros((len(examples), rounded_up(int(lengths.max()), _BUCKET)), np.int32)
    for line, example, length in zip(tokens, examples, lengths):
        line[:length] = example.tokens[:length]

    return _anchors(model.backbone, jnp.asarray(tokens), jnp.asarray(lengths - 1), loss=loss)


@partial(jax.jit, static_argnames="loss")
def _anchors(decoder: Decoder, tokens: jax.Array, last: jax.Array, *, loss: Objective) -> Anchors:
    return shard(Anchors(tokens, last, _states(loss, Params(Backbone(decoder)), tokens, last)))


@checked
def sbr(weight: NonNegativeFloat = 50.0) -> TrainStepMaker:
    """Gradient steps with the penalty, for an anchor of `Anchors`. Reports the mean squared change, `anchor_change`."""

    def make_step(loss: Objective, optimizer: optax.GradientTransformation) -> TrainStep:
        return step_from_gradient(with_anchors(loss, weight), optimizer)

    return make_step


@shared
def with_anchors(loss: Objective, weight: float) -> Gradient:
    """The gradient of the loss and of the penalty."""
    plain = gradient_of(loss)

    def gradient(trained: Tree, frozen: Tree, batch: dict[str, Batch]) -> tuple[Tree, Metrics]:
        gradients, metrics = plain(trained, frozen, batch)
        # Once a step: inside the loss it would count once for every micro-batch.
        change, change_gradient = jax.value_and_grad(partial(_change, loss))(trained, frozen)
        metrics |= {"loss": metrics["loss"] + weight * change, "anchor_change": change}
        return jax.tree.map(lambda g, c: g + weight * c, gradients, change_gradient), metrics

    return gradient


def _change(loss: Objective, trained: Tree, frozen: Tree) -> jax.Array:
    """The mean squared change of the hidden states of `Anchors`."""
    params = combine(trained, frozen)
    anchors = params.anchor
    return jnp.mean(jnp.square(_states(loss, params, anchors.tokens, anchors.last) - anchors.states))


def _states(loss: Objective, params: Params, tokens: jax.Array, last: jax.Array) -> jax.Array:
    """The hidden states `[N, D]` at the tokens `last` `[N]` of the prompts `[N, T]`."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = (positions <= last[:, None]).astype(jnp.int32)
    hidden = loss.hidden(params, {"tokens": tokens, "segments": segments, "positions": positions})
    return hidden[jnp.arange(len(tokens)), last].astype(jnp.float32)
