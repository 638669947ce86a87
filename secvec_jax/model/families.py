"""The supported model families, and how Hugging Face and GGUF name their weights.

All families are one decoder with a few switches. An `Architecture` holds the values of the switches, and the rest of
the library sees only it, never a family's name. To add a family, add an entry to `FAMILIES`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from secvec_jax.model.architecture import Architecture

_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "max_length": "max_position_embeddings",
    "tied_head": "tie_word_embeddings",
}
_BIASES = {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}
_CAPS = {
    "query_scalar": "query_pre_attn_scalar",
    "attention_softcap": "attn_logit_softcapping",
    "final_softcap": "final_logit_softcapping",
}
_LAYER = "model.layers.{}."
_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
_MODULES = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "layers.attention_norm": _LAYER + "input_layernorm",
    "layers.mlp_norm": _LAYER + "post_attention_layernorm",
    "layers.q_norm": _LAYER + "self_attn.q_norm",
    "layers.k_norm": _LAYER + "self_attn.k_norm",
    **{f"layers.{projection}": f"{_LAYER}self_attn.{projection}" for projection in _ATTENTION},
    **{f"layers.{projection}": f"{_LAYER}mlp.{projection}" for projection in _MLP},
}
_SANDWICH = {
    "layers.attention_post_norm": _LAYER + "post_attention_layernorm",
    "layers.mlp_norm": _LAYER + "pre_feedforward_layernorm",
    "layers.mlp_post_norm": _LAYER + "post_feedforward_layernorm",
}
_OPT = "model.decoder."
_OPT_LAYER = _OPT + "layers.{}."


@dataclasses.dataclass(frozen=True)
class Family:
    """How a family differs from Llama without biases, the default of all fields but the first."""

    hf_class: str
    """its class in transformers"""
    keys: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    """`Architecture` field -> its entry in config.json, None if it has none; the other fields have Llama's entries"""
    modules: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """part of the decoder -> its module in transformers; the other parts have Llama's modules"""
    switches: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """`Architecture` field -> its value in all models of the family"""
    needs: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"hidden_act": "silu"})
    """entry of config.json -> the only value of it that the decoder implements"""
    ignored: tuple[str, ...] = ()
    """entries of config.json that the class in transformers does not read"""
    windows: Literal["by layer", "all layers", "none"] = "none"
    """which layers have the sliding window: those that `layer_types` names, all, or none"""
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """module in transformers -> the projections that it computes in one product, in the order of its outputs"""

    @property
    def entries(self) -> dict[str, str]:
        """`Architecture` field -> entry of config.json."""
        return {field: key for field, key in {**_KEYS, **self.keys}.items() if key is not None}

    @property
    def unread(self) -> set[str]:
        """Llama's entries of config.json that this family has under another name, or does not have."""
        return {key for field, key in _KEYS.items() if field in self.keys and self.keys[field] != key}


_GEMMA = {"norm": "rms_plus_one", "post_norms": True, "activation": "gelu_tanh", "scaled_embedding": True}
_GEMMA_NEEDS = {"hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": False}

FAMILIES = {
    "llama": Family("LlamaForCausalLM", keys={**_BIASES, "mlp_bias": "mlp_bias"}),
    "mistral": Family("MistralForCausalLM", windows="all layers"),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        switches={"qkv_bias": True},
        windows="by layer",
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        keys=_BIASES,
        switches={"qk_norm": True},
        windows="by layer",
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        keys={**_BIASES, **_CAPS},
        modules=_SANDWICH,
        switches=_GEMMA,
        needs=_GEMMA_NEEDS,
        ignored=("hidden_act",),
        windows="by layer",
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        keys={**_BIASES, **_CAPS, "local_rope_theta": "rope_local_base_freq"},
        modules=_SANDWICH,
        switches={**_GEMMA, "qk_norm": True},
        needs=_GEMMA_NEEDS,
        ignored=("hidden_act", "sliding_window_pattern", "_sliding_window_pattern"),
        windows="by layer",
    ),
    "opt": Family(
        "OPTForCausalLM",
        keys={
            "intermediate_size": "ffn_dim",
            **dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias"), "enable_bias"),
            **dict.fromkeys(("num_kv_heads", "head_dim", "norm_eps")),
        },
        modules={
            "embed": _OPT + "embed_tokens",
            "position_embed": _OPT + "embed_positions",
            "final_norm": _OPT + "final_layer_norm",
            "layers.attention_norm": _OPT_LAYER + "self_attn_layer_norm",
            "layers.mlp_norm": _OPT_LAYER + "final_layer_norm",
            **{
                f"layers.{projection}": f"{_OPT_LAYER}self_attn.{projection}"
                for projection in ("q_proj", "k_proj", "v_proj")
            },
            "layers.o_proj": _OPT_LAYER + "self_attn.out_proj",
            "layers.up_proj": _OPT_LAYER + "fc1",
            "layers.down_proj": _OPT_LAYER + "fc2",
        },
        switches={"norm": "layer", "norm_eps": 1e-5, "activation": "relu", "gated": False, "learned_positions": True},
        needs={
            "activation_function": "relu",
            "do_layer_norm_before": True,
            "layer_norm_elementwise_affine": True,
            "_remove_final_layer_norm": False,
        },
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        windows="all layers",
        fused={
            _LAYER + "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
            _LAYER + "mlp.gate_up_proj": ("gate_proj", "up_proj"),
        },
    ),
}
"""Family by the `model_type` of config.json."""


@dataclasses.dataclass(frozen=True)
class WeightName:
    """Where a checkpoint stores one array of the decoder.

    hf, gguf: the weight's names in Hugging Face folders and GGUF files.
    layered: whether the array is stacked over layers; the names then have `{}` in place of the layer's number.
    transpose: whether the checkpoint stores `[outputs, inputs]` where the decoder has `[inputs, outputs]`.
    rows: (start, end, total), where the array is only rows start to end of a fused weight; None: the whole weight.
    """

    hf: str
    gguf: str = ""
    layered: bool = True
    transpose: bool = False
    rows: tuple[int, int, int] | None = None


_GGUF = {
    "embed": "token_embd",
    "final_norm": "output_norm",
    "head": "output",
    "layers.attention_norm": "blk.{}.attn_norm",
    "layers.attention_post_norm": "blk.{}.post_attention_norm",
    "layers.mlp_norm": "blk.{}.ffn_norm",
    "layers.mlp_post_norm": "blk.{}.post_ffw_norm",
    "layers.q_norm": "blk.{}.attn_q_norm",
    "layers.k_norm": "blk.{}.attn_k_norm",
    "layers.q_proj": "blk.{}.attn_q",
    "layers.k_proj": "blk.{}.attn_k",
    "layers.v_proj": "blk.{}.attn_v",
    "layers.o_proj": "blk.{}.attn_output",
    "layers.gate_proj": "blk.{}.ffn_gate",
    "layers.up_proj": "blk.{}.ffn_up",
    "layers.down_proj": "blk.{}.ffn_down",
}


def weight_names(architecture: Architecture) -> dict[str, WeightName]:
    """Where a checkpoint stores each array of the decoder, by its `leaf_name` ("layers.q_proj.kernel")."""
    a, family = architecture, FAMILIES[architecture.family]
    modules = {**_MODULES, **family.modules}
    names = {}

    def add(leaf: str, part: str, of: str = "weight", **place: Any) -> None:
        gguf = f"{_GGUF[part]}.{of}" if part in _GGUF else ""
        names[leaf] = WeightName(f"{modules[part]}.{of}", gguf, layered=part.startswith("layers."), **place)

    add("embed", "embed")
    if a.learned_positions:
        add("position_embed", "position_embed")
    if not a.tied_head:
        add("head", "head", transpose=True)
    norms = ["final_norm", "layers.attention_norm", "layers.mlp_norm"]
    norms += ["layers.attention_post_norm", "layers.mlp_post_norm"] if a.post_norms else []
    for norm in norms:
        add(norm, norm)
        if a.norm == "layer":
            add(f"{norm}_bias", norm, "bias")
    for norm in ("layers.q_norm", "layers.k_norm") if a.qk_norm else ():
        add(norm, norm)
    for projection in a.projections:
        place: dict[str, Any] = {}
        for module, projections in family.fused.items():
            if projection in projections:
                ends = [sum(a.kernel_shape(s)[1] for s in projections[:count]) for count in range(len(projections) + 1)]
                number = projections.index(projection)
                place, modules[f"layers.{projection}"] = {"rows": (ends[number], ends[number + 1], ends[-1])}, module
        add(f"layers.{projection}.kernel", f"layers.{projection}", transpose=True, **place)
        if a.has_bias(projection):
            add(f"layers.{projection}.bias", f"layers.{projection}", "bias", **place)
    return names


def members(name: WeightName, architecture: Architecture) -> list[str]:
    """The checkpoint's names of a leaf's weights, one per layer."""
    return [name.hf.format(layer) for layer in range(architecture.num_layers)] if name.layered else [name.hf]
