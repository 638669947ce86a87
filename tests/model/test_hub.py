"""Models in and out of folders: bit for bit, readable by transformers, and never half-written."""

import errno
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from secvec_jax.errors import UserError
from secvec_jax.model import checkpoint_files, hub
from secvec_jax.model.generate import generate_tokens
from secvec_jax.model.tokenizer import load_tokenizer, save_tokenizer

VARIANTS = ["llama-llama3", "llama-biases", "mistral", "qwen2-mixed", "qwen3", "gemma2", "gemma3", "opt", "phi3"]
REPEATED = ["llama-tied", "llama-linear", "qwen2", "qwen2-window", "qwen3-biases", "phi3-window"]


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    """A copy of a tiny llama's folder, to be damaged."""
    return Path(shutil.copytree(tiny_model("llama").folder, tmp_path / "damaged"))


def _change_weights(folder: Path, change) -> None:
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    change(weights)
    safetensors.numpy.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("variant", [*VARIANTS, *(pytest.param(name, marks=pytest.mark.release) for name in REPEATED)])
def test_saved_models_come_back_bit_for_bit_and_go_to_transformers(
    tiny_model, logits, hf_logits, tokens, tmp_path, variant
):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tiny_model(variant).model
    model.save(tmp_path / "out")
    again = hub.load(tmp_path / "out")
    assert again.fingerprint == model.fingerprint
    assert again.architecture == model.architecture
    assert again.name == str(tmp_path / "out")

    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    np.testing.assert_allclose(logits(again, tokens), hf_logits(hf, tokens), rtol=0, atol=1e-4)
    ours = generate_tokens(again.backbone, list(tokens), max_new_tokens=8, stop=-1)
    with torch.no_grad():
        theirs = hf.generate(
            torch.tensor(tokens), attention_mask=torch.ones(tokens.shape, dtype=torch.long),
            do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    assert ours == theirs[:, tokens.shape[1] :].tolist()

    chat = [{"role": "user", "content": "What is the capital of France? 42 ü"}]
    want = AutoTokenizer.from_pretrained(tiny_model(variant).folder).apply_chat_template(chat, tokenize=False)
    assert again.tokenizer.apply_chat_template(chat, tokenize=False) == want
    assert again.tokenizer(want)["input_ids"] == model.tokenizer(want)["input_ids"]
    assert again.tokenizer.decode(again.tokenizer(want)["input_ids"]) == want
    assert again.tokenizer.eos_token_id == model.tokenizer.eos_token_id is not None


def test_a_large_export_is_sharded_with_an_index_that_both_read(
    tiny_model, logits, hf_logits, tokens, tmp_path, monkeypatch
):
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(checkpoint_files, "_FILE_BYTES", 30_000)
    model = tiny_model("llama").model
    model.save(tmp_path / "out")
    files = sorted(tmp_path.glob("out/*.safetensors"))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(files) > 2 and {file.name for file in files} == set(index["weight_map"].values())
    # One tensor may be larger than a shard, and then it is alone.
    assert all(len(safetensors.numpy.load_file(f)) == 1 or f.stat().st_size < 33_000 for f in files)
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(model.backbone))
    assert hub.load(tmp_path / "out").fingerprint == model.fingerprint
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    np.testing.assert_allclose(logits(model, tokens), hf_logits(hf, tokens), rtol=0, atol=1e-4)

    files[1].unlink()
    with pytest.raises(UserError, match=f"{files[1].name} is missing"):
        hub.load(tmp_path / "out")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_are_widened_exactly(tiny_model, logits, hf_logits, tokens, tmp_path, dtype):
    import copy

    import torch
    from transformers import AutoModelForCausalLM

    tiny = tiny_model("qwen2")
    half = copy.deepcopy(tiny.hf).to(getattr(torch, dtype))
    half.save_pretrained(tmp_path / "half")
    tiny.model.tokenizer.save_pretrained(tmp_path / "half")
    model = hub.load(tmp_path / "half")
    assert {leaf.dtype for leaf in jax.tree.leaves(model.backbone)} == {np.dtype("float32")}
    np.testing.assert_array_equal(
        np.asarray(model.backbone.embed[...]), half.model.embed_tokens.weight.detach().float().numpy()
    )
    # Read anew: `half.float()` would keep rotary frequencies that were rounded to half precision.
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32).eval()
    np.testing.assert_allclose(logits(model, tokens), hf_logits(hf, tokens), rtol=0, atol=1e-4)


def test_redundant_names_of_old_checkpoints_are_ignored(folder, tiny_model):
    def add(weights):
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)

    _change_weights(folder, add)
    assert hub.load(folder).fingerprint == tiny_model("llama").model.fingerprint


def test_a_tokenizer_without_padding_stays_so(folder, tmp_path):
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / file).exists():
            values = json.loads((folder / file).read_text())
            values.pop("pad_token", None)
            (folder / file).write_text(json.dumps(values))
    model = hub.load(folder)
    model.save(tmp_path / "out")
    assert model.tokenizer.pad_token is hub.load(tmp_path / "out").tokenizer.pad_token is None
    assert model.tokenizer.eos_token_id is not None


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_text_is_split_as_the_tokenizers_file_says(folder, tmp_path, model_type):
    """transformers rebuilds the tokenizers of some families from config.json's model_type."""
    from tokenizers import Tokenizer, normalizers

    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.normalizer = normalizers.NFKC()
    backend.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    text = "12345 + 67890 don't e\u0301 \ufb01\n\n  x"
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode(text, add_special_tokens=False) == backend.encode(text, add_special_tokens=False).ids
    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    again = load_tokenizer(tmp_path)
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (again.eos_token, again.pad_token, again.chat_template) == (
        tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template)  # fmt: skip


def test_a_model_of_another_program_is_not_replaced(tiny_model, folder):
    (folder / "checksums.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="contains other files"):
        tiny_model("llama").model.save(folder)


def test_with_backbone_keeps_the_tokenizer(tiny_model):
    model = tiny_model("llama").model
    double = model.with_backbone(jax.tree.map(lambda leaf: 2 * leaf, model.backbone), "double")
    assert double.tokenizer is model.tokenizer and double.name == "double"
    assert double.fingerprint != model.fingerprint
    assert model.with_backbone(model.backbone).name == model.name


def _truncate(path: Path, keep: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def _only_index(folder: Path, index: dict) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _drop(name):
    return lambda folder: _change_weights(folder, lambda weights: weights.pop(name))


def _put(name, shape):
    return lambda folder: _change_weights(folder, lambda weights: weights.update({name: np.zeros(shape, np.float32)}))


_DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
    "broken config": (lambda f: _truncate(f / "config.json", 0.5), r"config\.json is not valid JSON"),
    "binary config": (
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
        r"config\.json is not valid JSON",
    ),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), r"config\.json"),
    "config lacks a number": (
        lambda f: (f / "config.json").write_text('{"model_type": "llama"}'),
        r"config\.json lacks vocab_size",
    ),
    "other family": (lambda f: _change_config(f, model_type="gpt2"), "'gpt2' is not supported: use one of llama"),
    "other rope": (lambda f: _change_config(f, rope_parameters={"rope_type": "yarn", "factor": 2.0}), "'yarn'"),
    "incomplete rope": (lambda f: _change_config(f, rope_parameters={"rope_type": "linear"}), "factor"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors is missing.*safetensors"),
    "truncated weights": (lambda f: _truncate(f / "model.safetensors", 0.7), r"model\.safetensors is truncated"),
    "empty weights": (lambda f: _truncate(f / "model.safetensors", 0), r"model\.safetensors is truncated"),
    "missing weight": (
        _drop("model.layers.1.mlp.up_proj.weight"),
        r"lacks model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    "missing head": (_drop("lm_head.weight"), r"lacks lm_head\.weight"),
    "unused weight": (_put("model.layers.7.mlp.up_proj.weight", (3,)), r"has model\.layers\.7.*matches no parameter"),
    "wrong shape": (_put("model.norm.weight", (31,)), r"model\.norm\.weight has shape \(31,\).*\(32,\)"),
    "pickled weights": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), r"\.bin is a pickle"),
    "index without map": (lambda f: _only_index(f, {}), "weight_map"),
    "index of a list": (lambda f: _only_index(f, {"weight_map": ["a.safetensors"]}), "weight_map"),
    "index that leaves its folder": (
        lambda f: _only_index(f, {"weight_map": {"w": "../other/model.safetensors"}}),
        r"names '\.\./other/model\.safetensors', which is not a \.safetensors file in its folder",
    ),
    "index of an absolute path": (lambda f: _only_index(f, {"weight_map": {"w": "/etc/w.safetensors"}}), "its folder"),
    "index of another file": (lambda f: _only_index(f, {"weight_map": {"w": "weights.bin"}}), "its folder"),
    "index of a number": (lambda f: _only_index(f, {"weight_map": {"w": 3}}), "its folder"),
    "tokenizer without vocabulary": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer that can be read: it lacks"),
    "broken generation config": (
        lambda f: (f / "generation_config.json").write_text("{"),
        r"generation_config\.json is not valid JSON",
    ),
    "head of a tied model": (
        lambda f: _change_config(f, tie_word_embeddings=True),
        r"lm_head\.weight that differs from .*tie_word_embeddings to false",
    ),
    "integer weights": (
        lambda f: _change_weights(f, lambda w: w.update({"model.norm.weight": np.zeros(32, np.int8)})),
        "is of type I8, as in quantized models",
    ),
    "broken tokenizer": (lambda f: _truncate(f / "tokenizer.json", 0.5), "tokenizer"),
}


@pytest.mark.parametrize("damage", _DAMAGES)
def test_damaged_folders_are_refused_with_the_fix(folder, damage):
    harm, hint = _DAMAGES[damage]
    harm(folder)
    with pytest.raises(UserError, match=hint) as caught:
        hub.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "~/no such folder", "nowhere", "a/b/c"])
def test_sources_that_do_not_exist_are_refused(source):
    with pytest.raises(UserError, match=r"no model .*smollm2.*config\.json.*\.gguf.*owner/name"):
        hub.load(source)


def test_a_hub_id_that_cannot_be_fetched_is_refused():
    with pytest.raises(UserError, match=r"cannot fetch 'nobody/nothing-of-this-name'.*or give a local folder"):
        hub.load("nobody/nothing-of-this-name")


def _full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_save_that_fails_leaves_nothing(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors.numpy, "save_file", _full_disk)
    with pytest.raises(OSError, match="No space left"):
        tiny_model("llama").model.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_leaves_the_old_model(tiny_model, tmp_path, monkeypatch):
    old, new = tiny_model("llama").model, tiny_model("qwen2").model
    old.save(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.numpy, "save_file", _full_disk)
        with pytest.raises(OSError, match="No space left"):
            new.save(tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    new.save(tmp_path / "out")
    assert hub.load(tmp_path / "out").fingerprint == new.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_fingerprint_of_a_model_that_is_changed_in_place_is_that_of_its_weights(tiny_model, tmp_path):
    tiny_model("llama").model.save(tmp_path / "m")
    model = hub.load(tmp_path / "m")
    before = model.fingerprint
    assert model.fingerprint is before, "it is computed once"
    kernel = model.backbone.layers.mlp.up_proj.kernel
    kernel[...] = kernel[...].at[0].set(0.0)
    model.save(tmp_path / "changed")
    assert model.fingerprint == hub.load(tmp_path / "changed").fingerprint != before
