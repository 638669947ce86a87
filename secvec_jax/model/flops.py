"""Model FLOPs: the one formula that a run's meter and the planner share, and the peak FLOPs of devices.

A token costs 6N + 3a where the backbone's weights are trained and 4N + 3a where they are frozen: two FLOPs per
parameter in the forward pass, two for the gradient by the activations, two for the gradient by the weights. N is the
number of parameters that a token is multiplied with; a is the forward cost of attention, 4 d L for each token that it
can see in its own row, d = heads x head_dim. A token of the benign rows in phase 1 (the stream `keep`) costs 2N + a
more: the model without vectors reads it, too. Rematerialization is not counted, nor are vectors, adapters, or the
further passes of a defense.
"""

from typing import TypeVar

import jax

from secvec_jax.model.architecture import Architecture

Number = TypeVar("Number", float, jax.Array)

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}
"""Published dense bfloat16 FLOPs per second of one device, by JAX's `device_kind`."""


def matmul_parameters(architecture: Architecture) -> int:
    """N: the parameters that a token is multiplied with; the embedding counts only as the output head."""
    a = architecture
    shapes = [a.kernel_shape(projection) for projection in a.projections]
    return a.num_layers * sum(inputs * outputs for inputs, outputs in shapes) + a.vocab_size * a.hidden_size


def forward_flops(architecture: Architecture, tokens: Number, visible: Number) -> Number:
    """2N + a over all tokens. visible: pairs of a token and one that it can see, itself included."""
    return 2.0 * matmul_parameters(architecture) * tokens + _attention_flops(architecture, visible)


def training_flops(architecture: Architecture, tokens: Number, visible: Number, full: bool) -> Number:
    """6N + 3a over all tokens, or 4N + 3a if not `full`: the backbone's weights are frozen."""
    per_parameter = 6.0 if full else 4.0
    return per_parameter * matmul_parameters(architecture) * tokens + 3.0 * _attention_flops(architecture, visible)


def _attention_flops(architecture: Architecture, visible: Number) -> Number:
    """a over all tokens: the scores and the weighted sum, two FLOPs per channel each."""
    a = architecture
    return 4.0 * a.num_heads * a.head_dim * a.num_layers * visible
