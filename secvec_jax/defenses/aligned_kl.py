"""KL to the aligned model, a baseline of Vaccine (Huang et al. 2024, arXiv 2402.01109): the model stays close, on the
user's own rows, to what it said before.

    min_w  L(w) + λ KL( p_aligned || p_w )

Both terms are means over the supervised tokens of the user's batch, and the KL is between the distributions of the
next token, over the vocabulary. The published code means the same, but takes its softmax over dimension 1 of logits
`[batch, position, vocabulary]`, which is over positions, prompt and padding included, and its sum per row is no mean
over tokens: its λ (1e-3; 0.1 in its script) says nothing about this one.

Under active vectors it is the model without them that is held.

Acts in fine-tuning. Costs one more forward pass per batch, without gradients, twice the work of the head behind it,
and a copy of the decoder where all weights are trained.
"""

from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from secvec_jax.batch import Batch
from secvec_jax.checks import NonNegativeFloat, checked
from secvec_jax.defenses.finetuning import FinetuneOptions, TrainStepMaker, make_step_on, train_model
from secvec_jax.model.adapter import Adapter
from secvec_jax.model.hub import Model
from secvec_jax.training.loss import token_cross_entropy, token_forward_kl
from secvec_jax.training.objective import LEARN, Objective, Params, as_it_was, without_vectors
from secvec_jax.training.step import Loss


@checked
def finetune(
    model: Model,
    rows: Any,
    *,
    weight: NonNegativeFloat = 0.1,
    vectors: Adapter | tuple[Adapter, ...] | None = None,
    **options: Unpack[FinetuneOptions],
) -> Model:
    """The model fine-tuned on `rows`, held to what `model` says by itself, without `task` and `vectors`. weight: λ."""
    return train_model(model, rows, anchor=model.backbone, make_step=aligned_kl(weight), vectors=vectors, **options)


@checked
def aligned_kl(weight: NonNegativeFloat = 0.1) -> TrainStepMaker:
    """Gradient steps on the sum of both terms, for an anchor that is the aligned decoder. Reports the `kl`."""
    return make_step_on(partial(held, weight=weight))


def held(loss: Objective, weight: float) -> Loss:
    """The loss with the KL, both from one forward pass of the model as it is."""

    def both(params: Params, batch: dict[str, Batch], totals: dict[str, jax.Array]):
        learn, aligned = batch[LEARN], as_it_was(params)
        head, aligned_head = (tree.backbone.decoder for tree in (params, aligned))
        hidden, reference = loss.hidden(params, learn), loss.hidden(aligned, learn)
        weights = learn["weights"]
        losses = token_cross_entropy(head, hidden, learn["targets"], weights)
        # It is the model as it will be served that stays close: without the vectors that it is trained under.
        served = hidden if params.vectors is None else loss.hidden(without_vectors(params), learn)
        kl = jnp.sum(weights * token_forward_kl(head, served, aligned_head, reference, weights))
        metrics = loss.by_group(losses, learn)
        return (jnp.sum(losses * weights) + weight * kl) / totals[LEARN], metrics | {"kl": (kl, jnp.sum(weights))}

    return both
