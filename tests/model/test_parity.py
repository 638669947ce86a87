"""Every family computes what transformers computes, in float32, whatever the padding."""

import chex
import numpy as np
import pytest

from secvec_jax.errors import UserError
from secvec_jax.model.architecture import PROJECTIONS, RopeScaling, rope_frequencies
from secvec_jax.model.hf_config import from_hf_config, to_hf_config

TOLERANCE = 1e-4
VARIANTS = ["llama", "llama-mha", "llama-tied", "llama-linear", "llama-llama3", "llama-biases", "mistral",
            "mistral-full", "qwen2", "qwen2-window", "qwen2-mixed", "qwen3", "qwen3-biases", "gemma2", "gemma3",
            "opt", "phi3", "phi3-window"]  # fmt: skip


def _padded(side: str, tokens: np.ndarray) -> np.ndarray:
    """The mask under which the lines have 12, 9 and 5 tokens."""
    lengths = np.array([12, 9, 5])[:, None]
    slots = np.arange(tokens.shape[1])[None]
    return (slots < lengths if side == "right" else slots >= tokens.shape[1] - lengths).astype(np.int32)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(tiny_model, logits, hf_logits, tokens, variant, padding):
    tiny = tiny_model(variant)
    if padding == "none":
        ours, theirs = logits(tiny.model, tokens), hf_logits(tiny.hf, tokens)
        real = np.ones_like(tokens, bool)
    else:
        mask = _padded(padding, tokens)
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)
        ours = logits(tiny.model, tokens, mask, positions)
        theirs = hf_logits(tiny.hf, tokens, mask, positions)
        real = mask == 1
    chex.assert_shape(ours, (3, 12, tiny.hf.config.vocab_size))
    chex.assert_tree_all_finite(ours[real])
    assert theirs[real].std() > 0.3, "the reference is too flat to tell anything"
    np.testing.assert_allclose(ours[real], theirs[real], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("variant", ["llama", "llama-linear", "llama-llama3"])
def test_far_positions_are_those_of_transformers(tiny_model, logits, hf_logits, tokens, variant):
    tiny = tiny_model(variant)
    positions = np.sort(np.random.default_rng(1).integers(0, 400, tokens.shape), axis=1).astype(np.int32)
    ours = logits(tiny.model, tokens, None, positions)
    np.testing.assert_allclose(ours, hf_logits(tiny.hf, tokens, None, positions), rtol=0, atol=TOLERANCE)
    assert np.abs(ours - logits(tiny.model, tokens)).max() > 1e-2, "the positions made no difference"


def test_the_sliding_window_hides_what_is_farther_back(tiny_model, logits, tokens):
    # Two layers of window 5 reach 8 tokens back; without a window the first token reaches everywhere.
    other = tokens.copy()
    other[:, 0] = 3 + (other[:, 0] + 7) % 300
    for variant, reach in (("mistral", 8), ("mistral-full", 11)):
        model = tiny_model(variant).model
        seen = np.abs(logits(model, tokens) - logits(model, other)).max(axis=(0, 2)) > 1e-6
        np.testing.assert_array_equal(seen, np.arange(12) <= reach)


@pytest.mark.parametrize("variant", VARIANTS)
def test_architecture_survives_its_own_config(tiny_model, variant):
    architecture = tiny_model(variant).model.architecture
    assert from_hf_config(to_hf_config(architecture, {})) == architecture


def test_architecture_names_what_is_in_the_model(tiny_model):
    qwen3 = tiny_model("qwen3").model
    assert qwen3.architecture.head_dim * qwen3.architecture.num_heads != qwen3.architecture.hidden_size
    layers = qwen3.backbone.layers
    for projection in PROJECTIONS:
        module = layers.attention if hasattr(layers.attention, projection) else layers.mlp
        kernel = getattr(module, projection).kernel[...]
        chex.assert_shape(kernel, (2, *qwen3.architecture.kernel_shape(projection)))
    assert tiny_model("qwen2").model.backbone.head is None
    assert tiny_model("qwen2").model.backbone.layers.attention.q_proj.bias is not None
    assert tiny_model("qwen2").model.backbone.layers.attention.o_proj.bias is None
    assert tiny_model("llama-biases").model.backbone.layers.mlp.down_proj.bias is not None


_CONFIG = {"model_type": "llama", "vocab_size": 10, "hidden_size": 8, "intermediate_size": 16,
           "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}  # fmt: skip


def test_old_and_new_spellings_of_rope_mean_the_same():
    old = from_hf_config(_CONFIG | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}})
    new = from_hf_config(
        _CONFIG | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
    )
    assert old == new and new.rope_scaling == RopeScaling("linear", 2.0) and new.rope_theta == 5e5


def test_linear_scaling_divides_all_frequencies():
    plain = rope_frequencies(from_hf_config(_CONFIG))
    scaled = rope_frequencies(from_hf_config(_CONFIG | {"rope_scaling": {"type": "linear", "factor": 4.0}}))
    np.testing.assert_allclose(scaled, np.array(plain) / 4)


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"model_type": "gpt2"}, "llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "not supported"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"num_key_value_heads": 3, "num_attention_heads": 8}, "num_key_value_heads"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "num_hidden_layers": 4,
             "layer_types": ["full_attention", "sliding_attention"]},
            "2 layer_types for 4 layers",
        ),
        ({"model_type": "opt", "ffn_dim": 8, "do_layer_norm_before": False}, "do_layer_norm_before False"),
        ({"model_type": "opt", "ffn_dim": 8, "activation_function": "gelu"}, "activation_function 'gelu'"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.75}, "partial_rotary_factor 0.75"),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, "longrope"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ({"model_type": "gemma3", "text_config": {}}, "gemma3_text"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"hidden_size": "8"}, "hidden_size is '8'"),
        ({"rope_parameters": [1]}, "misstates"),
    ],
)  # fmt: skip
def test_configs_that_the_decoder_has_not_are_refused(change, hint):
    with pytest.raises(UserError, match=hint):
        from_hf_config(_CONFIG | change)


def test_a_config_without_a_needed_number_is_refused():
    incomplete = {key: value for key, value in _CONFIG.items() if key != "hidden_size"}
    with pytest.raises(UserError, match="hidden_size"):
        from_hf_config(incomplete)


@pytest.mark.parametrize("first_windowed", [0, 1, 2])
def test_layers_below_max_window_layers_see_everything_as_in_transformers(first_windowed):
    from transformers import AutoConfig

    config = _CONFIG | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4,
                        "max_window_layers": first_windowed, "num_hidden_layers": 2,
                        "num_key_value_heads": 2}  # fmt: skip
    theirs = [kind == "sliding_attention" for kind in AutoConfig.for_model(**config).layer_types]
    ours = from_hf_config(config)
    assert (ours.sliding_window, ours.windowed) == {
        0: (4, None), 1: (4, (False, True)), 2: (None, None)}[first_windowed]  # fmt: skip
    assert theirs == list(ours.windowed or [ours.sliding_window is not None] * 2)


@pytest.mark.parametrize(("family", "layers"), [("gemma2", 5), ("gemma3_text", 13)])
def test_a_config_that_tells_little_means_what_it_means_in_transformers(family, layers):
    from transformers import AutoConfig

    config = _CONFIG | {"model_type": family, "num_hidden_layers": layers, "num_key_value_heads": 1}
    ours, theirs = from_hf_config(config), AutoConfig.for_model(**config)
    assert list(ours.windowed) == [kind == "sliding_attention" for kind in theirs.layer_types]
    assert (ours.sliding_window, ours.head_dim, ours.norm_eps, ours.tied_head) == (
        theirs.sliding_window, theirs.head_dim, theirs.rms_norm_eps, theirs.tie_word_embeddings)  # fmt: skip
    assert (ours.query_scalar, ours.attention_softcap, ours.final_softcap) == (
        theirs.query_pre_attn_scalar, theirs.attn_logit_softcapping, theirs.final_logit_softcapping)  # fmt: skip
    rope = theirs.rope_parameters
    if family == "gemma3_text":
        assert ours.local_rope_theta == rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    assert ours.rope_theta == rope["rope_theta"]


def test_old_and_new_spellings_of_two_ropes_mean_the_same():
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": scaling}
    new = {"rope_parameters": {"full_attention": {**scaling, "rope_theta": 5e5},
                               "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}}  # fmt: skip
    config = _CONFIG | {"model_type": "gemma3_text", "num_key_value_heads": 1}
    found = [from_hf_config(config | change) for change in (old, new)]
    assert found[0] == found[1] and found[0].rope_scaling == RopeScaling("linear", 8.0)
    assert rope_frequencies(found[0], windowed=True)[1] > 2 * rope_frequencies(found[0])[1]
