"""The sizes and switches that define a decoder's forward pass, for all families."""

import dataclasses
import math
from typing import Literal

from secvec_jax.errors import UserError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear maps of a layer, by their usual names, which adapters may change."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are scaled for long contexts.

    kind: "linear" (Chen et al. 2023) divides all frequencies by `factor`; "llama3" (Llama 3.1) divides only
    those whose wavelength exceeds `original_context / low_freq_factor` and blends in between.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Every size and switch that defines a decoder's forward pass; the defaults are Llama's."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    max_length: int = 2048
    tied_head: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    windowed: tuple[bool, ...] | None = None
    """which layers have the sliding window; None: all of them"""
    local_rope_theta: float | None = None
    """the base of layers with the sliding window, which are then not scaled; None: as in the other layers"""
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"
    """rms: RMSNorm; rms_plus_one: RMSNorm that multiplies by 1 + weight; layer: LayerNorm (Ba et al. 2016)"""
    post_norms: bool = False
    """the outputs of attention and MLP are normalized once more before they are added"""
    activation: Literal["silu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True
    """down(act(gate(x)) * up(x)), else down(act(up(x)))"""
    scaled_embedding: bool = False
    """embeddings are multiplied by the square root of the hidden size"""
    learned_positions: bool = False
    """position embeddings from a table are added, in place of rotary embeddings"""
    query_scalar: float | None = None
    """attention scores are divided by its square root; None: `head_dim`"""
    attention_softcap: float | None = None
    """c, where attention scores s become c tanh(s / c)"""
    final_softcap: float | None = None
    """c, where logits l become c tanh(l / c)"""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key-value heads evenly: "
                "check num_key_value_heads in config.json"
            )
        if self.head_dim < 1:
            raise UserError(f"{self.num_heads} attention heads are more than the hidden size of {self.hidden_size}")
        if self.head_dim % 2 and not self.learned_positions:
            raise UserError(f"head_dim {self.head_dim} is odd: rotary embeddings turn pairs of numbers")

    @property
    def projections(self) -> tuple[str, ...]:
        """Those of the `PROJECTIONS` that the layers have."""
        return tuple(projection for projection in PROJECTIONS if self.gated or projection != "gate_proj")

    def kernel_shape(self, projection: str) -> tuple[int, int]:
        """(inputs, outputs) of one of the `PROJECTIONS`."""
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden_size, query),
            "k_proj": (self.hidden_size, kv),
            "v_proj": (self.hidden_size, kv),
            "o_proj": (query, self.hidden_size),
            "gate_proj": (self.hidden_size, self.intermediate_size),
            "up_proj": (self.hidden_size, self.intermediate_size),
            "down_proj": (self.intermediate_size, self.hidden_size),
        }[projection]

    def has_bias(self, projection: str) -> bool:
        if projection in ("q_proj", "k_proj", "v_proj"):
            return self.qkv_bias
        return self.output_bias if projection == "o_proj" else self.mlp_bias


def rope_frequencies(architecture: Architecture, *, windowed: bool = False) -> list[float]:
    """The rotation per position of each of the `head_dim / 2` pairs, in radians, with scaling applied.

    windowed: for layers with the sliding window, which may have another base.
    """
    dim, scaling, theta = architecture.head_dim, architecture.rope_scaling, architecture.rope_theta
    if windowed and architecture.local_rope_theta is not None:
        theta, scaling = architecture.local_rope_theta, None
    frequencies = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return [f / scaling.factor for f in frequencies]
    return [_llama3_frequency(f, scaling) for f in frequencies]


def _llama3_frequency(frequency: float, scaling: RopeScaling) -> float:
    turns = scaling.original_context * frequency / (2 * math.pi)
    if turns < scaling.low_freq_factor:
        return frequency / scaling.factor
    if turns > scaling.high_freq_factor:
        return frequency
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - blend) * frequency / scaling.factor + blend * frequency
