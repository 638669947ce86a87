"""What a folder holds besides weights: carried by load and save, and honored by decoding."""

import dataclasses
import json
import shutil
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub.utils import filter_repo_objects

import secvec_jax as sv
from secvec_jax.data.chat import prompt_tokens
from secvec_jax.errors import UserError
from secvec_jax.model import checkpoint_files, hub
from secvec_jax.model.generate import generate_tokens
from secvec_jax.model.metadata import Metadata
from secvec_jax.model.sampling import Sampling, choose


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    """A copy of a tiny llama's folder, to be changed."""
    return Path(shutil.copytree(tiny_model("llama").folder, tmp_path / "changed"))


def _entries(path: Path) -> dict:
    return json.loads(path.read_text())


def _change(path: Path, **changes) -> None:
    path.write_text(json.dumps(_entries(path) | changes))


def _dtypes(folder: Path) -> set[str]:
    return {str(w.dtype) for w in safetensors.numpy.load_file(folder / "model.safetensors").values()}


_SAMPLES = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.05, "eos_token_id": [2, 7]}


def test_no_entry_is_lost_or_added(folder, tmp_path):
    _change(folder / "generation_config.json", **_SAMPLES)
    _change(folder / "config.json", pretraining_tp=1, _name_or_path="/somewhere/else")
    hub.load(folder).save(tmp_path / "out")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        before, after = (_entries(at / name) for at in (folder, tmp_path / "out"))
        before.pop("_name_or_path", None)
        assert after == before, name
    (folder / "generation_config.json").unlink()
    hub.load(folder).save(tmp_path / "out")
    assert not (tmp_path / "out/generation_config.json").exists()


@pytest.mark.parametrize("variant", ["mistral-full", "mistral"])
def test_an_exported_mistral_stays_one_in_transformers(tiny_model, hf_logits, tokens, tmp_path, variant):
    from transformers import AutoModelForCausalLM

    tiny = tiny_model(variant)
    for number, model in enumerate([tiny.model, dataclasses.replace(tiny.model, metadata=Metadata())]):
        model.save(tmp_path / str(number))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(number), dtype="float32").eval()
        assert type(again).__name__ == "MistralForCausalLM"
        np.testing.assert_allclose(hf_logits(again, tokens), hf_logits(tiny.hf, tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_is_kept_where_nothing_is_lost(folder, tmp_path, dtype):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    # Some are subnormal in float16.
    tiny = {name: (1e-3 * w).astype(checkpoint_files.DTYPES[dtype]) for name, w in tensors.items()}
    safetensors.numpy.save_file(tiny, folder / "model.safetensors", metadata={"format": "pt"})
    _change(folder / "config.json", dtype=dtype)
    model = hub.load(folder)
    model.save(tmp_path / "same")
    assert _dtypes(tmp_path / "same") == {dtype} and _entries(tmp_path / "same/config.json")["dtype"] == dtype
    assert hub.load(tmp_path / "same").fingerprint == model.fingerprint

    trained = model.with_backbone(jax.tree.map(lambda leaf: leaf * 1.0001, model.backbone))
    trained.save(tmp_path / "trained")
    assert _dtypes(tmp_path / "trained") == {"float32"}
    assert hub.load(tmp_path / "trained").fingerprint == trained.fingerprint
    assert hub.load(tmp_path / "trained").metadata.dtype == dtype
    trained.save(tmp_path / "rounded", dtype=dtype)
    assert _dtypes(tmp_path / "rounded") == {dtype}
    model.save(tmp_path / "wide", dtype="float32")
    assert _dtypes(tmp_path / "wide") == {"float32"} and _entries(tmp_path / "wide/config.json")["dtype"] == "float32"


def test_a_dtype_that_does_not_fit_is_refused(tiny_model, tmp_path):
    model = tiny_model("llama").model
    with pytest.raises(UserError, match="dtype is 'int8': it has to be one of float32, bfloat16, float16"):
        model.save(tmp_path / "out", dtype="int8")
    large = model.with_backbone(jax.tree.map(lambda leaf: leaf * 1e6, model.backbone))
    with pytest.raises(UserError, match="too large for float16"):
        large.save(tmp_path / "out", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_every_end_of_the_file_ends_a_reply(folder):
    model = hub.load(folder)
    prompt = prompt_tokens(model.tokenizer, [{"role": "user", "content": "hi"}], 99)
    [ids] = generate_tokens(model.backbone, [prompt], max_new_tokens=8, stop=2)
    _change(folder / "generation_config.json", eos_token_id=[2, ids[2]])
    model = hub.load(folder)
    assert model.stop_tokens == (2, ids[2])
    before = ids[: ids.index(ids[2])]
    assert sv.generate(model, ["hi"], max_new_tokens=8) == [model.tokenizer.decode(before, skip_special_tokens=True)]
    (folder / "generation_config.json").unlink()
    _change(folder / "config.json", eos_token_id=[9, 2])
    assert hub.load(folder).stop_tokens == (2, 9), "without the file, config.json's count, as in transformers"
    _change(folder / "config.json", eos_token_id=None)
    assert hub.load(folder).stop_tokens == (2,)


def test_decoding_follows_the_file_unless_asked_otherwise(folder):
    model = hub.load(folder)
    ask = {"prompts": ["hi", "What is 2?"], "max_new_tokens": 8}
    greedy = sv.generate(model, **ask)
    _change(folder / "generation_config.json", do_sample=True, temperature=5.0, top_k=0)
    samples = hub.load(folder)
    assert sv.generate(samples, **ask, seed=1) != greedy
    assert sv.generate(samples, **ask, seed=1) == sv.generate(samples, **ask, seed=1)
    assert sv.generate(samples, **ask, temperature=0) == greedy == sv.generate(samples, **ask, sampling=Sampling())
    _change(folder / "generation_config.json", num_beams=4)
    with pytest.raises(UserError, match=r"generation_config\.json has num_beams 4, which is not supported"):
        sv.generate(hub.load(folder), **ask)
    assert sv.generate(hub.load(folder), **ask, temperature=0) == greedy


def test_settings_of_the_file():
    assert Sampling.of({}) == Sampling()
    assert Sampling.of({"temperature": 0.6, "top_p": 0.9}) == Sampling(top_p=0.9), "no do_sample: greedy"
    assert Sampling.of({"do_sample": True}) == Sampling(1.0, top_k=50), "transformers' own top_k"
    own = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1}
    assert Sampling.of(own) == Sampling(0.6, 20, 0.8, 0.0, 1.1)
    assert Sampling.of(own, 0.0) == Sampling(0.0, 20, 0.8, 0.0, 1.1)
    for wrong in (
        {"temperature": -1.0},
        {"temperature": "hot"},
        {"top_p": 0.0},
        {"top_k": 1.5},
        {"min_p": float("nan")},
    ):
        with pytest.raises(UserError, match=f"generation_config.json: {next(iter(wrong))} is"):
            Sampling.of({"do_sample": True} | wrong)


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.3}, {"top_k": 8, "top_p": 0.6}])
def test_the_tokens_that_are_sampled_are_those_of_transformers(settings):
    import torch
    from transformers.generation import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(0).normal(size=(2, 12)).astype(np.float32) * 2
    left = torch.tensor(logits) / 1.5
    for name, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if name in settings:
            left = warper(settings[name])(None, left)
    sampling = Sampling(1.5, **settings)
    draw = jax.jit(jax.vmap(lambda key: choose(logits, None, key, sampling)))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    for row in range(2):
        want = torch.softmax(left[row], -1).numpy()
        share = np.bincount(drawn[:, row], minlength=12) / 4000
        assert set(np.flatnonzero(share)) <= set(np.flatnonzero(want))
        np.testing.assert_allclose(share, want, atol=0.04)


def test_repeated_tokens_are_penalized_as_in_transformers(tiny_model):
    import torch

    tiny = tiny_model("llama")
    prompt = np.arange(5, 15, dtype=np.int32)
    sampling = Sampling(repetition_penalty=1.8)
    [ours] = generate_tokens(tiny.model.backbone, [prompt], max_new_tokens=8, stop=-1, sampling=sampling)
    with torch.no_grad():
        theirs = tiny.hf.generate(
            torch.tensor(prompt[None].astype(np.int64)), do_sample=False, max_new_tokens=8, eos_token_id=None,
            pad_token_id=0, repetition_penalty=1.8,
        )  # fmt: skip
    assert ours == theirs[0, len(prompt) :].tolist()


def test_a_folder_without_a_tokenizer_takes_token_ids(folder, tiny_model, tokens, tmp_path):
    for path in [*folder.glob("*token*"), folder / "chat_template.jinja"]:
        path.unlink(missing_ok=True)
    model = hub.load(folder)
    np.testing.assert_array_equal(sv.logits(model, tokens), sv.logits(tiny_model("llama").model, tokens))
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    for ask in (
        lambda: sv.generate(model, ["hi"]),
        lambda: sv.finetune(model, rows, vectors=None, training=sv.Training(max_steps=1)),
    ):
        with pytest.raises(UserError, match=r"has no tokenizer, .*copy tokenizer\.json"):
            ask()
    model.save(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "checksums.json", "config.json", "generation_config.json", "model.safetensors"]  # fmt: skip
    assert hub.load(tmp_path / "out").fingerprint == model.fingerprint


@pytest.mark.parametrize("token", [-1, 320])
def test_token_ids_outside_the_table_are_refused(tiny_model, token):
    model = tiny_model("llama").model
    hint = f"token id {token}, which is outside the model's embedding table of 320 rows"
    with pytest.raises(UserError, match=hint):
        sv.logits(model, [[5, token, 7]])
    if token > 0:
        tokenizer = hub.load(tiny_model("llama").folder).tokenizer
        tokenizer.add_tokens(["qqq"])
        model = dataclasses.replace(model, tokenizer=tokenizer)
        with pytest.raises(UserError, match=f"prompt 2 has {hint}"):
            sv.generate(model, ["ab", "x qqq"], max_new_tokens=2)
        rows = [{"prompt": "a", "response": text} for text in ("b", "c qqq")]
        with pytest.raises(UserError, match=f"row 2: the row has {hint}"):
            sv.finetune(model, rows, vectors=None, training=sv.Training(max_steps=1, max_seq_len=64))


def test_a_whole_file_wins_over_an_index_left_behind(tiny_model, tmp_path, monkeypatch):
    old, new = tiny_model("llama", seed=1).model, tiny_model("llama").model
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "_FILE_BYTES", 30_000)
        old.save(tmp_path / "m")
    new.save(tmp_path / "whole")
    shutil.copy(tmp_path / "whole/model.safetensors", tmp_path / "m")
    assert hub.load(tmp_path / "m").fingerprint == new.fingerprint


def test_a_tied_head_may_be_under_either_name(tiny_model, tmp_path):
    tiny = tiny_model("llama-tied")
    folder = Path(shutil.copytree(tiny.folder, tmp_path / "tied"))
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    for names in (["lm_head.weight"], ["lm_head.weight", "model.embed_tokens.weight"]):
        table = tensors.pop("model.embed_tokens.weight", tensors.get("lm_head.weight"))
        tensors |= dict.fromkeys(names, table)
        safetensors.numpy.save_file(
            {name: w.copy() for name, w in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"}
        )
        assert hub.load(folder).fingerprint == tiny.model.fingerprint


@pytest.mark.parametrize("sharded", [False, True])
def test_a_hub_id_fetches_what_a_folder_needs(tiny_model, tmp_path, monkeypatch, sharded):
    there, here, taken = tmp_path / "there", tmp_path / "0123abc", []
    if sharded:
        monkeypatch.setattr(checkpoint_files, "_FILE_BYTES", 100_000)
    tiny_model("llama").model.save(there)
    for extra in ("consolidated.safetensors", "pytorch_model.bin", "original/params.json", "onnx/model.safetensors",
                  "README.md", "training_args.json"):  # fmt: skip
        (there / extra).parent.mkdir(exist_ok=True)
        (there / extra).write_bytes(b"{}")
    (there / "merges.txt").write_text("#version: 0.2\n")

    def snapshot(repo, allow_patterns=None, revision=None):
        assert repo == "owner/name" and revision in (None, "0123abc")
        names = [str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            taken.append(name)
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(there / name, here / name)
        return str(here)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert hub.load("owner/name").fingerprint == tiny_model("llama").model.fingerprint
    shards = {path.name for path in there.glob("model*")}
    assert len(shards) == (3 if sharded else 1)
    assert set(taken) == shards | {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                                   "chat_template.jinja", "merges.txt"}  # fmt: skip
