"""optax optimizers from settings."""

import optax

from secvec_jax.config import Training


def make_optimizer(training: Training, steps: int) -> optax.GradientTransformation:
    """The optimizer and its schedule over `steps` steps."""
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
    else:
        move = optax.adamw(schedule, weight_decay=training.weight_decay)
    return optax.chain(optax.clip_by_global_norm(training.clip), move) if training.clip else move
