"""Hugging Face's config.json -> `Architecture`, and back.

Values and defaults are those of transformers' own config class for the model type, so that a folder means the same
in both. A key that this module neither reads nor knows to be without effect is refused by name: it could change
what the model computes.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

from secvec_jax.errors import UserError
from secvec_jax.model import families
from secvec_jax.model.architecture import Architecture, RopeScaling
from secvec_jax.model.families import Family

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
"""Sizes that have to be in the file: transformers' defaults for them are those of one particular model."""
_SIZES = (*_REQUIRED, "num_kv_heads", "head_dim", "max_length")
_LARGEST = {"vocab_size": 2**24, "hidden_size": 2**20, "intermediate_size": 2**22, "num_layers": 2**12,
            "num_heads": 2**14, "num_kv_heads": 2**14, "head_dim": 2**16, "max_length": 2**31 - 1}  # fmt: skip
"""Limits far above the sizes of existing models: libraries allocate memory in proportion to some of them."""
_NUMBERS = ("norm_eps", "query_scalar", "attention_softcap", "final_softcap")
_SWITCHES = ("tied_head", "qkv_bias", "output_bias", "mlp_bias")
_ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
_WINDOWS = ("sliding_window", "use_sliding_window", "layer_types", "max_window_layers")
_SWITCHED = ("qwen2", "qwen3")
"""Families that have a window only with `use_sliding_window`."""
_SAME = {"word_embed_proj_dim": "hidden_size", "sliding_window_size": "sliding_window"}
"""Keys that have to agree with another one: the decoder projects no embeddings, and transformers reads the other."""
_SCALING_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

_IGNORED = frozenset(
    # What the files are, and which library wrote them.
    "architectures model_type _name_or_path name_or_path _commit_hash transformers_version auto_map torch_dtype dtype "
    "tokenizer_class transformers.js_config unsloth_fixed unsloth_version is_llama_config "
    "attn_implementation _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled use_flash_attn "
    # Training: initial values, dropout, labels.
    "initializer_range init_std attention_dropout embedding_dropout residual_dropout dropout activation_dropout "
    "hidden_dropout layerdrop embd_pdrop "
    "resid_pdrop gradient_checkpointing pretraining_tp problem_type id2label label2id num_labels finetuning_task "
    "task_specific_params "
    # What a forward pass of transformers returns, and how it is computed.
    "return_dict use_return_dict output_attentions output_hidden_states torchscript tf_legacy_loss use_bfloat16 "
    "chunk_size_feed_forward tie_last_hidden_states use_cache cache_implementation max_sequence_length "
    "model_max_length is_decoder "
    # Generation: generation_config.json is where these are read.
    "bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id "
    "decoder_start_token_id prefix bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping "
    "encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id "
    "length_penalty max_length max_new_tokens min_length min_new_tokens no_repeat_ngram_size num_beam_groups num_beams "
    "num_return_sequences output_scores remove_invalid_values repetition_penalty return_dict_in_generate "
    "suppress_tokens temperature top_k top_p typical_p".split()
)
"""Keys of config.json that do not change the logits."""

_INERT: Mapping[str, Any] = {
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "is_causal": True,
    "attention_bias": False,
    "mlp_bias": False,
    "use_mrope": False,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
}
"""Keys that change nothing at this value; at any other the decoder would compute something else."""

_QUANTIZED = ("quantization_config", "quantization", "compression_config")


def from_hf_config(config: dict[str, Any]) -> Architecture:
    """The architecture that a Hugging Face config.json describes, old and new (transformers 5) spellings.

    Raises UserError for a family, rope scaling or activation that the decoder does not have, for a key that is not
    understood, for keys that contradict each other, and for missing or malformed entries.
    """
    name = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(name, str) or name not in families.FAMILIES:
        raise UserError(
            f"model family {name or 'unknown'!r} is not supported: use one of {', '.join(families.FAMILIES)}"
        )
    family = families.FAMILIES[name]
    _check_keys(config, family, name)
    values = _as_transformers_reads(config, name)
    try:
        return _architecture(config, values, family, name)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise UserError(f"config.json lacks or misstates {error}: fetch the model again") from error


def _check_keys(config: dict[str, Any], family: Family, name: str) -> None:
    for key in _QUANTIZED:
        if value := config.get(key):
            method = value.get("quant_method", value.get("bits", "")) if isinstance(value, dict) else ""
            raise UserError(
                f"config.json has {key} ({method or 'quantized weights'}): quantized models are not supported, give "
                "the original model"
            )
    for field in _REQUIRED:
        if config.get(family.entries[field]) is None:
            raise UserError(f"config.json lacks {family.entries[field]}: fetch the model again")
    _check_sizes({field: config.get(key) for field, key in family.entries.items()}, family)
    for key, other in _SAME.items():
        if config.get(key) not in (None, config.get(other)):
            raise UserError(f"{key} {_short(config[key])} is not supported: it has to be the {other}")
    known = {*family.entries.values(), *family.needs, *family.ignored, *_WINDOWS, *_SAME, *_IGNORED, *_INERT}
    known |= {*family.unread, *(() if family.switches.get("learned_positions") else _ROPE)}
    for key, value in config.items():
        if key not in known and value is not None:
            raise UserError(
                f"config.json has {key} {_short(value)}, which is not supported for {name}: remove the key if it does "
                "not change what the model computes"
            )
        if key in _INERT and key not in family.entries.values() and value not in (None, _INERT[key]):
            raise UserError(f"{key} {_short(value)} is not supported: the decoder's {name} has {_INERT[key]!r}")
    kinds = config.get("architectures")
    if isinstance(kinds, list) and kinds and not any(str(kind).endswith("ForCausalLM") for kind in kinds):
        raise UserError(f"config.json is of a {_short(kinds[0])}: give a causal language model ({family.hf_class})")


def _check_sizes(sizes: Mapping[str, Any], family: Family) -> None:
    for field in _SIZES:
        size = sizes.get(field)
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise UserError(
                f"{family.entries[field]} is {_short(size)} in config.json: it is a whole number, 1 or more"
            )
        if size is not None and size > _LARGEST[field]:
            raise UserError(
                f"{family.entries[field]} is {_short(size)} in config.json: no model has more than {_LARGEST[field]:,}"
            )


def _as_transformers_reads(config: dict[str, Any], name: str) -> dict[str, Any]:
    """config.json with the defaults, derived values and spellings of transformers' class for the model type."""
    from transformers import AutoConfig

    entries = copy.deepcopy({key: value for key, value in config.items() if key != "model_type"})
    if name == "mistral" and "layer_types" in config:
        name = "ministral"  # as AutoConfig does: it is the same model with a window per layer
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and len(kinds) != config.get("num_hidden_layers"):
        raise UserError(f"config.json has {len(kinds)} layer_types for {config.get('num_hidden_layers')} layers")
    try:
        return AutoConfig.for_model(name, **entries).to_dict()
    except Exception as error:  # the classes check values by many means
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"config.json misstates a value ({_short(reason, 200)}): fetch the model again") from error


def _architecture(config: dict[str, Any], values: dict[str, Any], family: Family, name: str) -> Architecture:
    for key, need in family.needs.items():
        if values.get(key) not in (None, need):
            raise UserError(f"{key} {_short(values[key])} is not supported: the decoder's {name} has {need!r}")
    theta, scaling, local_theta = _rope(config, values, by_layer="local_rope_theta" in family.entries)
    values = {**values, "rope_local_base_freq": local_theta}
    read = {field: values[key] for field, key in family.entries.items() if values.get(key) is not None}
    _check_sizes(read, family)
    for field in _NUMBERS:
        if field in read and not (_is_number(read[field]) and 0 < read[field] < math.inf):
            raise UserError(f"{family.entries[field]} is {_short(read[field])}: it is a number greater than 0")
    for field in _SWITCHES:
        if not isinstance(read.get(field, False), bool):
            raise UserError(f"{family.entries[field]} is {_short(read[field])}: it is true or false")
    heads = read["num_heads"]
    window, windowed = _windows(config, values, family)
    return Architecture(
        **{
            "family": name,
            "num_kv_heads": heads,
            "head_dim": read["hidden_size"] // heads,
            "rope_theta": theta,
            "rope_scaling": scaling,
            "sliding_window": window,
            "windowed": windowed,
            **read,
            **family.switches,
        }
    )


def _rope(
    config: dict[str, Any], values: dict[str, Any], by_layer: bool
) -> tuple[float, RopeScaling | None, float | None]:
    """The base, the scaling, and, by_layer, the base of the layers with a window.

    Raises UserError where a value is given twice, inside and outside `rope_parameters`, and differs.
    """
    rope, local_theta = values.get("rope_parameters") or {}, None
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    if by_layer:
        for key, value in rope.items():
            if key not in ("full_attention", "sliding_attention") and value is not None:
                raise UserError(f"rope_parameters has {key} outside full_attention and sliding_attention: move it")
        rope, local = rope["full_attention"], rope["sliding_attention"]
        new = new.get("full_attention") if isinstance(new, dict) else new
        if _scaling(local) is not None:
            raise UserError(f"rope scaling {local['rope_type']!r} of layers with a window is not supported")
        local_theta = _base(_one_value("rope_local_base_freq", local["rope_theta"], config.get("rope_local_base_freq")))
    if isinstance(old, dict) and old and isinstance(new, dict):
        for key, value in new.items():
            if key not in ("rope_type", "type"):
                _one_value(key, rope.get(key), value)
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            _one_value(key, rope[key], config.get(key))
    return _base(rope.get("rope_theta", 10000.0)), _scaling(rope), local_theta


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _base(theta: Any) -> float:
    if not (_is_number(theta) and 0 < theta < math.inf):
        raise UserError(f"rope_theta is {_short(theta)} in config.json: it is a number greater than 0")
    return float(theta)


def _one_value(key: str, used: Any, other: Any) -> Any:
    """The value of a key that may be given in two places."""
    if other is not None and other != used:
        raise UserError(
            f"config.json gives {key} twice, {_short(used)} and {_short(other)}, inside and outside rope_parameters: "
            "keep one"
        )
    return used


def _scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in _SCALING_KEYS:
        raise UserError(f"rope scaling {kind!r} is not supported: use a model with default, linear or llama3 scaling")
    if rope.get("type") not in (None, kind):
        raise UserError(f"config.json gives two kinds of rope scaling, {kind!r} and {_short(rope['type'])}: keep one")
    if (part := rope.get("partial_rotary_factor")) not in (None, 1.0):
        raise UserError(f"partial_rotary_factor {_short(part)} is not supported: the decoder rotates whole heads")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
    for key, value in rope.items():
        if key not in known | set(_SCALING_KEYS[kind]) and value is not None:
            raise UserError(f"rope scaling {kind!r} with {key} {_short(value)} is not supported: remove the key")
    if kind == "default":
        return None
    for key in _SCALING_KEYS[kind]:
        if not (_is_number(rope[key]) and 0 < rope[key] < 2**31):
            raise UserError(f"{key} of the rope scaling is {_short(rope[key])}: it is a number greater than 0")
    if kind == "linear":
        return RopeScaling("linear", float(rope["factor"]))
    return RopeScaling(
        "llama3",
        float(rope["factor"]),
        float(rope["low_freq_factor"]),
        float(rope["high_freq_factor"]),
        int(rope["original_max_position_embeddings"]),
    )


def _windows(
    config: dict[str, Any], values: dict[str, Any], family: Family
) -> tuple[int | None, tuple[bool, ...] | None]:
    """The sliding window, and which layers have it where not all do."""
    window, kinds = values.get("sliding_window"), values.get("layer_types")
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or not 1 <= window < 2**31):
        raise UserError(f"sliding_window is {_short(window)} in config.json: it is a whole number, 1 or more, or null")
    if family.windows == "none" and config.get("use_sliding_window") is False:
        window = None
    by_default = "full_attention" if window is None or family.windows == "none" else "sliding_attention"
    kinds = [by_default] * values["num_hidden_layers"] if kinds is None else kinds
    if unsupported := set(kinds) - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"layer_types has {_short(min(map(str, unsupported)))}: full and sliding attention are supported"
        )
    windowed = tuple(kind == "sliding_attention" for kind in kinds)
    follows = family.windows == "by layer" or values["model_type"] == "ministral"
    if (not follows and set(kinds) != {by_default}) or (family.windows == "none" and window is not None):
        raise UserError(
            f"sliding_window {window} with these layer_types is not supported: {family.hf_class} has the window in "
            f"{family.windows.replace('none', 'no layers')}"
        )
    if any(windowed) and window is None:
        raise UserError("config.json has sliding_attention in layer_types without a sliding_window: add it")
    switch = config.get("use_sliding_window")
    if family.windows != "none" and values["model_type"] not in _SWITCHED and switch not in (None, any(windowed)):
        raise UserError(
            f"use_sliding_window {_short(switch)} contradicts sliding_window {window}: {family.hf_class} reads the "
            "latter, keep one"
        )
    return (window if any(windowed) else None), (None if len(set(windowed)) < 2 else windowed)


def to_hf_config(architecture: Architecture, extra: dict[str, Any]) -> dict[str, Any]:
    """A config.json for a model that came without one; `extra` adds what the forward pass does not need (token ids)."""
    a, family = architecture, families.FAMILIES[architecture.family]
    config: dict[str, Any] = {
        "architectures": [family.hf_class],
        "model_type": a.family,
        **{key: getattr(a, field) for field, key in family.entries.items()},
        **family.needs,
    }
    if not a.learned_positions:
        config["rope_theta"] = a.rope_theta
    windowed = a.windowed or (a.sliding_window is not None,) * a.num_layers
    if family.windows != "none":
        config["sliding_window"] = a.sliding_window
    if family.windows == "by layer" or a.windowed is not None:
        config["layer_types"] = ["sliding_attention" if local else "full_attention" for local in windowed]
    if a.family in _SWITCHED:
        config["use_sliding_window"] = any(windowed)
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


def _short(value: Any, length: int = 40) -> str:
    text = value if isinstance(value, str) and length > 40 else repr(value)
    return text if len(text) <= length else text[:length] + "..."
