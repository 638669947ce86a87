"""The settings of fine-tuning: their defaults, and the checks of what they say together."""

from secvec_jax.checks import SettingError
from secvec_jax.config import Training
from secvec_jax.errors import UserError
from secvec_jax.sharding import num_shards

PHASE2 = Training(learning_rate=3.6e-4, epochs=2).over(Training.base)
"""Tuned on a model of 135 million parameters. The quickstart trains for one epoch at a higher rate."""

PHASE2_LORA = Training(optimizer="adamw", learning_rate=1e-3).over(PHASE2)
"""How `protect` trains a task LoRA; docs/protect.md has the results for a model of 135 million parameters."""


def extra_batch_size(training: Training, share: float) -> int:
    """Sequences per batch of rows that a step reads in addition to the user's, given their share of the batch size.

    Raises UserError if that is not an integer, or if the mesh evenly divides the batch of the user's rows but not this
    one.
    """
    batch_size, parts = training.over(PHASE2).batch_size, num_shards("batch")
    size = share * batch_size
    sequences = f"{share:g} of a batch of {batch_size} is {size:g} sequences"
    if size < 0.5 or abs(size - round(size)) > 1e-6 * batch_size:
        raise UserError(f"{sequences}: choose a share (safe_batch) and a batch size whose product is a whole number")
    if batch_size % parts == 0 and round(size) % parts:
        raise UserError(
            f"{sequences}, which cannot be sharded over {parts} devices (data x fsdp): choose a share (safe_batch) and "
            f"a batch size whose product is a multiple of {parts}"
        )
    return round(size)


def check_trained_weights(training: Training, full: bool) -> bool:
    """Whether all weights are trained in bfloat16. Raises UserError if that is set and they are not trained."""
    in_bfloat16 = training.over(PHASE2).trained_weights == "bfloat16"
    if in_bfloat16 and not full:
        raise UserError(
            "trained_weights is 'bfloat16', which is for training all weights: a task LoRA and vectors are trained in "
            "float32; leave it out, or train all weights"
        )
    return in_bfloat16


def check_unused(training: Training, validates: bool, keeps: bool = True) -> None:
    """Raises UserError for settings without effect: of validation without validation rows, `best` without checkpoints,
    and the momentum of another optimizer than sgd."""
    for name in () if validates else ("patience", "eval_every_steps"):
        value = getattr(training.over(PHASE2), name)
        if value is not None:
            raise SettingError(
                f"training.{name}",
                f" is {value}, and no validation rows are given, so it would do nothing: leave it out, or fine-tune "
                "with validation rows (eval_rows in Python; finetune with --eval-data or --eval-fraction)",
            )
    optimizer, momentum = training.over(PHASE2).optimizer, training.over(PHASE2).momentum
    if optimizer != "sgd" and momentum not in (0, Training.base.momentum):
        raise SettingError(
            "training.momentum", f" is {momentum:g}, which is for sgd, and the optimizer is {optimizer}: leave it out"
        )
    best = training.over(PHASE2).best
    if best is not None and not keeps:
        raise SettingError(
            "training.best", f" is {best!r}, and without checkpoints only the last step is kept: pass checkpoints="
        )
