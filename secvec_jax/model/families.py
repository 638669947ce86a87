"""What the supported families differ in, and how Hugging Face and GGUF name their weights.

Llama 2/3.x, Mistral, Qwen2/2.5, Qwen3 and SmolLM2 are one decoder with a few switches. An `Architecture`
is the values of these switches; everything above this file sees only it, never a family's name.
"""

import dataclasses
import math
from typing import Any, Literal

from secvec_jax.errors import UserError

SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear maps of a layer, by their usual names; guests are asked at each of them."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts.

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
    """Every number and switch that fixes a decoder's forward pass."""

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

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key-value heads evenly: "
                "check num_key_value_heads in config.json"
            )

    def site_shape(self, site: str) -> tuple[int, int]:
        """(inputs, outputs) of one of the `SITES`."""
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden_size, query),
            "k_proj": (self.hidden_size, kv),
            "v_proj": (self.hidden_size, kv),
            "o_proj": (query, self.hidden_size),
            "gate_proj": (self.hidden_size, self.intermediate_size),
            "up_proj": (self.hidden_size, self.intermediate_size),
            "down_proj": (self.intermediate_size, self.hidden_size),
        }[site]

    def has_bias(self, site: str) -> bool:
        if site in ("q_proj", "k_proj", "v_proj"):
            return self.qkv_bias
        return self.output_bias if site == "o_proj" else self.mlp_bias


FAMILIES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
            "qwen3": "Qwen3ForCausalLM"}  # fmt: skip


def from_hf_config(config: dict[str, Any]) -> Architecture:
    """The architecture that a Hugging Face config.json describes, old and new (transformers 5) spellings.

    Raises UserError for a family, rope scaling, activation or window layout that the decoder does not have,
    and for missing or malformed entries.
    """
    try:
        return _from_hf_config(config)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"config.json lacks or misstates {error}: fetch the model again") from error


def _from_hf_config(config: dict[str, Any]) -> Architecture:
    family = config.get("model_type", "")
    if family not in FAMILIES:
        raise UserError(f"model family {family or 'unknown'!r} is not supported: use one of {', '.join(FAMILIES)}")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"activation {config['hidden_act']!r} is not supported: the decoder's MLP is SiLU-gated")
    heads = config["num_attention_heads"]
    attention_bias = bool(config.get("attention_bias", False))
    theta, scaling = _rope(config)
    return Architecture(
        family=family,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        max_length=config.get("max_position_embeddings", 2048),
        tied_head=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias or family == "qwen2",
        output_bias=attention_bias and family in ("llama", "qwen3"),
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        sliding_window=_window(config, family),
    )


def _rope(config: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return float(theta), None
    if kind == "linear":
        return float(theta), RopeScaling("linear", float(rope["factor"]))
    if kind == "llama3":
        return float(theta), RopeScaling(
            "llama3",
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    raise UserError(f"rope scaling {kind!r} is not supported: use a model with default, linear or llama3 scaling")


def _window(config: dict[str, Any], family: str) -> int | None:
    if family == "llama" or not config.get("use_sliding_window", family == "mistral"):
        return None
    kinds = set(config.get("layer_types") or ["sliding_attention"])
    if "layer_types" not in config and family != "mistral":
        first, layers = config.get("max_window_layers", 28), config["num_hidden_layers"]
        kinds = {"sliding_attention" if i >= first else "full_attention" for i in range(layers)}
    if len(kinds) > 1:
        raise UserError("layers that mix sliding and full attention are not supported: set use_sliding_window=false")
    return config.get("sliding_window") if kinds == {"sliding_attention"} else None


def to_hf_config(architecture: Architecture, extra: dict[str, Any]) -> dict[str, Any]:
    """The config.json of an exported model; `extra` adds what the forward pass does not need (token ids)."""
    a = architecture
    config: dict[str, Any] = {
        "architectures": [FAMILIES[a.family]],
        "model_type": a.family,
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.intermediate_size,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_heads,
        "head_dim": a.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": a.norm_eps,
        "max_position_embeddings": a.max_length,
        "tie_word_embeddings": a.tied_head,
        "rope_theta": a.rope_theta,
        "attention_bias": a.qkv_bias and a.family != "qwen2",
        "mlp_bias": a.mlp_bias,
        "dtype": "float32",
    }
    if a.family != "llama":
        config |= {"sliding_window": a.sliding_window, "use_sliding_window": a.sliding_window is not None}
    if a.sliding_window is not None and a.family != "mistral":
        config |= {"max_window_layers": 0}
    if a.rope_scaling is not None:
        scaling = a.rope_scaling
        config["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            config["rope_scaling"] |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_context,
            }
    return config | extra


@dataclasses.dataclass(frozen=True)
class WeightName:
    """Where one leaf of the decoder lies in a checkpoint.

    layered: whether `hf` and `gguf` hold a `{}` for the layer number, the leaf being a stack over layers.
    transpose: whether the checkpoint keeps `[outputs, inputs]` where the decoder keeps `[inputs, outputs]`.
    """

    hf: str
    gguf: str
    layered: bool = True
    transpose: bool = False


_GGUF_SITES = dict(zip(SITES, ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")))


def weight_names(architecture: Architecture) -> dict[str, WeightName]:
    """Decoder leaf path ("layers.q_proj.kernel") -> its place in a checkpoint, for all leaves."""
    names = {
        "embed": WeightName("model.embed_tokens.weight", "token_embd.weight", layered=False),
        "final_norm": WeightName("model.norm.weight", "output_norm.weight", layered=False),
        "layers.attention_norm": WeightName("model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight"),
        "layers.mlp_norm": WeightName("model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight"),
    }
    if not architecture.tied_head:
        names["head"] = WeightName("lm_head.weight", "output.weight", layered=False, transpose=True)
    if architecture.qk_norm:
        for which in ("q", "k"):
            names[f"layers.{which}_norm"] = WeightName(
                f"model.layers.{{}}.self_attn.{which}_norm.weight", f"blk.{{}}.attn_{which}_norm.weight"
            )
    for site in SITES:
        block = "self_attn" if site in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
        hf, gguf = f"model.layers.{{}}.{block}.{site}", f"blk.{{}}.{_GGUF_SITES[site]}"
        names[f"layers.{site}.kernel"] = WeightName(f"{hf}.weight", f"{gguf}.weight", transpose=True)
        if architecture.has_bias(site):
            names[f"layers.{site}.bias"] = WeightName(f"{hf}.bias", f"{gguf}.bias")
    return names


def rope_frequencies(architecture: Architecture) -> list[float]:
    """The rotation per position of each of the `head_dim / 2` pairs, in radians, scaling applied."""
    dim, scaling = architecture.head_dim, architecture.rope_scaling
    frequencies = [architecture.rope_theta ** (-2 * i / dim) for i in range(dim // 2)]
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
