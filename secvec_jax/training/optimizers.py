"""optax optimizers from settings."""

import re
from typing import Any

import jax
import optax

from secvec_jax.config import Training
from secvec_jax.trees import Tree

_UNDECAYED = re.compile(r"(^|[._])(bias|norm)($|[._])")
"""Norms and biases, by a part of their name."""


def make_optimizer(training: Training, steps: int) -> optax.GradientTransformation:
    """The optimizer and its schedule over `steps` steps. What `training` leaves unset is `Training.base`'s.

    Weight decay leaves norms and biases alone, as transformers' Trainer does; with sgd it is added to the gradient,
    after it is clipped, as torch's SGD does.
    """
    training = training.over(Training.base)
    warmup = min(training.warmup_steps, steps - 1)
    peak, rest = training.learning_rate, max(steps - warmup, 1)
    fall = {
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=0.1),
        "linear": optax.linear_schedule(peak, 0.1 * peak, rest),
        "constant": optax.constant_schedule(peak),
    }[training.schedule]
    # The first step already moves: a warm-up from zero would waste it.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, max(warmup, 1))
    schedule = optax.join_schedules([rise, fall], [warmup])
    if training.optimizer == "sgd":
        move = optax.sgd(schedule, momentum=training.momentum or None)
        if training.weight_decay:
            move = optax.chain(optax.add_decayed_weights(training.weight_decay, decayed), move)
    else:
        mask = decayed if training.weight_decay else None
        move = optax.adamw(schedule, weight_decay=training.weight_decay, mask=mask)
    return optax.chain(optax.clip_by_global_norm(training.clip), move) if training.clip else move


def decayed(params: Tree) -> Tree:
    """Which leaves weight decay applies to, by their names: all but norms and biases."""

    def by_name(path: tuple[Any, ...], leaf: Any) -> bool:
        names = (getattr(key, "name", getattr(key, "key", "")) for key in path)
        return not any(_UNDECAYED.search(str(name)) for name in names)

    return jax.tree_util.tree_map_with_path(by_name, params)
