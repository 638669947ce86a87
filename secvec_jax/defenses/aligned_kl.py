"""KL to the aligned model, a baseline of Vaccine (Huang et al. 2024, arXiv 2402.01109): on the user's rows, the model
stays close to what the aligned model would say.

    min_w  L(w) + λ KL( p_aligned || p_w )

Both terms are means over the supervised tokens of the user's batch, and the KL is between the distributions of the
next token, over the vocabulary. The published code means the same, but takes its softmax over dimension 1 of logits
`[batch, position, vocabulary]`, that is over positions, including prompt and padding, and sums over a row instead of
averaging over tokens. Its λ (1e-3; 0.1 in its script) is therefore not comparable to ours.

Under active security vectors (`AnchoredVectors`, ours) the KL is that of the model without the vectors.

Acts in fine-tuning. Each batch costs one more forward pass without gradients and twice the work in the output head;
where all weights are trained, training also keeps a copy of the decoder.
"""

import dataclasses
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from secvec_jax.batch import Batch
from secvec_jax.checks import NonNegativeFloat, PositiveInt, checked
from secvec_jax.defenses.base import Defended, Defense, DefenseInputs, lora_of_rank
from secvec_jax.defenses.finetuning import FinetuneOptions, TrainStepMaker, make_step_on, train_model
from secvec_jax.model.adapter import Adapter
from secvec_jax.model.hub import Model
from secvec_jax.training.loss import token_cross_entropy, token_forward_kl
from secvec_jax.training.objective import LEARN, Objective, Params, anchor_params, without_vectors
from secvec_jax.training.step import Loss, shared


@checked
@dataclasses.dataclass(frozen=True)
class AlignedKL(Defense):
    """Fine-tuning with a KL penalty to the aligned model on the user's rows."""

    name = "kl"
    stage = "fine-tuning"
    cost = "1 more forward pass per step; a copy of the weights"
    source = "baseline of Vaccine"

    weight: NonNegativeFloat = 1.0
    """λ, weight of the KL"""

    def apply(self, inputs: DefenseInputs) -> Defended:
        return Defended(finetune(inputs.aligned, inputs.rows, weight=self.weight, **inputs.options))


@checked
@dataclasses.dataclass(frozen=True)
class AnchoredVectors(Defense):
    """Fine-tuning under security vectors, with a KL penalty to the aligned model without them."""

    name = "anchored vectors"
    stage = "fine-tuning"
    needs = ("security vectors",)
    cost = "training the vectors, once; 2 more forward passes per step"
    source = "ours: security vectors, and a KL to the aligned model without them"

    weight: NonNegativeFloat = 1.0
    """λ, weight of the KL"""
    rank: PositiveInt = 8
    """rank of the vectors"""

    def apply(self, inputs: DefenseInputs) -> Defended:
        vectors = inputs.vectors(lora_of_rank(self.rank))
        return Defended(finetune(inputs.aligned, inputs.rows, weight=self.weight, vectors=vectors, **inputs.options))


@checked
def finetune(
    model: Model,
    rows: Any,
    *,
    weight: NonNegativeFloat = 0.1,
    vectors: Adapter | tuple[Adapter, ...] | None = None,
    **options: Unpack[FinetuneOptions],
) -> Model:
    """The model fine-tuned on `rows`, with a KL penalty to `model` without `task` and `vectors`. weight: λ."""
    return train_model(model, rows, anchor=model.backbone, make_step=aligned_kl(weight), vectors=vectors, **options)


@checked
def aligned_kl(weight: NonNegativeFloat = 0.1) -> TrainStepMaker:
    """Gradient steps on the sum of both terms, for an anchor that is the aligned decoder. Reports the `kl`."""
    return make_step_on(partial(with_aligned_kl, weight=weight))


@shared
def with_aligned_kl(loss: Objective, weight: float) -> Loss:
    """The loss plus the KL, both from the same forward pass of the trained model."""

    def total(params: Params, batch: dict[str, Batch], totals: dict[str, jax.Array]):
        learn, aligned = batch[LEARN], anchor_params(params)
        head, aligned_head = (tree.backbone.decoder for tree in (params, aligned))
        hidden, reference = loss.hidden(params, learn), loss.hidden(aligned, learn)
        weights = learn["weights"]
        losses = token_cross_entropy(head, hidden, learn["targets"], weights)
        # The model stays close as it will be served: without the vectors that it is trained under.
        served = hidden if params.vectors is None else loss.hidden(without_vectors(params), learn)
        kl = jnp.sum(weights * token_forward_kl(head, served, aligned_head, reference, weights))
        metrics = loss.by_group(losses, learn)
        return (jnp.sum(losses * weights) + weight * kl) / totals[LEARN], metrics | {"kl": (kl, jnp.sum(weights))}

    return total
