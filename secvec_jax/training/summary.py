"""The summary of a training, a few lines that are logged when it starts."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from secvec_jax.data.chat import Example
from secvec_jax.data.encoded import Examples
from secvec_jax.data.pipeline import Stream
from secvec_jax.model.adapter import as_adapters
from secvec_jax.model.attention import PATHS, attention_path
from secvec_jax.model.layers import adapter_prefix_len
from secvec_jax.training.objective import Params
from secvec_jax.training.phase import Phase
from secvec_jax.trees import num_parameters


def summary(
    stream: Stream, grad_accum_steps: int, steps: int, steps_per_epoch: float, params: Params, phase: Phase, dtype: Any
) -> str:
    """The tokens, steps, trained parameters, devices, precision and attention of a training, as text.

    dtype: of the forward pass.
    """
    tokens = sum(_tokens(examples) for examples in stream.examples.values())
    sequences = math.ceil(steps_per_epoch * grad_accum_steps * stream.batch_size)
    trained, _ = phase.split(params)
    vectors = num_parameters(params.vectors)
    if vectors == 0:
        active = "none"
    else:
        active = f"{vectors:,} parameters, {'trained' if num_parameters(trained.vectors) else 'frozen'}"
    kinds = [device.device_kind for device in jax.devices()]
    decoder = params.backbone.decoder
    path = attention_path(
        stream.seq_len,
        decoder.architecture.head_dim,
        dtype,
        shared_prefix=stream.share_prefix,
        prefix_len=adapter_prefix_len(as_adapters(params.backbone.adapter, params.vectors)),
    )
    devices = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in sorted(set(kinds)))
    accumulated = f" x {grad_accum_steps} accumulated" if grad_accum_steps > 1 else ""
    return "\n".join([
        f"tokens: {tokens:,}, in about {sequences:,} packed sequences of {stream.seq_len}",
        f"steps: {steps:,}, {steps / steps_per_epoch:.2g} epochs, each of {stream.batch_size} packed sequences "
        f"(on all devices together){accumulated}, about {stream.num_rows / steps_per_epoch:.0f} rows",
        f"trained: {num_parameters(trained):,} of {num_parameters(params):,} parameters; active vectors: {active}",
        f"devices: {devices}; precision: {np.dtype(dtype).name}",
        f"attention: {PATHS[path]}",
    ])  # fmt: skip


def _tokens(examples: Sequence[Example]) -> int:
    if isinstance(examples, Examples):
        return int(examples.lengths.sum(dtype=np.int64))
    return sum(len(example.tokens) for example in examples)
