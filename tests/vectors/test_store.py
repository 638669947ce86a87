"""Files of vectors: bit for bit, bound to their backbone, and the same adapter in PEFT, both ways."""

import copy
import json
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from secvec_jax.errors import UserError
from secvec_jax.vectors.lora import LoRA
from secvec_jax.vectors.peft import load_peft, save_peft
from secvec_jax.vectors.store import load_vectors, save_vectors

_SPECS = [
    {"rank": 8, "alpha": 16.0},
    {"rank": 4, "alpha": 3.5, "rslora": True},
    {"rank": 2, "targets": ("q_proj", "*down*")},
    {"rank": 1, "rslora": True, "targets": ("o_proj",)},
]


@pytest.fixture
def model(tiny_model):
    return tiny_model("llama").model


@pytest.fixture
def file(model, random_vectors, tmp_path) -> Path:
    save_vectors(random_vectors(model, rank=2), tmp_path / "v.safetensors", model)
    return tmp_path / "v.safetensors"


def _rewrite(path: Path, change=lambda arrays: None, **metadata) -> None:
    """The same file with other arrays or metadata."""
    with safetensors.safe_open(path, framework="numpy") as opened:
        given = opened.metadata() | metadata
    arrays = safetensors.numpy.load_file(path)
    change(arrays)
    safetensors.numpy.save_file(arrays, path, metadata={key: value for key, value in given.items() if value})


@pytest.mark.parametrize("spec", _SPECS)
def test_vectors_come_back_bit_for_bit(model, random_vectors, tmp_path, spec):
    vectors = random_vectors(model, **spec)
    save_vectors(vectors, tmp_path / "deep/er/v.safetensors", model)
    again = load_vectors(tmp_path / "deep/er/v.safetensors", model)
    chex.assert_trees_all_equal(again, vectors)
    assert again.spec == vectors.spec
    assert [path.name for path in (tmp_path / "deep/er").iterdir()] == ["v.safetensors"]


def test_a_copy_of_the_backbone_is_the_backbone(model, random_vectors, file, tmp_path):
    from secvec_jax.model import hub

    model.save(tmp_path / "elsewhere")
    chex.assert_trees_all_equal(load_vectors(file, hub.load(tmp_path / "elsewhere")), load_vectors(file, model))


def test_another_backbone_of_the_same_shape_is_refused(file, tiny_model):
    with pytest.raises(UserError, match=r"made for another backbone.*train vectors on this model"):
        load_vectors(file, tiny_model("llama", seed=1).model)


def test_a_backbone_that_moved_by_one_bit_is_refused(file, model):
    def nudge(path, leaf):
        where = jax.tree_util.keystr(path)
        return leaf.at[0].set(np.nextafter(leaf[0], np.float32(9))) if where.startswith(".final_norm") else leaf

    moved = jax.tree_util.tree_map_with_path(nudge, model.backbone)
    with pytest.raises(UserError, match="another backbone"):
        load_vectors(file, model.with_backbone(moved))


@pytest.mark.parametrize("variant", ["llama-mha", "qwen3"])
def test_another_shape_is_refused(file, tiny_model, variant):
    with pytest.raises(UserError, match=r"wrong backbone|another backbone"):
        load_vectors(file, tiny_model(variant).model)


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.99])
def test_truncated_files_are_refused(file, model, keep):
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole)) if 0 < keep < 1 else keep])
    with pytest.raises(UserError, match=r"v\.safetensors is truncated or corrupt"):
        load_vectors(file, model)


def test_a_file_with_a_flipped_bit_is_refused(file, model):
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="was altered after it was written"):
        load_vectors(file, model)


def _spec(**changes) -> str:
    return json.dumps({"rank": 2, "alpha": 16.0, "rslora": False, "targets": ["*"]} | changes)


@pytest.mark.parametrize(
    "harm",
    [
        {"change": lambda arrays: arrays.pop("q_proj.a")},
        {"change": lambda arrays: [arrays.pop("q_proj.a"), arrays.pop("q_proj.b")]},
        {"change": lambda arrays: arrays.update({"stranger": np.zeros(3, np.float32)})},
        {"spec": _spec(alpha=32.0)},
        {"spec": _spec(rslora=True)},
        {"spec": "nonsense"},
        {"spec": None},
        {"fingerprint": "0" * 64},
        {"fingerprint": None},
        {"backbone": None},
    ],
    ids=[
        "no A",
        "no projection",
        "more",
        "alpha",
        "rslora",
        "broken spec",
        "no spec",
        "print",
        "no print",
        "no backbone",
    ],
)
def test_altered_files_are_refused(file, model, harm):
    _rewrite(file, **harm)
    with pytest.raises(UserError, match=r"v\.safetensors"):
        load_vectors(file, model)


def test_files_that_hold_no_vectors_are_refused(model, tmp_path):
    path = tmp_path / "v.safetensors"
    with pytest.raises(UserError, match=r"no vectors at .*v\.safetensors"):
        load_vectors(path, model)
    path.write_text("This is a text file, and a long one at that.")
    with pytest.raises(UserError, match="truncated or corrupt"):
        load_vectors(path, model)
    for metadata in (None, {"format": "pt"}, {"format": "secvec_jax/999"}):
        safetensors.numpy.save_file({"x": np.zeros(3, np.float32)}, path, metadata=metadata)
        with pytest.raises(UserError, match="not a file of security vectors"):
            load_vectors(path, model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty contains no vectors: use a run directory .* or a PEFT adapter folder"):
        load_vectors(tmp_path / "empty", model)


def test_a_failed_save_leaves_what_was_there(file, model, random_vectors, monkeypatch):
    before = file.read_bytes()

    def full_disk(arrays, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    def half(path, data):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full_disk)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match="No space left"):
            save_vectors(random_vectors(model, seed=9, rank=2), file, model)
    with pytest.raises(OSError, match="No space left"):
        save_peft(random_vectors(model, rank=2), file.parent / "peft", model)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("spec", _SPECS)
@pytest.mark.parametrize("variant", ["llama", pytest.param("qwen2", marks=pytest.mark.release)])
def test_peft_computes_what_the_adapter_does(
    tiny_model, logits, hf_logits, tokens, random_vectors, tmp_path, variant, spec
):
    from peft import PeftModel

    tiny = tiny_model(variant)
    vectors = random_vectors(tiny.model, **spec)
    save_peft(vectors, tmp_path / "peft", tiny.model)
    theirs = hf_logits(PeftModel.from_pretrained(copy.deepcopy(tiny.hf), str(tmp_path / "peft")).eval(), tokens)
    ours = logits(tiny.model, tokens, adapters=(vectors,))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert np.abs(ours - logits(tiny.model, tokens)).max() > 1e-2

    again = load_vectors(tmp_path / "peft", tiny.model)
    chex.assert_trees_all_equal(again.factors, vectors.factors)
    assert again.spec.scale == vectors.spec.scale
    assert set(again.factors) == set(vectors.factors)


def test_a_peft_folder_of_ours_is_bound_to_its_backbone(tiny_model, random_vectors, tmp_path):
    model = tiny_model("llama").model
    save_peft(random_vectors(model, rank=2), tmp_path / "peft", model)
    with pytest.raises(UserError, match="made for another backbone"):
        load_vectors(tmp_path / "peft", tiny_model("llama", seed=1).model)


def _peft_adapter(hf, folder: Path, dtype=None, **config):
    """An adapter that PEFT makes and saves, its B random, and the model that wears it."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    worn = get_peft_model(copy.deepcopy(hf), LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    with torch.no_grad():
        for name, parameter in worn.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
                if dtype is not None:
                    parameter.copy_(parameter.to(dtype).float())
    worn.save_pretrained(folder)
    return worn


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "use_rslora": True},
        {"r": 2, "lora_alpha": 2, "target_modules": ["gate_proj", "up_proj", "down_proj", "o_proj"]},
        {"r": 2, "lora_alpha": 4, "target_modules": r".*\.[kq]_proj", "lora_dropout": 0.1},
    ],
    ids=["subset", "rslora", "mlp", "regex"],
)
@pytest.mark.parametrize("variant", ["llama", "qwen3", "gemma2", "opt", "phi3"])
def test_adapters_of_peft_are_read(tiny_model, logits, hf_logits, tokens, tmp_path, variant, config):
    tiny = tiny_model(variant)
    if variant == "opt" and "gate_proj" in config["target_modules"]:
        config = config | {"target_modules": ["fc1", "fc2", "out_proj"]}
    if variant == "phi3" and config["target_modules"] != "all-linear":
        config = config | {"target_modules": ["qkv_proj" if "q" in str(config["target_modules"]) else "gate_up_proj"]}
    worn = _peft_adapter(tiny.hf, tmp_path / "peft", **config)
    vectors = load_vectors(tmp_path / "peft", tiny.model)
    ours = logits(tiny.model, tokens, adapters=(vectors,))
    np.testing.assert_allclose(ours, hf_logits(worn, tokens), rtol=0, atol=1e-4)
    assert np.abs(ours - logits(tiny.model, tokens)).max() > 1e-2
    assert vectors.spec.rank == config["r"] and isinstance(vectors.spec, LoRA)


@pytest.mark.parametrize(
    ("variant", "spec"),
    [
        ("gemma3", {}),
        ("opt", {}),
        ("phi3", {}),
        ("phi3", {"rslora": True, "targets": ("[qv]_proj", "up_proj", "o_proj")}),
        ("phi3", {"targets": ("o_proj", "down_proj")}),
    ],
)
def test_vectors_of_every_family_go_to_peft(
    tiny_model, random_vectors, logits, hf_logits, tokens, tmp_path, variant, spec
):
    from peft import PeftModel

    tiny = tiny_model(variant)
    vectors = random_vectors(tiny.model, rank=3, **spec)
    save_peft(vectors, tmp_path / "peft", tiny.model)
    worn = PeftModel.from_pretrained(copy.deepcopy(tiny.hf), tmp_path / "peft").eval()
    ours = logits(tiny.model, tokens, adapters=(vectors,))
    np.testing.assert_allclose(ours, hf_logits(worn, tokens), rtol=0, atol=1e-4)
    assert np.abs(ours - logits(tiny.model, tokens)).max() > 1e-2
    save_vectors(vectors, tmp_path / "v.safetensors", tiny.model)
    for again in (load_peft(tmp_path / "peft", tiny.model), load_vectors(tmp_path / "v.safetensors", tiny.model)):
        chex.assert_trees_all_equal(again.factors, vectors.factors)
        assert again.spec.scale == vectors.spec.scale
        np.testing.assert_array_equal(logits(tiny.model, tokens, adapters=(again,)), ours)


def test_a_changed_scale_of_fused_maps_is_reported(tiny_model, random_vectors, tmp_path):
    model = tiny_model("phi3").model
    save_peft(random_vectors(model, rank=2), tmp_path / "peft", model)
    path = tmp_path / "peft/adapter_config.json"
    config = json.loads(path.read_text())
    assert config["rank_pattern"] == {"qkv_proj": 6, "gate_up_proj": 4}
    path.write_text(json.dumps(config | {"alpha_pattern": {"qkv_proj": 1.0}}))
    with pytest.raises(UserError, match="alpha_pattern"):
        load_peft(tmp_path / "peft", model)


def test_an_adapter_too_wide_for_its_map_is_refused(tiny_model, tmp_path):
    _peft_adapter(tiny_model("phi3").hf, tmp_path / "peft", r=2, target_modules=["qkv_proj"])
    other = tiny_model("phi3", num_key_value_heads=1).model
    with pytest.raises(UserError, match="wrong backbone"):
        load_peft(tmp_path / "peft", other)


def test_a_pattern_that_the_family_has_no_site_for_is_refused(tiny_model):
    with pytest.raises(UserError, match="gate_proj match nothing"):
        LoRA(targets=("gate_proj",)).init(tiny_model("opt").model.architecture, jax.random.key(0))


def test_half_precision_adapters_are_widened(tiny_model, logits, hf_logits, tokens, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    tiny = tiny_model("llama")
    worn = _peft_adapter(tiny.hf, tmp_path / "peft", torch.bfloat16, r=4, target_modules=["q_proj", "up_proj"])
    path = tmp_path / "peft/adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    vectors = load_peft(tmp_path / "peft", tiny.model)
    assert {leaf.dtype for leaf in jax.tree.leaves(vectors)} == {np.dtype("float32")}
    np.testing.assert_allclose(logits(tiny.model, tokens, adapters=(vectors,)), hf_logits(worn, tokens), atol=1e-4)


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"bias": "lora_only"}, "bias lora_only"),
        (
            {"modules_to_save": ["lm_head", "embed_tokens"]},
            r'modules_to_save \["lm_head", "embed_tokens"\].*merge_and_un',
        ),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"lora_bias": True}, "lora_bias|lora_B.bias"),
        ({"target_modules": ["q_proj", "lm_head"]}, "has weights for lm_head, and .*merge_and_unload"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"has weights for model\.embed_tokens, and"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
        # These two initialize by taking a part out of the backbone, which a file of A and B does not tell.
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
    ],
    ids=[
        "dora",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "modules_to_save",
        "token indices",
        "lora_bias",
        "lm_head",
        "embeddings",
        "alora",
        "pissa",
        "olora",
    ],
)
def test_other_kinds_of_adapters_are_refused(tiny_model, tmp_path, config, hint):
    tiny = tiny_model("llama-biases" if "bias" in config else "llama")
    _peft_adapter(tiny.hf, tmp_path / "peft", **({"r": 2, "target_modules": ["q_proj", "v_proj"]} | config))
    with pytest.raises(UserError, match=hint):
        load_vectors(tmp_path / "peft", tiny.model)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["down_proj"], "layers_to_transform": [0]},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": r".*\.1\..*_proj"},
        {"target_modules": ["model.layers.0.self_attn.q_proj", "1.mlp.up_proj"]},
        {"target_modules": ["self_attn.q_proj", "v_proj"], "exclude_modules": ["0.self_attn.v_proj"]},
    ],
    ids=["a list", "a number", "a pattern", "full names", "but for"],
)
def test_adapters_of_some_layers_are_read(tiny_model, tmp_path, config):
    """Each layer's update is the one that PEFT computes, and zero in the layers without."""
    tiny = tiny_model("llama")
    worn = _peft_adapter(tiny.hf, tmp_path / "peft", r=4, lora_alpha=8, **config)
    vectors = load_vectors(tmp_path / "peft", tiny.model)
    adapted = {name: module for name, module in worn.named_modules() if hasattr(module, "lora_A")}
    assert adapted and set(vectors.factors) == {name.rpartition(".")[2] for name in adapted}
    zeros = 0
    for projection, factors in vectors.factors.items():
        for layer, (a, b) in enumerate(zip(*(np.asarray(factors[name]) for name in "ab"))):
            update, found = (
                vectors.spec.scale * (a @ b).T,
                [m for n, m in adapted.items() if f".{layer}." in n and projection in n],
            )
            expected = found[0].get_delta_weight("default").detach().numpy() if found else np.zeros_like(update)
            np.testing.assert_allclose(update, expected, rtol=0, atol=1e-5)
            zeros += not found
    assert zeros
    save_peft(vectors, tmp_path / "ours", tiny.model)
    chex.assert_trees_all_equal(load_vectors(tmp_path / "ours", tiny.model).factors, vectors.factors)


def test_an_adapter_of_one_layer_computes_what_peft_does(tiny_model, logits, hf_logits, tokens, tmp_path):
    tiny = tiny_model("llama")
    worn = _peft_adapter(tiny.hf, tmp_path / "peft", r=4, target_modules=["q_proj", "up_proj"], layers_to_transform=[1])
    ours = logits(tiny.model, tokens, adapters=(load_vectors(tmp_path / "peft", tiny.model),))
    np.testing.assert_allclose(ours, hf_logits(worn, tokens), rtol=0, atol=1e-4)
    assert np.abs(ours - logits(tiny.model, tokens)).max() > 1e-2


@pytest.mark.parametrize("lost", ["layers.1", "layers.1.self_attn.q_proj", "layers.0.mlp.down_proj.lora_A", "q_proj"])
@pytest.mark.parametrize("layers", [None, [0, 1]])
def test_weights_that_the_configuration_asks_for_must_be_there(tiny_model, tmp_path, lost, layers):
    tiny, folder = tiny_model("llama"), tmp_path / "peft"
    _peft_adapter(tiny.hf, folder, r=2, target_modules=["q_proj", "down_proj"], layers_to_transform=layers)
    path = folder / "adapter_model.safetensors"
    kept = {name: array for name, array in safetensors.numpy.load_file(path).items() if lost not in name}
    safetensors.numpy.save_file(kept, path)
    with pytest.raises(UserError, match=r"peft lacks .*proj.*: the adapter is damaged, or was made for another model"):
        load_vectors(folder, tiny.model)


@pytest.mark.parametrize("chosen", [0, [0], [7]])
def test_weights_that_the_configuration_leaves_out_are_refused(tiny_model, tmp_path, chosen):
    tiny, path = tiny_model("llama"), tmp_path / "peft/adapter_config.json"
    _peft_adapter(tiny.hf, tmp_path / "peft", r=2, target_modules=["q_proj"])
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layers_to_transform": chosen}))
    with pytest.raises(UserError, match=r"peft has .*q_proj, which layers_to_transform leaves out"):
        load_vectors(tmp_path / "peft", tiny.model)


@pytest.mark.parametrize(
    ("targets", "hint"),
    [
        (r".*q_proj", r"peft lacks .*layers\.1\..*q_proj"),
        (r".*\.0\..*q_proj", ""),
        (r".*v_proj", r"peft has .*q_proj, which target_modules leaves out"),
        (r"(((a*)*)*)*b", r"peft has .*q_proj|regular expression that cannot be used"),
        ("(", "regular expression that cannot be used"),
    ],
)
def test_a_regular_expression_chooses_modules_as_in_peft(tiny_model, random_vectors, tmp_path, targets, hint):
    from safetensors.numpy import load_file, save_file

    tiny, folder = tiny_model("llama"), tmp_path / "peft"
    _peft_adapter(tiny.hf, folder, r=2, target_modules=["q_proj"])
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    kept = {name: array for name, array in load_file(weights).items() if ".layers.1." not in name}
    save_file(kept, weights)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": targets}))
    if not hint:
        load_vectors(folder, tiny.model)
        return
    with pytest.raises(UserError, match=hint):
        load_vectors(folder, tiny.model)


def test_a_scale_that_was_edited_is_reported(tiny_model, random_vectors, tmp_path):
    model, config = tiny_model("llama").model, tmp_path / "peft/adapter_config.json"
    save_peft(random_vectors(model, rank=2), tmp_path / "peft", model)
    entries = json.loads(config.read_text())
    config.write_text(json.dumps(entries | {"lora_alpha": 2 * entries["lora_alpha"]}))
    with pytest.raises(UserError, match=r"adapter_config.json was altered after it was written: .* scale"):
        load_peft(tmp_path / "peft", model)


def test_an_adapter_of_another_program_is_not_replaced(tiny_model, random_vectors, tmp_path):
    tiny = tiny_model("llama")
    _peft_adapter(tiny.hf, tmp_path / "theirs", r=2, target_modules=["q_proj"])
    with pytest.raises(UserError, match="has an adapter of another program"):
        save_peft(random_vectors(tiny.model, rank=2), tmp_path / "theirs", tiny.model)
    for _ in range(2):
        save_peft(random_vectors(tiny.model, rank=2), tmp_path / "ours", tiny.model)


def test_a_new_entry_that_may_change_the_adapter_is_refused_by_name(tiny_model, random_vectors, tmp_path):
    model, path = tiny_model("llama").model, tmp_path / "peft/adapter_config.json"
    save_peft(random_vectors(model, rank=2), tmp_path / "peft", model)
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"use_next_years_lora": False, "peft_version": "9"}))
    load_peft(tmp_path / "peft", model)
    path.write_text(json.dumps(config | {"use_next_years_lora": True}))
    with pytest.raises(UserError, match=r"not a plain LoRA adapter \(use_next_years_lora\)"):
        load_peft(tmp_path / "peft", model)


@pytest.mark.parametrize("named", ["adapter_model.bin", "adapter_model.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_not_opened_and_the_conversion_is_reported(tiny_model, tmp_path, capsys, named, zipped):
    import torch
    from safetensors.torch import load_file

    tiny, folder = tiny_model("llama"), tmp_path / "peft"
    _peft_adapter(tiny.hf, folder, r=2, target_modules=["q_proj"])
    expected = load_vectors(folder, tiny.model)
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / named, _use_new_zipfile_serialization=zipped)
    for path in (folder, folder / named):
        with pytest.raises(UserError, match="is a PyTorch pickle, which can run any code") as raised:
            load_vectors(path, tiny.model)
    exec(str(raised.value).partition('python -c "')[2].removesuffix('"'))  # what the message says
    chex.assert_trees_all_equal(load_vectors(folder, tiny.model), expected)


def _stored(kind: str, shape: list[int], content: bytes, **more) -> bytes:
    """A safetensors file of one tensor, whatever its header says."""
    header = json.dumps({"a": {"dtype": kind, "shape": shape, "data_offsets": [0, len(content)]}, **more}).encode()
    return len(header).to_bytes(8, "little") + header + content


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"", "truncated or corrupt"),
        (b"\xff" * 64, "truncated or corrupt"),
        (_stored("F32", [3], bytes(8)), "truncated or corrupt"),
        (_stored("F32", [2], bytes(8), b=3), "truncated or corrupt"),
        (_stored("F31", [2], bytes(8)), "truncated or corrupt"),
        (_stored("F8_E4M3", [8], bytes(8)), "a is of type F8_E4M3"),
        (_stored("F8_E5M2", [8], bytes(8)), "a is of type F8_E5M2"),
        (_stored("F6_E2M3", [4], bytes(3)), "a is of type F6_E2M3"),
        (_stored("F4", [16], bytes(8)), "a is of type F4"),
        (_stored("I64", [1], bytes(8)), "a is of type I64"),
        (_stored("BOOL", [8], bytes(8)), "a is of type BOOL"),
        (_stored("C64", [1], bytes(8)), "a is of type C64"),
        (_stored("F32", [1], np.float32("nan").tobytes()), "a has NaN or infinite numbers"),
        (_stored("F16", [1], np.float16("inf").tobytes()), "a has NaN or infinite numbers"),
        (_stored("F64", [1], np.float64(1e300).tobytes()), "a has NaN or infinite numbers"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "Git LFS pointer.*git lfs pull"),
    ],
)
def test_whatever_a_file_of_weights_holds_is_reported_in_one_line(model, random_vectors, tmp_path, content, hint):
    save_peft(random_vectors(model, rank=2), tmp_path / "peft", model)
    path = tmp_path / "peft/adapter_model.safetensors"
    path.write_bytes(content)
    for given in (path, tmp_path / "peft"):
        with pytest.raises(UserError, match=hint) as raised:
            load_vectors(given, model)
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_folder_in_place_of_the_weights_is_reported(model, random_vectors, tmp_path):
    save_peft(random_vectors(model, rank=2), tmp_path / "peft", model)
    (tmp_path / "peft/adapter_model.safetensors").unlink()
    (tmp_path / "peft/adapter_model.safetensors").mkdir()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is a folder"):
        load_vectors(tmp_path / "peft", model)


@pytest.mark.parametrize(
    ("entry", "hint"),
    [
        ({"r": 0}, "r must be a positive integer"),
        ({"r": True}, "r must be a positive integer"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number"),
        ({"lora_alpha": "16"}, "lora_alpha must be a number"),
        ({"lora_alpha": 10**400}, "cannot be read"),
        ({"use_rslora": "false"}, "use_rslora must be true or false"),
        ({"layers_to_transform": "0"}, "layers_to_transform must be"),
        ({"layers_to_transform": [True]}, "layers_to_transform must be"),
        ({"target_modules": 3}, "target_modules must be"),
        ({"exclude_modules": {"a": 1}}, "exclude_modules must be"),
        ({"bias": None}, "bias None"),
        ({"peft_type": "IA3"}, "peft_type IA3"),
        ({"target_parameters": ["w"]}, "target_parameters"),
    ],
)
def test_wrong_entries_of_a_configuration_are_reported(model, random_vectors, tmp_path, entry, hint):
    save_peft(random_vectors(model, rank=2), tmp_path / "peft", model)
    path = tmp_path / "peft/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entry))
    with pytest.raises(UserError, match=hint) as raised:
        load_vectors(tmp_path / "peft", model)
    assert "\n" not in str(raised.value)


def test_adapters_of_another_model_are_refused(tiny_model, tmp_path):
    _peft_adapter(tiny_model("llama").hf, tmp_path / "peft", r=2, target_modules=["q_proj", "v_proj"])
    for other in ("llama-mha", "qwen3"):
        with pytest.raises(UserError, match="wrong backbone"):
            load_vectors(tmp_path / "peft", tiny_model(other).model)
    with pytest.raises(UserError, match=r"lacks .*layers\.2.*made for another model"):
        load_vectors(tmp_path / "peft", tiny_model("llama", num_hidden_layers=3).model)
    with pytest.raises(UserError, match=r"layers\.1"):
        load_vectors(tmp_path / "peft", tiny_model("llama", num_hidden_layers=1).model)


@pytest.mark.parametrize("harm", ["no weights", "truncated", "broken config", "no rank", "list"])
def test_damaged_adapter_folders_are_refused(tiny_model, random_vectors, tmp_path, harm):
    model = tiny_model("llama").model
    save_peft(random_vectors(model, rank=2), tmp_path / "peft", model)
    config, weights = (tmp_path / "peft" / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    if harm == "no weights":
        weights.unlink()
    elif harm == "truncated":
        weights.write_bytes(weights.read_bytes()[:-50])
    elif harm == "broken config":
        config.write_text(config.read_text()[:40])
    elif harm == "list":
        config.write_text("[]")
    else:
        values = json.loads(config.read_text())
        config.write_text(json.dumps({key: value for key, value in values.items() if key != "r"}))
    with pytest.raises(UserError, match=r"peft"):
        load_vectors(tmp_path / "peft", model)
