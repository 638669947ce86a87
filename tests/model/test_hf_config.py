"""config.json means what it means in transformers, or is refused by the name of the key that it fails on."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secvec_jax.errors import UserError
from secvec_jax.model.architecture import rope_frequencies
from secvec_jax.model.families import FAMILIES
from secvec_jax.model.hf_config import from_hf_config, to_hf_config

_SIZES = {"vocab_size": 320, "hidden_size": 512, "intermediate_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 16,
          "max_position_embeddings": 256}  # fmt: skip


def _config(family: str, **changes) -> dict:
    return {"model_type": family, **_SIZES, **({"ffn_dim": 64} if family == "opt" else {}), **changes}


def _theirs(config: dict):
    from transformers import AutoConfig

    return AutoConfig.for_model(**json.loads(json.dumps(config)))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_out_has_the_default_of_its_own_architecture(family):
    config = _config(family)
    for key in ("head_dim", "num_key_value_heads", "max_position_embeddings"):
        del config[key]
    ours, theirs = from_hf_config(config), _theirs(config)
    heads = getattr(theirs, "num_key_value_heads", theirs.num_attention_heads)
    dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (ours.num_kv_heads, ours.head_dim, ours.max_length) == (heads, dim, theirs.max_position_embeddings)
    assert ours.tied_head == theirs.tie_word_embeddings
    assert ours.norm_eps == getattr(theirs, "rms_norm_eps", 1e-5)
    kinds = getattr(theirs, "layer_types", None)
    window = getattr(theirs, "sliding_window", None) if kinds is None or "sliding_attention" in kinds else None
    assert ours.sliding_window == window


def test_defaults_that_differ_between_architectures():
    assert from_hf_config(_config("mistral")).sliding_window == 4096
    assert from_hf_config(_config("mistral", sliding_window=None)).sliding_window is None
    assert from_hf_config(_config("phi3")).norm_eps == 1e-5
    assert from_hf_config(_config("llama")).norm_eps == 1e-6


_SCALING = [None, {"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 2.0},
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 64},
            {"rope_type": "yarn", "factor": 4.0}, {"rope_type": "default"}]  # fmt: skip
_THETAS = [None, 1e4, 5e5]
_PARTS = [None, 1.0, 0.5]


@settings(max_examples=50, derandomize=True)
@given(
    st.sampled_from(["llama", "mistral", "qwen2", "qwen3", "gemma2"]), st.sampled_from(_SCALING),
    st.sampled_from(_SCALING), st.sampled_from(_THETAS), st.sampled_from(_THETAS), st.sampled_from(_PARTS),
    st.booleans(), st.sampled_from([None, 0.0, 1.5]),
)  # fmt: skip
def test_rotary_settings_inside_and_outside_rope_parameters(
    family, old, new, outside, inside, part, nested_part, attention
):
    """Whatever the two homes hold: the frequencies of transformers, or a refusal."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = _config(family, rope_theta=outside, rope_scaling=old)
    rope = dict(new or {})
    for key, value in (("rope_theta", inside), ("attention_factor", attention)):
        if value is not None:
            rope[key] = value
    if part is not None:
        (rope if nested_part else config)["partial_rotary_factor"] = part
    config = {key: value for key, value in config.items() if value is not None}
    if rope:
        config["rope_parameters"] = rope
    try:
        ours = from_hf_config(config)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        plain = attention is None and part in (None, 1.0) and "yarn" not in str(config)
        assert not plain or "twice" in str(error) or "two kinds" in str(error) or "factor" in str(error), error
        return
    assert attention is None and part in (None, 1.0)
    theirs = _theirs(config)
    kind = theirs.rope_parameters["rope_type"]
    if kind == "default":
        theta = theirs.rope_parameters["rope_theta"]
        want = theta ** -(np.arange(0, ours.head_dim, 2) / ours.head_dim)
    else:
        want = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")[0].numpy()
    np.testing.assert_allclose(rope_frequencies(ours), want, rtol=1e-5)


@settings(max_examples=50, derandomize=True)
@given(
    st.sampled_from(["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"]),
    st.sampled_from(["absent", None, 4]),
    st.sampled_from(["absent", True, False]),
    st.sampled_from(["absent", ["full_attention"] * 2, ["sliding_attention", "full_attention"],
                     ["sliding_attention"] * 2]),
    st.sampled_from(["absent", 0, 1, 28]),
)  # fmt: skip
def test_windows_are_those_of_transformers_or_refused(family, window, used, kinds, first):
    given_ = {"sliding_window": window, "use_sliding_window": used, "layer_types": kinds, "max_window_layers": first}
    config = _config(family, **{key: value for key, value in given_.items() if value != "absent"})
    try:
        ours = from_hf_config(config)
    except UserError as error:
        assert "sliding_window" in str(error) or "layer_types" in str(error)
        return
    theirs = _theirs(config | ({"model_type": "ministral"} if family == "mistral" and kinds != "absent" else {}))
    size = getattr(theirs, "sliding_window", None)
    default = "full_attention" if family == "llama" or size is None else "sliding_attention"
    types = getattr(theirs, "layer_types", None) or [default] * 2
    windows = [size if kind == "sliding_attention" else None for kind in types]
    windowed = ours.windowed or [ours.sliding_window is not None] * 2
    assert [ours.sliding_window if local else None for local in windowed] == windows
    again = from_hf_config(json.loads(json.dumps(to_hf_config(ours, {}))))
    assert again == ours


@pytest.mark.parametrize(
    ("family", "change", "hint"),
    [
        ("llama", {"residual_multiplier": 0.22}, "residual_multiplier 0.22"),
        ("llama", {"rope_parameters": {"rope_type": "default", "attention_factor": 2.0}}, "attention_factor 2.0"),
        ("llama", {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}}, "rope_theta twice"),
        ("llama", {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}}, "two kinds"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantization_config \(gptq\)"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ("llama", {"num_experts": 8}, "num_experts 8"),
        ("llama", {"head_dim": 15}, "head_dim"),
        ("mistral", {"attention_bias": True}, "attention_bias True"),
        ("mistral", {"use_sliding_window": False, "sliding_window": 8}, "use_sliding_window False contradicts"),
        ("qwen2", {"use_mrope": True}, "use_mrope True"),
        ("phi3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "linear", "factor": 8.0}}, "rope_parameters has"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim 16"),
        ("opt", {"rope_theta": 1e4}, "rope_theta 10000.0"),
        ("llama", {"rms_norm_eps": "tiny"}, "rms_norm_eps"),
    ],
)
def test_a_key_that_could_change_the_model_is_refused_by_name(family, change, hint):
    from_hf_config(_config(family))
    with pytest.raises(UserError, match=hint) as caught:
        from_hf_config(_config(family) | change)
    assert "\n" not in str(caught.value)


def test_keys_of_published_configs_are_understood():
    """Entries of SmolLM2, a distilled Qwen2, Phi-3 and Gemma 2, which change nothing."""
    common = {"architectures": ["XForCausalLM"], "torch_dtype": "bfloat16", "transformers_version": "4.40.0",
              "initializer_range": 0.02, "use_cache": True, "bos_token_id": 1, "eos_token_id": [1, 2]}  # fmt: skip
    for family, entries in {
        "llama": {"is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1, "rope_scaling": None,
                  "transformers.js_config": {"dtype": "q4"}, "attention_dropout": 0.0},
        "qwen2": {"use_mrope": False, "sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 21},
        "phi3": {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "attention_bias": False,
                 "resid_pdrop": 0.0, "embd_pdrop": 0.0, "original_max_position_embeddings": 256, "sliding_window": 8},
        "gemma2": {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid", "sliding_window": 8,
                   "sliding_window_size": 8},
    }.items():  # fmt: skip
        assert from_hf_config(_config(family) | common | entries).family == family
