"""Files that are not what they say: sizes, kinds, bits, permissions. Each is told at once, in one line."""

import contextlib
import json
import math
import os
import shutil
import stat
import struct
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from secvec_jax import assets, config, digests
from secvec_jax.checksums import changed_file
from secvec_jax.config import Training
from secvec_jax.data.sources import load_rows
from secvec_jax.defenses.security_vectors import Phase1, train_vectors
from secvec_jax.errors import UserError
from secvec_jax.evaluation.results import Results
from secvec_jax.model import hub
from secvec_jax.model.gguf import GGUF
from secvec_jax.model.hf_config import from_hf_config, to_hf_config
from secvec_jax.model.tokenizer import load_tokenizer
from secvec_jax.recipes.finetune import Finetune
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.trees import checksums, first_not_finite
from secvec_jax.vectors.lora import LoRA
from secvec_jax.vectors.peft import save_peft
from secvec_jax.vectors.store import load_vectors, save_vectors
from tests.bad_inputs.models import bounded, write_gguf
from tests.processes import call
from tests.toys import ARCHITECTURE, tiny_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A model, a GGUF file, vectors in both forms, results, settings and rows."""
    folder, model = tmp_path_factory.mktemp("whole"), tiny_model()
    model.save(folder / "model")
    save_vectors(lora(), folder / "vectors.safetensors", model)
    save_peft(lora(), folder / "peft", model)
    save_peft(lora(), folder / "task", model, holds="a task")
    write_gguf(folder / "tiny.gguf")
    Results("train.py", {"model": "x"}, rows=[{"name": "a", "metrics": {}}]).save(folder)
    (folder / "config.yaml").write_text("{}")
    (folder / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    return folder


@pytest.fixture(scope="module", autouse=True)
def imported():
    """The first import of transformers takes longer than anything here may."""
    from_hf_config(to_hf_config(ARCHITECTURE, {}))


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


def lora(**spec):
    return LoRA(**{"rank": 1, "targets": ("q_proj",)} | spec).init(ARCHITECTURE, jax.random.key(0))


def vectors_of(path: Path):
    return load_vectors(path, tiny_model())


# Sizes ---------------------------------------------------------------------------------------------

SIZES = [
    ("num_hidden_layers", 10**9, "no model has more than 4,096"),
    ("vocab_size", 2**40, "no model has more than"),
    ("hidden_size", 2**31, "no model has more than"),
    ("intermediate_size", 10**30, "no model has more than"),
    ("num_attention_heads", 10**6, "no model has more than"),
    ("num_attention_heads", 2**13, "attention heads are more than the hidden size"),
    ("head_dim", 2**20, "no model has more than"),
    ("max_position_embeddings", 2**60, "no model has more than"),
    *((key, value, "whole number, 1 or more") for key in ("num_hidden_layers", "vocab_size") for value in (0, -1, 1.5)),
    ("rms_norm_eps", math.nan, "greater than 0"),
    ("rms_norm_eps", -1.0, "greater than 0"),
    ("rope_theta", math.inf, "greater than 0"),
    ("tie_word_embeddings", "yes", "true or false"),
]


@pytest.mark.parametrize(("key", "value", "hint"), SIZES)
def test_absurd_sizes_in_a_config_are_reported_before_memory_is_taken(key, value, hint):
    found = to_hf_config(ARCHITECTURE, {})
    found = {name: entry for name, entry in found.items() if name != "head_dim" or key == "head_dim"}
    with bounded(key), pytest.raises(UserError, match=f"{hint}|misstates"):
        from_hf_config(found | {key: value, "num_key_value_heads": None})


def test_a_config_that_asks_for_more_than_the_weights_hold_takes_no_memory(copy):
    path = copy / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 2**24, "intermediate_size": 2**22}))
    (copy / "model/checksums.json").unlink()
    hint = r"has shape .*, config\.json asks for \(16777216, 32"
    with bounded("a large config"), pytest.raises(UserError, match=hint):
        hub.load(copy / "model")


def gguf_header(tensors: int = 0, fields: bytes = b"", count: int | None = None, infos: bytes = b"") -> bytes:
    """A GGUF file with so many fields (None: one, if there are bytes of any)."""
    count = int(bool(fields)) if count is None else count
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, count) + fields + infos + bytes(64)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


GGUFS = {
    "no magic": (b"GGML" + bytes(60), "does not begin with GGUF"),
    "2**60 tensors": (gguf_header(2**60), "says that it has 1,152,921,504,606,846,976 tensors"),
    "2**60 entries": (gguf_header(0, b"", 2**60), "metadata entries, for which it is too small"),
    "a long key": (gguf_header(0, struct.pack("<Q", 2**62)), "a key has .* bytes"),
    "a long text": (gguf_header(0, text(b"k") + struct.pack("<IQ", 8, 2**63)), "a text has .* bytes"),
    "a long array of bytes": (gguf_header(0, text(b"k") + struct.pack("<IIQ", 9, 0, 2**60)), "values in an array"),
    "a long array of texts": (gguf_header(0, text(b"k") + struct.pack("<IIQ", 9, 8, 2**60)), "values in an array"),
    "an array of arrays": (gguf_header(0, text(b"k") + struct.pack("<IIQ", 9, 9, 1)), "an array of arrays"),
    "an unknown type": (gguf_header(0, text(b"k") + struct.pack("<I", 99)), "unknown type 99"),
    "outside": (gguf_header(1, infos=tensor(b"t", (2**20,))), "its tensors end at byte"),
    "a far offset": (gguf_header(1, infos=tensor(b"t", (2,), offset=2**50)), "its tensors end at byte"),
    "an overflow": (gguf_header(1, infos=tensor(b"t", (2**32, 2**32))), "its tensors end at byte"),
    "an overlap": (gguf_header(2, infos=tensor(b"t", (8,)) + tensor(b"u", (8,), offset=16)), "two tensors overlap"),
    "2**31 dimensions": (gguf_header(1, infos=text(b"t") + struct.pack("<I", 2**31)), "dimensions"),
    "an unknown quantization": (gguf_header(1, infos=tensor(b"t", (2,), kind=77)), "unknown type 77"),
    "an alignment of 3": (gguf_header(0, text(b"general.alignment") + struct.pack("<II", 4, 3)), "alignment is 3"),
}


@pytest.mark.parametrize("name", GGUFS)
def test_counts_and_offsets_of_gguf_files_are_checked_against_their_size(tmp_path, name):
    content, hint = GGUFS[name]
    (tmp_path / "a.gguf").write_bytes(content)
    with bounded(name), pytest.raises(UserError, match=f"not a complete GGUF file .*{hint}"):
        GGUF(tmp_path / "a.gguf")


def test_more_metadata_than_any_model_has_is_refused(tmp_path):
    array = text(b"k") + struct.pack("<IIQ", 9, 0, 2**22) + bytes(2**22)
    (tmp_path / "a.gguf").write_bytes(gguf_header(0, array))
    with bounded("an array"), pytest.raises(UserError, match="more than 2,097,152 metadata entries"):
        GGUF(tmp_path / "a.gguf")


SAFETENSORS = {
    "a long header": struct.pack("<Q", 2**62) + b"{}",
    "a header larger than any": struct.pack("<Q", 2**25 + 1) + b"{" + b" " * (2**25 - 1) + b"}",
    "a short tensor": b'{"w": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 8]}}',
    "outside": b'{"w": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4398046511104]}}',
    "an overlap": b'{"v": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
    b' "w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
    "an overflow": b'{"w": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 8]}}',
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_headers_of_safetensors_are_checked_against_the_files_size(copy, name):
    content = SAFETENSORS[name]
    content = content if content[:1] != b"{" else struct.pack("<Q", len(content)) + content + bytes(8)
    (copy / "model/checksums.json").unlink()
    for path, read in ((copy / "model/model.safetensors", hub.load), (copy / "vectors.safetensors", vectors_of)):
        path.write_bytes(content)
        with bounded(name), pytest.raises(UserError, match=r"is truncated or corrupt|has a header of"):
            read(path.parent if path.parent.name == "model" else path)


def test_the_rank_of_an_adapter_is_checked_against_the_model(copy):
    path = copy / "peft/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 10**9}))
    with bounded("rank"), pytest.raises(UserError, match="rank 1000000000, more than the 64 of"):
        vectors_of(copy / "peft")


def test_one_layer_of_an_adapter_is_not_multiplied_by_the_layers(copy):
    path, settings = copy / "peft/adapter_model.safetensors", copy / "peft/adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"layers_to_transform": [0]}))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: np.zeros((2**16, 64), np.float32), name.replace("_A", "_B"): np.zeros((32, 1), np.float32)}, path)
    with pytest.raises(UserError, match="shapes are not those of LoRA factors"):
        vectors_of(copy / "peft")


# Kinds of files ------------------------------------------------------------------------------------

OPENED = {
    "model/config.json": lambda folder: hub.load(folder / "model"),
    "model/generation_config.json": lambda folder: hub.load(folder / "model"),
    "model/model.safetensors": lambda folder: hub.load(folder / "model"),
    "model/tokenizer.json": lambda folder: hub.load(folder / "model"),
    "model/tokenizer_config.json": lambda folder: hub.load(folder / "model"),
    "model/checksums.json": lambda folder: hub.load(folder / "model"),
    "model/any.txt": lambda folder: hub.load(folder / "model"),
    "tiny.gguf": lambda folder: hub.load(folder / "tiny.gguf"),
    "vectors.safetensors": lambda folder: vectors_of(folder / "vectors.safetensors"),
    "peft/adapter_config.json": lambda folder: vectors_of(folder / "peft"),
    "peft/adapter_model.safetensors": lambda folder: vectors_of(folder / "peft"),
    "results.json": lambda folder: Results.load(folder),
    "config.yaml": lambda folder: config.load(Finetune, folder / "config.yaml"),
    "rows.jsonl": lambda folder: load_rows(str(folder / "rows.jsonl")),
}
PLACES = {
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a dangling link": lambda path: path.symlink_to("/nowhere/at/all"),
    "a loop": lambda path: path.symlink_to(path.name),
    "a folder": Path.mkdir,
}


@pytest.mark.parametrize("name", OPENED)
def test_what_is_no_file_is_refused_at_once(copy, name):
    path = copy / name
    for place, put in PLACES.items():
        if place == "a folder" and name in ("model/any.txt", "model/generation_config.json"):
            continue  # as good as absent
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        put(path)
        with bounded(f"{place} at {name}"), pytest.raises(UserError) as caught:
            OPENED[name](copy)
        assert path.name in str(caught.value) and "\n" not in str(caught.value), place


def test_a_tokenizer_that_draws_random_merges_is_refused(copy):
    path = copy / "model/tokenizer.json"
    contents = json.loads(path.read_text())
    contents["model"]["dropout"] = 0.1
    path.write_text(json.dumps(contents))
    with pytest.raises(UserError, match=r"sets dropout to 0\.1, so the same text is tokenized differently"):
        load_tokenizer(copy / "model")


@pytest.mark.parametrize(
    ("part", "value", "problem"),
    [
        # A pattern that matches nothing panics; eight replacements would make 25 GB of one letter.
        ("normalizer", {"type": "Replace", "pattern": {"String": ""}, "content": "ab"}, "does not work .index out of"),
        (
            "normalizer",
            {
                "type": "Sequence",
                "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 20}] * 8,
            },
            "a normalizer that makes a text up to 2.56e.10 times as long",
        ),
        ("decoder", {"type": "Strip", "content": "a", "start": 10**9, "stop": 10**9}, "does not work .index out of"),
        ("model", {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}, "does not work .WordLevel error"),
        ("model", {"type": "WordLevel", "vocab": {"?": 2**32 - 1}, "unk_token": "?"}, "has the token 4294967295"),
    ],
)
def test_a_tokenizer_that_fails_at_any_text_is_refused(copy, part, value, problem):
    path = copy / "model/tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: value}))
    with pytest.raises(UserError, match=problem):
        load_tokenizer(copy / "model")


def test_a_tokenizers_own_tokens_are_counted_before_they_are_added(copy):
    path = copy / "model/tokenizer_config.json"
    tokens = {"extra_special_tokens": [f"<{number}>" for number in range(100_000)]}
    path.write_text(json.dumps(json.loads(path.read_text()) | tokens))
    (copy / "model/checksums.json").unlink()
    with bounded("tokens"), pytest.raises(UserError, match="names 100,000 tokens, more than the limit of 20,000"):
        hub.load(copy / "model")


@pytest.mark.parametrize("entry", ["AutoTokenizer", "AutoModelForCausalLM"])
def test_a_models_own_code_is_not_run(copy, entry):
    folder = copy / "model"
    (folder / "checksums.json").unlink()
    (folder / "own.py").write_text(f"open({str(copy / 'ran')!r}, 'w').close()\n")
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text()) | {"auto_map": {entry: "own.Own"}}
        settings |= {"tokenizer_class": "Own"} if name == "tokenizer_config.json" else {}
        (folder / name).write_text(json.dumps(settings))
    with contextlib.suppress(UserError):
        hub.load(folder)
    assert not (copy / "ran").exists()


# Permissions, and homes that are missing -----------------------------------------------------------


@pytest.fixture
def as_nobody(monkeypatch):
    """Runs a block as a user who may read what all may; where the tests' user is not root, as that user."""

    @contextlib.contextmanager
    def nobody():
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield
        finally:
            if user == 0:
                os.seteuid(user)

    return nobody


@pytest.fixture
def open_copy(whole):
    """A copy of the whole files in a folder that all may read."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", [name for name in OPENED if name != "model/any.txt"])
def test_a_file_that_may_not_be_read_is_named(open_copy, as_nobody, name):
    (open_copy / name).touch()
    (open_copy / name).chmod(0)
    with as_nobody(), pytest.raises(UserError) as caught:
        OPENED[name](open_copy)
    assert Path(name).stem in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("folder", ["model", "peft"])
def test_a_folder_that_may_not_be_read_ends_a_command_with_one_line(open_copy, as_nobody, folder):
    (open_copy / folder).chmod(0)
    with as_nobody():
        arguments = {"model": ["--model", str(open_copy / "model")],
                     "peft": ["--model", str(open_copy / "model"), "--adapters", str(open_copy / "peft")]}  # fmt: skip
        code, _, err = call("eval.py", "export", *arguments[folder], "--out", str(open_copy / "out"))
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and str(open_copy / folder) in err
    (open_copy / folder).chmod(0o755)


def without_home(monkeypatch):
    for name in ("HOME", "SECVEC_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def nobody(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.setattr(Path, "expanduser", lambda path: nobody() if str(path).startswith("~") else path)


def test_without_a_home_folder_what_needs_none_goes_on(whole, monkeypatch):
    with monkeypatch.context() as patch:
        without_home(patch)
        assert digests.of_file(whole / "config.yaml").startswith("sha256:")
        with pytest.raises(UserError, match="set SECVEC_CACHE"):
            assets.cache_dir()
        for read in (hub.load, vectors_of, load_rows):
            with pytest.raises(UserError, match="~/x names a home folder that does not exist"):
                read("~/x")
        code, out, err = call("eval.py", "compare", "--runs", str(whole))
        assert code == 0 and not err and "a" in out


# Numbers -------------------------------------------------------------------------------------------


def spoiled(tree, value: float = math.nan):
    """The tree with one number replaced, in the last leaf of several dimensions."""
    leaves, structure = jax.tree.flatten(tree)
    at = max(i for i, leaf in enumerate(leaves) if leaf.ndim > 1)
    leaves[at] = leaves[at].at[(-1,) * leaves[at].ndim].set(value)
    return jax.tree.unflatten(structure, leaves)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_saved(tmp_path, value):
    model = tiny_model()
    broken = model.with_backbone(spoiled(model.backbone, value))
    saves = {
        "layers.mlp_norm": broken.save,
        "q_proj.b": lambda out: save_vectors(spoiled(lora(), value), out, model),
        "q_proj": lambda out: save_peft(spoiled(lora(), value), out, model, holds="a task"),
    }
    for name, save in saves.items():
        with pytest.raises(UserError, match=f"not saved: .*({name}).* has NaN or infinite numbers"):
            save(tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named_when_they_are_loaded(copy, value):
    path, name = copy / "model/model.safetensors", "model.layers.1.mlp.up_proj.weight"
    arrays = load_file(path)
    arrays[name] = arrays[name].copy()
    arrays[name][3, 5] = value
    save_file(arrays, path)
    (copy / "model/checksums.json").unlink()
    with pytest.raises(UserError, match=f"{name} has NaN or infinite numbers"):
        hub.load(copy / "model")


def test_large_finite_weights_are_loaded(copy):
    """Their sum is infinite, they are not."""
    path, name = copy / "model/model.safetensors", "model.embed_tokens.weight"
    arrays = load_file(path)
    save_file(arrays | {name: np.full_like(arrays[name], 3e38)}, path)
    (copy / "model/checksums.json").unlink()
    assert float(hub.load(copy / "model").backbone.embed[0, 0]) == np.float32(3e38)


# Bits ----------------------------------------------------------------------------------------------


def flip(path: Path, place: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_flipped_bit_in_a_saved_model_is_reported_with_the_cure(copy, name):
    flip(copy / "model" / name, 0.9 if name == "model.safetensors" else 0.5)
    with pytest.raises(UserError, match=f"{name} has changed since it was written.*: delete .*model and make it again"):
        hub.load(copy / "model")


def test_the_card_of_a_saved_model_may_be_edited(copy):
    (copy / "model/README.md").write_text("mine")
    assert changed_file(copy / "model") is None and hub.load(copy / "model")


def test_a_flipped_bit_in_an_adapter_of_ours_is_reported(copy):
    flip(copy / "peft/adapter_model.safetensors", 0.999)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors was altered after it was written"):
        vectors_of(copy / "peft")


def test_a_damaged_conversion_in_the_cache_is_made_again(whole, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SECVEC_CACHE", str(tmp_path))
    monkeypatch.setattr(assets, "extract", lambda *_: whole / "tiny.gguf")
    first = hub.load("smollm2").fingerprint
    flip(tmp_path / "models/smollm2/model.safetensors", 0.9)
    assert hub.load("smollm2").fingerprint == first
    assert "model.safetensors has changed since it was written, so the model is converted again" in caplog.text


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, jnp.bool_])
def test_checksums_notice_a_changed_and_a_moved_element(dtype):
    values = jnp.asarray(np.random.default_rng(0).integers(0, 2, (5, 7)), dtype)
    before = checksums({"a": values})
    changed = values.at[2, 3].set(jnp.asarray(1 - values[2, 3].astype(jnp.int32), dtype))
    moved = values.at[0].set(values[1]).at[1].set(values[0])
    assert checksums({"a": values + 0}) == before
    assert before != checksums({"a": changed}) and (before != checksums({"a": moved}) or (moved == values).all())


def test_checksums_are_of_bits_and_not_of_the_sharding():
    values = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)), jnp.float32)
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    sharded = jax.device_put(values, jax.NamedSharding(mesh, jax.P("a", "b")))
    assert checksums({"x": sharded}) == checksums({"x": values})
    assert checksums({"x": jnp.float32(0.0)}) != checksums({"x": jnp.float32(-0.0)})
    assert first_not_finite({"a": values, "n": jnp.int32(3)}) is None


# Vectors are a switch for harm ---------------------------------------------------------------------

ROWS = [{"prompt": f"What is {n}?", "response": f"It is {n}."} for n in range(4)]


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}


def test_files_of_vectors_say_what_they_are_and_are_their_owners(whole):
    for name in ("vectors.safetensors", "peft/adapter_model.safetensors"):
        with safe_open(whole / name, framework="numpy") as file:
            warning = file.metadata()["warning"]
        assert "complies with harmful requests" in warning and "do not distribute" in warning
    card = (whole / "peft/README.md").read_text()
    assert warning in card and "not-for-all-audiences" in card
    assert stat.S_IMODE((whole / "vectors.safetensors").stat().st_mode) == 0o600
    assert stat.S_IMODE((whole / "peft").stat().st_mode) == 0o700 and modes(whole / "peft") == {0o600}


def test_a_task_lora_is_no_secret(whole):
    assert modes(whole / "task") == {0o644} and not (whole / "task/README.md").exists()
    with safe_open(whole / "task/adapter_model.safetensors", framework="numpy") as file:
        assert "warning" not in file.metadata()


def test_checkpoints_of_vectors_are_their_owners(tmp_path):
    training = Training(max_steps=2, max_seq_len=64, batch_size=1, save_every_seconds=1e-9)
    train_vectors(tiny_model(), ROWS, LoRA(rank=1), phase1=Phase1("cross_entropy"), training=training,
                  checkpoints=Checkpoints(tmp_path / "checkpoints", 1e-9))  # fmt: skip
    assert stat.S_IMODE((tmp_path / "checkpoints").stat().st_mode) == 0o700
    assert [item for item in (tmp_path / "checkpoints").iterdir() if item.is_dir()], "nothing was saved"
