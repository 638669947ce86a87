"""What a step minimizes: cross-entropy on the rows to learn, and KL to the vector-less model on rows to keep.

    loss = CE(f(x; θ, θs), y) + λ KL( f(x'; θ, θs) || f(x'; θ) )

The parameters are `{"backbone": {"decoder", "adapter"}, "vectors"}`: the two trees of the method, the backbone
with room for a task adapter beside its weights. Absent parts are None and cost nothing.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from secvec_jax.batch import Batch
from secvec_jax.model.decoder import Decoder, Remat
from secvec_jax.training.loss import group_sums, token_cross_entropy, token_kl

LEARN, KEEP = "learn", "keep"
"""The streams of a step's batch: rows to learn, rows on which the vectors must not show."""

Params = dict[str, Any]


def parameters(decoder: Decoder, adapter: Any = None, vectors: Any = None) -> Params:
    """The parameter tree of a step."""
    return {"backbone": {"decoder": decoder, "adapter": adapter}, "vectors": vectors}


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss over streams of packed batches.

    groups: names of the kinds of rows in the stream `learn`, whose losses are reported apart.
    kl_weight: λ, in nats per nat, of the stream `keep`. floor: a token whose loss is already below `floor` nats
    gives no gradient. dtype: what the forward pass computes in; losses are float32 always. shared: whether lines have
    a shared beginning.
    """

    groups: tuple[str, ...] = ("all",)
    kl_weight: float = 0.0
    floor: float = 0.0
    dtype: Any = jnp.float32
    remat: Remat = "none"
    shared: bool = True

    def __call__(
        self, params: Params, batch: dict[str, Batch], totals: dict[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
        """(loss, {name: (sum, count)}). The loss is divided by `totals`, each stream's supervised tokens in all
        micro-batches of the step, so that micro-batch losses and gradients add up to the whole batch's."""
        learn = batch[LEARN]
        losses = token_cross_entropy(
            params["backbone"]["decoder"], self._hidden(params, learn, True), learn["targets"], learn["weights"]
        )
        sums, counts = group_sums(losses, learn["weights"], learn["groups"], len(self.groups))
        metrics = {f"loss/{name}": (sums[i], counts[i]) for i, name in enumerate(self.groups)}
        kept = losses * (losses > self.floor) if self.floor else losses
        loss = jnp.sum(kept * learn["weights"]) / totals[LEARN]
        if KEEP in batch:
            keep = batch[KEEP]
            divergence = token_kl(
                params["backbone"]["decoder"],
                self._hidden(params, keep, True),
                self._hidden(params, keep, False),
                keep["weights"],
            )
            metrics["kl"] = (jnp.sum(divergence * keep["weights"]), jnp.sum(keep["weights"]))
            loss += self.kl_weight * metrics["kl"][0] / totals[KEEP]
        return loss, metrics

    def _hidden(self, params: Params, batch: Batch, with_vectors: bool) -> jax.Array:
        vectors = params["vectors"] if with_vectors else None
        guests = (params["backbone"]["adapter"], vectors)
        hidden, _ = params["backbone"]["decoder"](
            batch["tokens"],
            batch["segments"],
            batch["positions"],
            tuple(guest for guest in guests if guest is not None),
            dtype=self.dtype,
            remat=self.remat,
            shared=self.shared,
        )
        return hidden
