"""The train step: forward pass with both trees, gradient and update of the trained part alone.

    trained, frozen = phase.split(params)
    for micro in batch:                                     # gradient_of
        gradients += grad of loss(combine(trained, frozen), micro) with respect to trained
    updates, state = optimizer.update(gradients, state)     # step_from_gradient
    trained = trained + updates

All of it is one jitted program. The loss of a micro-batch is divided by the weights of the whole batch, so the sum of
the gradients is the gradient of the whole.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from secvec_jax.batch import Batch
from secvec_jax.sharding import device_kind, shard
from secvec_jax.training.phase import combine
from secvec_jax.trees import Tree

Metrics = dict[str, Any]
Loss = Callable[[Tree, dict[str, Batch], dict[str, jax.Array]], tuple[jax.Array, Metrics]]
Step = Callable[[Tree, Tree, Tree, dict[str, Batch]], tuple[Tree, Tree, Metrics]]

Gradient = Callable[[Tree, Tree, dict[str, Batch]], tuple[Tree, Metrics]]
"""`(trained, frozen, batch)` -> the gradient with respect to the trained part, and the metrics, `loss` among them."""


shared = lru_cache(maxsize=32)
"""Decorator for functions that make a loss, a gradient or an optimizer from settings: equal settings give the same
object, so trainings with equal settings share a train step and its compiled programs."""


class TrainStep(NamedTuple):
    """How the trained part is updated: `init(trained) -> state` and `step(trained, state, frozen, batch)`.

    takes: the streams that the step of this number, counted from 0, reads a batch of; None: all of them.
    """

    init: Callable[[Tree], Tree]
    step: Step
    takes: Callable[[int], Sequence[str]] | None = None


_COMPILER_OPTIONS = {
    # Gathers of weights and sums of gradients run alongside the products instead of before and after. For other
    # TPUs the compiler refuses this (libtpu 0.0.50) and says that results may be wrong.
    "TPU v5 lite": {
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
        "xla_tpu_overlap_compute_collective_tc": True,
        "xla_enable_async_all_gather": True,
    }
}


def make_train_step(loss: Loss, optimizer: optax.GradientTransformation) -> TrainStep:
    """One step of `optimizer` (see `Phase.optimizer`) along the gradient of `loss` per batch: `step_from_gradient`."""
    return step_from_gradient(gradient_of(loss), optimizer)


def step_from_gradient(gradient: Gradient, optimizer: optax.GradientTransformation) -> TrainStep:
    """One step of `optimizer` along `gradient` per batch, jitted.

    Trainings with the same gradient and the same `optimizer.update` (see `shared` and `make_optimizer`) share the step
    and its compiled programs.

    step: `(trained, state, frozen, batch) -> (trained, state, metrics)`; trained and frozen are the parameters as
    `Phase.split` separates them, the state is the optimizer's for the trained part; trained and state are donated.
    batch: {stream: packed arrays `[A, B, T]`}, A micro-batches whose gradients are summed before the one update.
    metrics: sums and counts by name, `loss`, `grad_norm`.
    """
    return _shared_train_step(gradient, optimizer, device_kind())


@shared
def _shared_train_step(gradient: Gradient, optimizer: optax.GradientTransformation, device_kind: str) -> TrainStep:
    init = jax.jit(lambda trained: shard(optimizer.init(trained)))
    return TrainStep(init, _shared_step(gradient, optimizer.update, device_kind))


@shared
def _shared_step(gradient: Gradient, update: Callable[..., tuple[Tree, Tree]], device_kind: str) -> Step:
    @partial(jax.jit, donate_argnums=(0, 1), compiler_options=_COMPILER_OPTIONS.get(device_kind))
    def step(trained: Tree, state: Tree, frozen: Tree, batch: dict[str, Batch]) -> tuple[Tree, Tree, Metrics]:
        check_batch(batch)
        gradients, metrics = gradient(trained, frozen, batch)
        gradients = shard(gradients)
        updates, state = update(gradients, state, trained)
        metrics |= {"grad_norm": optax.tree.norm(_in_float32(gradients))}
        return shard(optax.apply_updates(trained, updates)), shard(state), shard(metrics)

    return step


def check_batch(batch: dict[str, Batch]) -> None:
    """Raises AssertionError, when a step is traced, unless the arrays of each stream have one shape `[A, B, T]`, and A
    is the same in all streams."""
    for part in batch.values():
        chex.assert_rank(list(part.values()), 3)
        chex.assert_equal_shape(list(part.values()))
    chex.assert_equal_shape_prefix(jax.tree.leaves(batch), 1)


def alternate(train_steps: Sequence[TrainStep], choose: Callable[[int], int]) -> TrainStep:
    """Several train steps with one optimizer state: step number n, counted from 0, is that of `choose(n)`."""

    def init(trained: Tree) -> Tree:
        return {"step": shard(jnp.int32(0)), "optimizer": train_steps[0].init(trained)}

    def step(trained: Tree, state: Tree, frozen: Tree, batch: dict[str, Batch]) -> tuple[Tree, Tree, Metrics]:
        train_step = train_steps[choose(int(state["step"]))]
        trained, optimizer, metrics = train_step.step(trained, state["optimizer"], frozen, batch)
        return trained, {"step": state["step"] + 1, "optimizer": optimizer}, metrics

    return TrainStep(init, step)


@shared
def gradient_of(loss: Loss) -> Gradient:
    """The gradient of `loss` over all micro-batches of a batch."""

    def of_batch(trained: Tree, frozen: Tree, batch: dict[str, Batch]) -> tuple[Tree, Metrics]:
        check_batch(batch)
        totals = {stream: jnp.maximum((part["weights"] > 0).sum(), 1.0) for stream, part in batch.items()}

        def gradient(micro: dict[str, Batch]) -> tuple[Tree, tuple[jax.Array, Metrics]]:
            def objective(trained: Tree) -> tuple[jax.Array, Metrics]:
                return loss(combine(trained, frozen), micro, totals)

            (value, metrics), gradients = jax.value_and_grad(objective, has_aux=True)(trained)
            return gradients, (value, metrics)

        gradients, (value, metrics) = _summed(gradient, batch)
        return gradients, metrics | {"loss": value}

    return of_batch


def _summed(function: Callable[[Any], Tree], batch: dict[str, Batch]) -> Tree:
    """The sum of `function` over the leading axis of the batch; no loop where there is one micro-batch."""
    count = jax.tree.leaves(batch)[0].shape[0]
    first = function(jax.tree.map(lambda x: x[0], batch))
    if count == 1:
        return first
    first = _in_float32(first)

    def add(total: Tree, micro: dict[str, Batch]) -> tuple[Tree, None]:
        return jax.tree.map(jnp.add, total, function(micro)), None

    return jax.lax.scan(add, first, jax.tree.map(lambda x: x[1:], batch))[0]


def _in_float32(tree: Tree) -> Tree:
    """The tree with bfloat16 gradients widened."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf, tree)
