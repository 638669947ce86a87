"""Validation: the loss of rows that are not trained on, measured during training, and early stopping by it.

Evaluations read the parameters and change nothing: a training with validation takes the same steps as one without.
"""

import dataclasses
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np

from secvec_jax.batch import Batch
from secvec_jax.data.pipeline import Stream
from secvec_jax.errors import UserError
from secvec_jax.sharding import shard
from secvec_jax.training.objective import LossSums, Objective
from secvec_jax.training.phase import combine
from secvec_jax.trees import Tree

EVAL_LOSS = "eval/loss"
"""The metric of all validation rows; that of each kind of rows is `eval/loss/KIND`."""


@dataclasses.dataclass(frozen=True)
class Validation:
    """The validation rows of a training, and when they are evaluated.

    objective: measures the loss as in training, under the active vectors. stream: the validation rows; each evaluation
    is one pass over them. every_steps: training steps between two evaluations; there is one after the last step too.
    patience: the number of evaluations without a new lowest loss after which the training ends; None: it never ends
    early.
    """

    objective: Objective
    stream: Stream
    every_steps: int
    patience: int | None = None

    def is_due(self, step: int) -> bool:
        """Whether the step of this number, counted from 1, is followed by an evaluation."""
        return step % self.every_steps == 0

    def evaluate(self, trained: Tree, frozen: Tree) -> LossSums:
        """{name: (sum, count)} of the losses of all validation tokens; the parameters as `Phase.split` returns them.

        Raises UserError if no token counts.
        """
        kinds = [f"loss/{name}" for name in self.objective.groups]
        sums = shard({name: (np.float32(0), np.float32(0)) for name in kinds})
        batches = self.stream.local_batches()
        for _ in range(self._num_batches):
            sums = _added(self.objective, sums, trained, frozen, batches.take(1))
        totals = jax.device_get(sums)
        total = (sum(totals[name][0] for name in kinds), sum(totals[name][1] for name in kinds))
        if not total[1] > 0:
            raise UserError("no token of the validation rows counts: all their weights are 0; give others as eval_rows")
        by_kind = {f"eval/{name}": totals[name] for name in kinds} if len(kinds) > 1 else {}
        return {EVAL_LOSS: total, **by_kind}

    @cached_property
    def _num_batches(self) -> int:
        return self.stream.count()


@partial(jax.jit, static_argnames=("objective",))
def _added(objective: Objective, sums: LossSums, trained: Tree, frozen: Tree, batch: Batch) -> LossSums:
    """The sums with those of a batch `[1, B, T]`."""
    params = combine(trained, frozen)
    part = {key: array[0] for key, array in batch.items()}
    batch_sums = objective.by_group(objective.token_losses(params, part), part)
    return shard(jax.tree.map(jnp.add, sums, batch_sums))


@dataclasses.dataclass
class EarlyStopping:
    """The lowest validation loss so far, and how many evaluations there were since. JSON, saved in checkpoints."""

    lowest: float | None = None
    since: int = 0

    def note(self, loss: float) -> bool:
        """Record an evaluation and return whether its loss is the lowest."""
        if self.lowest is None or loss < self.lowest:
            self.lowest, self.since = loss, 0
            return True
        self.since += 1
        return False
