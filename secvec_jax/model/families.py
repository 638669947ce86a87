"""What the supported families differ in, and how Hugging Face and GGUF name their weights.

All of them are one decoder with a few switches. An `Architecture` is the values of these switches; everything above
this file sees only it, never a family's name. A family is a row of the table `FAMILIES`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from secvec_jax.errors import UserError
from secvec_jax.model.architecture import Architecture, RopeScaling

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
_SIZES = tuple(_KEYS)[:7]
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
    **{f"layers.{site}": f"{_LAYER}self_attn.{site}" for site in _ATTENTION},
    **{f"layers.{site}": f"{_LAYER}mlp.{site}" for site in _MLP},
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
    """How a family differs from the plainest one, Llama without biases.

    hf_class: its class in transformers. keys: `Architecture` field -> entry of config.json, None where it has none;
    modules: the decoder's part -> module in transformers; both beside or in place of Llama's. switches: what its
    architecture always has.
    needs: entries of config.json that the decoder knows at one value only. defaults: entries where it has none.
    windowed: whether a layer has the sliding window where `layer_types` does not tell; None: no layer ever has it.
    fused: module -> the sites whose outputs it computes in one product, in this order.
    """

    hf_class: str
    keys: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    modules: Mapping[str, str] = dataclasses.field(default_factory=dict)
    switches: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    needs: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"hidden_act": "silu"})
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    windowed: Callable[[dict[str, Any], int], bool] | None = None
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @property
    def entries(self) -> dict[str, str]:
        """`Architecture` field -> entry of config.json."""
        return {field: key for field, key in {**_KEYS, **self.keys}.items() if key is not None}


_QWEN_DEFAULTS = {"use_sliding_window": False, "max_window_layers": 28}
_GEMMA = {"norm": "rms_plus_one", "post_norms": True, "activation": "gelu_tanh", "scaled_embedding": True}
_GEMMA_NEEDS = {"hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": False}
_GEMMA_DEFAULTS = {"tie_word_embeddings": True, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096}


def _from_max_window_layers(config: dict[str, Any], layer: int) -> bool:
    return layer >= config["max_window_layers"]


FAMILIES = {
    "llama": Family("LlamaForCausalLM", keys={**_BIASES, "mlp_bias": "mlp_bias"}),
    "mistral": Family("MistralForCausalLM", windowed=lambda config, layer: True),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        switches={"qkv_bias": True},
        defaults=_QWEN_DEFAULTS,
        windowed=_from_max_window_layers,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        keys=_BIASES,
        switches={"qk_norm": True},
        defaults=_QWEN_DEFAULTS,
        windowed=_from_max_window_layers,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        keys={**_BIASES, **_CAPS},
        modules=_SANDWICH,
        switches=_GEMMA,
        needs=_GEMMA_NEEDS,
        defaults={**_GEMMA_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        windowed=lambda config, layer: layer % 2 == 0,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        keys={**_BIASES, **_CAPS, "local_rope_theta": "rope_local_base_freq"},
        modules=_SANDWICH,
        switches={**_GEMMA, "qk_norm": True},
        needs=_GEMMA_NEEDS,
        defaults={**_GEMMA_DEFAULTS, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6},
        windowed=lambda config, layer: (layer + 1) % config["sliding_window_pattern"] != 0,
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
            **{f"layers.{site}": f"{_OPT_LAYER}self_attn.{site}" for site in ("q_proj", "k_proj", "v_proj")},
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
        defaults={"enable_bias": True, "tie_word_embeddings": True},
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        needs={"hidden_act": "silu", "partial_rotary_factor": 1.0},
        windowed=lambda config, layer: True,
        fused={
            _LAYER + "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
            _LAYER + "mlp.gate_up_proj": ("gate_proj", "up_proj"),
        },
    ),
}
"""By the `model_type` of config.json."""


def from_hf_config(config: dict[str, Any]) -> Architecture:
    """The architecture that a Hugging Face config.json describes, old and new (transformers 5) spellings.

    Raises UserError for a family, rope scaling or activation that the decoder does not have, and for missing or
    malformed entries.
    """
    try:
        return _from_hf_config(config)
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"config.json lacks or misstates {error}: fetch the model again") from error


def _from_hf_config(config: dict[str, Any]) -> Architecture:
    name = config.get("model_type") or "unknown"
    if name not in FAMILIES:
        raise UserError(f"model family {name!r} is not supported: use one of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    config = {**family.defaults, **_flat(config)}
    for key, value in family.needs.items():
        if config.get(key) not in (None, value):
            raise UserError(f"{key} {config[key]!r} is not supported: the decoder's {name} has {value!r}")
    found = {field: config[key] for field, key in family.entries.items() if config.get(key) is not None}
    theta, scaling = _rope(config)
    for field in _SIZES:
        if not isinstance(size := found.get(field, 1), int) or isinstance(size, bool) or size < 1:
            raise UserError(f"{family.entries[field]} is {size!r} in config.json: it is a whole number, 1 or more")
    heads = found["num_heads"]
    window, windowed = _windows(config, family)
    return Architecture(
        **{
            "family": name,
            "num_kv_heads": heads,
            "head_dim": found["hidden_size"] // heads,
            "norm_eps": 1e-6,
            "rope_theta": theta,
            "rope_scaling": scaling,
            "sliding_window": window,
            "windowed": windowed,
            **found,
            **family.switches,
        }
    )


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings by kind of layer (transformers 5) as those of the full layers and the others' base."""
    by_kind = config.get("rope_parameters") or {}
    if "full_attention" not in by_kind:
        return config
    local = by_kind.get("sliding_attention") or {}
    if local.get("rope_type", "default") != "default":
        raise UserError(f"rope scaling {local['rope_type']!r} of layers with a window is not supported")
    thetas = {"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {}
    return {**config, "rope_parameters": by_kind["full_attention"], **thetas}


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


def _windows(config: dict[str, Any], family: Family) -> tuple[int | None, tuple[bool, ...] | None]:
    """The sliding window, and which layers have it where not all do."""
    window = config.get("sliding_window")
    if family.windowed is None or window is None or not config.get("use_sliding_window", True):
        return None, None
    kinds = config.get("layer_types")
    if kinds is None:
        windowed = tuple(family.windowed(config, layer) for layer in range(config["num_hidden_layers"]))
    else:
        windowed = tuple(kind == "sliding_attention" for kind in kinds)
    if len(windowed) != config["num_hidden_layers"]:
        raise UserError(f"config.json has {len(windowed)} layer_types for {config['num_hidden_layers']} layers")
    return (window if any(windowed) else None), (None if len(set(windowed)) < 2 else windowed)


def to_hf_config(architecture: Architecture, extra: dict[str, Any]) -> dict[str, Any]:
    """The config.json of an exported model; `extra` adds what the forward pass does not need (token ids)."""
    a, family = architecture, FAMILIES[architecture.family]
    config: dict[str, Any] = {
        "architectures": [family.hf_class],
        "model_type": a.family,
        **{key: getattr(a, field) for field, key in family.entries.items()},
        **family.needs,
        "dtype": "float32",
    }
    if not a.learned_positions:
        config["rope_theta"] = a.rope_theta
    if family.windowed is not None:
        windowed = a.windowed or (a.sliding_window is not None,) * a.num_layers
        kinds = ["sliding_attention" if local else "full_attention" for local in windowed]
        config |= {"sliding_window": a.sliding_window, "use_sliding_window": any(windowed), "layer_types": kinds}
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
    rows: (first, behind the last, of how many) outputs of a weight that the leaf shares with others; None: all.
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
    "layers.mlp_norm": "blk.{}.ffn_norm",
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
    """Decoder leaf path ("layers.q_proj.kernel") -> its place in a checkpoint, for all leaves."""
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
    for site in a.sites:
        place: dict[str, Any] = {}
        for module, sites in family.fused.items():
            if site in sites:
                ends = [sum(a.site_shape(s)[1] for s in sites[:count]) for count in range(len(sites) + 1)]
                at = sites.index(site)
                place, modules[f"layers.{site}"] = {"rows": (ends[at], ends[at + 1], ends[-1])}, module
        add(f"layers.{site}.kernel", f"layers.{site}", transpose=True, **place)
        if a.has_bias(site):
            add(f"layers.{site}.bias", f"layers.{site}", "bias", **place)
    return names
