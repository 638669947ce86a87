"""What a step minimizes: cross-entropy on the rows to learn, and on benign rows the KL to the model without vectors.

    loss = CE(f(x; θ, θs), y) + λ KL( f(x'; θ, θs) || f(x'; θ) )

Parameters are two trees, `backbone` and `vectors` (see `Params`). Parts that are absent are None and cost nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from secvec_jax.batch import Batch
from secvec_jax.model.adapter import as_adapters
from secvec_jax.model.decoder import Decoder, ForwardOptions
from secvec_jax.model.layers import Remat
from secvec_jax.training.loss import group_sums, token_cross_entropy, token_kl

LEARN, KEEP = "learn", "keep"
"""The streams of a step's batch: rows to learn, and rows that the vectors must leave unchanged."""

LossSums = dict[str, tuple[jax.Array, jax.Array]]
"""Name -> (sum of losses, count), divided only when they are reported."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Backbone:
    """The language model: its weights, and the task adapter that is trained in place of them, if any."""

    decoder: Decoder
    adapter: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Params:
    """The parameters of a train step.

    vectors: an adapter, or a tuple of adapters that are active at once. anchor: a frozen tree that a defense compares
    the backbone with, such as the decoder before fine-tuning.
    """

    backbone: Backbone
    vectors: Any = None
    anchor: Any = None


TokenLosses = Callable[[jax.Array, Params, Batch], jax.Array]
"""`(losses [B, T], params, batch)` -> the values to minimize in place of the losses of the rows to learn, `[B, T]`."""


def without_vectors(params: Params) -> Params:
    """The same parameters with the vectors inactive."""
    return dataclasses.replace(params, vectors=None)


def anchor_params(params: Params) -> Params:
    """The parameters of the model whose decoder is the anchor: no adapter, no vectors, and no gradient."""
    return jax.lax.stop_gradient(Params(Backbone(params.anchor)))


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss over streams of packed batches.

    groups: names of the kinds of rows in the stream `learn`, whose losses are reported separately. kl_weight: λ, in
    nats per nat, of the stream `keep`. counted: computes the values that are minimized in place of the losses of the
    rows to learn; None: the losses. dtype: of the forward pass; losses are always float32. share_prefix: whether
    sequences may have a shared prefix.
    """

    groups: tuple[str, ...] = ("all",)
    kl_weight: float = 0.0
    counted: TokenLosses | None = None
    dtype: Any = jnp.float32
    remat: Remat = "none"
    share_prefix: bool = True

    def __call__(
        self, params: Params, batch: dict[str, Batch], totals: dict[str, jax.Array]
    ) -> tuple[jax.Array, LossSums]:
        """(loss, {name: (sum, count)}). The loss is divided by `totals`, each stream's supervised tokens in all
        micro-batches of the step, so that micro-batch losses and gradients add up to the whole batch's."""
        learn = batch[LEARN]
        losses = self.token_losses(params, learn)
        metrics = self.by_group(losses, learn)
        counted = losses if self.counted is None else self.counted(losses, params, learn)
        loss = jnp.sum(counted * learn["weights"]) / totals[LEARN]
        if KEEP in batch:
            keep = batch[KEEP]
            divergence = token_kl(
                params.backbone.decoder,
                self.hidden(params, keep),
                self.hidden(without_vectors(params), keep),
                keep["weights"],
            )
            metrics["kl"] = (jnp.sum(divergence * keep["weights"]), jnp.sum(keep["weights"]))
            loss += self.kl_weight * metrics["kl"][0] / totals[KEEP]
        return loss, metrics

    def by_group(self, losses: jax.Array, batch: Batch) -> LossSums:
        """The (sum, count) of the losses `[B, T]` of each kind of rows."""
        sums, counts = group_sums(losses, batch["weights"], batch["groups"], len(self.groups))
        return {f"loss/{name}": (sums[i], counts[i]) for i, name in enumerate(self.groups)}

    def token_losses(self, params: Params, batch: Batch) -> jax.Array:
        """Cross-entropy at each supervised token, 0 elsewhere, `[B, T]`."""
        head = params.backbone.decoder
        return token_cross_entropy(head, self.hidden(params, batch), batch["targets"], batch["weights"])

    def hidden(self, params: Params, batch: Batch) -> jax.Array:
        """Hidden states under the adapter and the vectors, `[B, T, D]`."""
        return params.backbone.decoder(
            batch["tokens"],
            batch["segments"],
            batch["positions"],
            as_adapters(params.backbone.adapter, params.vectors),
            ForwardOptions(self.dtype, self.remat, self.share_prefix),
        )
