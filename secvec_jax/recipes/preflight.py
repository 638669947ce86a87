"""What is known before a fine-tuning starts: its rows, its steps, and about how much memory and time they take."""

import collections
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from secvec_jax.config import Training
from secvec_jax.data.encoded import Examples
from secvec_jax.data.rows import Row
from secvec_jax.defenses.finetuning import examples_of, stream_and_steps, stream_of
from secvec_jax.defenses.training_settings import PHASE2, extra_batch_size
from secvec_jax.evaluation.likelihood import mean_losses
from secvec_jax.model.hub import Model
from secvec_jax.trees import num_parameters

_TIMED = 8
"""Rows whose forward pass is timed."""

_STATE_BYTES = {"sgd": 4, "adamw": 8, "adamw-bf16": 4, "adafactor": 0, "muon": 4}
"""Bytes of optimizer state per weight."""

_PASSES = 3
"""The time of a training step, in forward passes: 6N FLOPs, where a forward pass takes 2N."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a fine-tuning takes, as far as it is known before its first step.

    gigabytes: GiB of weights, gradients and optimizer state, before activations. seconds: of the fine-tuning alone,
    from the time of forward passes over a few rows, so of the right order of magnitude only.
    """

    rows: int
    tokens: int
    longest: int
    truncated: int
    duplicates: int
    steps: int
    gigabytes: float
    seconds: float

    def __str__(self) -> str:
        duration = f"{self.seconds:.0f} s" if self.seconds < 100 else f"{self.seconds / 60:.0f} min"
        cut = f", {self.truncated} of them cut" if self.truncated else ""
        return (
            f"rows: {self.rows:,} with answers, {self.tokens:,} tokens in all, {self.longest:,} in the longest{cut}; "
            f"exact duplicates: {self.duplicates:,}; fine-tuning alone: {self.steps:,} steps, roughly {duration}, "
            f"about {self.gigabytes:.1f} GiB for weights, gradients and optimizer, before activations"
        )


def estimate(
    model: Model, groups: Mapping[str, Sequence[Row]], training: Training, full: bool, extra_batch: float
) -> Estimate:
    """What fine-tuning on rows, by kind, takes. full: all weights are trained, not a task LoRA. extra_batch: the
    rows that a step reads in addition to these, as a share of the batch size (`Defense.extra_batch`). Raises UserError
    if that share of the batch cannot be had."""
    training = training.over(PHASE2)
    stream = stream_of(model, dict(groups), training)
    encoded = [group for group in stream.examples.values() if isinstance(group, Examples)]
    tokens = sum(int(group.lengths.sum()) for group in encoded)
    if extra_batch:
        extra_batch_size(training, extra_batch)
    _, steps, steps_per_epoch = stream_and_steps(stream, training)
    rows = [row for group in groups.values() for row in group]
    forward = _seconds_per_token(model, rows[:: max(1, len(rows) // _TIMED)][:_TIMED], training.max_seq_len)
    weight_bytes = 2 if training.trained_weights == "bfloat16" else 4
    per_parameter = 2 * weight_bytes + _STATE_BYTES[training.optimizer]
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(model.backbone))
    return Estimate(
        rows=len(rows),
        tokens=tokens,
        longest=max((group.longest for group in encoded), default=0),
        truncated=sum(group.truncated for group in encoded),
        duplicates=duplicates(rows),
        steps=steps,
        gigabytes=(num_parameters(model.backbone) * per_parameter if full else weight_bytes) / 2**30,
        seconds=_PASSES * (1 + extra_batch) * forward * tokens * steps / steps_per_epoch,
    )


def duplicates(rows: Sequence[Row]) -> int:
    """How many rows are exact copies of an earlier one."""
    counts = collections.Counter(json.dumps(row["messages"], sort_keys=True) for row in rows)
    return sum(count - 1 for count in counts.values())


def _seconds_per_token(model: Model, rows: Sequence[Any], length: int | None) -> float:
    """The time of a forward pass by token, compiled."""
    examples = examples_of(model, rows, length)
    mean_losses(model, examples)
    start = time.monotonic()
    mean_losses(model, examples)
    return (time.monotonic() - start) / sum(len(example.tokens) for example in examples)
