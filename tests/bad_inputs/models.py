"""Damaged models, tokenizers, GGUF files, adapters, vectors, checkpoints and results, any number of them.

`KINDS` names what can be damaged. `damage(kind, number, whole, folder)` copies the whole files of a kind into a folder
and damages one of them; the same number is the same damage. `check` reads the result as the commands do.
"""

import dataclasses
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from secvec_jax.errors import UserError
from secvec_jax.evaluation.results import Results
from secvec_jax.model import hub
from secvec_jax.model.gguf import GGUF
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.training.trainer import fit
from secvec_jax.trees import fingerprint, first_not_finite
from secvec_jax.vectors.lora import LoRA
from secvec_jax.vectors.peft import save_peft
from secvec_jax.vectors.prompt import SoftPrompt
from secvec_jax.vectors.steering import Steering
from secvec_jax.vectors.store import load_vectors, save_vectors
from tests.toys import ARCHITECTURE, tiny_model
from tests.training.tiny_fit import PHASE, make_streams, parameters, tiny_step

SECONDS, BYTES = 15, 2**31
"""What reading one may take."""

INTEGERS = (0, 1, 2, -1, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**40, 2**60, 2**63 - 1, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    *INTEGERS, 10**9, 10**400, 0.5, -0.5, 1e308, float("nan"), float("inf"), True, False, None, "", "text", "\ud800",
    "x" * 10_000, [], {}, [None], [[]], {"a": {}}, ["x"] * 50_000, {str(i): i for i in range(10_000)},
)  # fmt: skip
DEEP = "[" * 100_000


@dataclasses.dataclass(frozen=True)
class Kind:
    """files: below the folder of whole files, those that are damaged. read: what is done with the folder of a copy."""

    files: tuple[str, ...]
    read: Callable[[Path], Any]
    default: int
    """how many are tried in the default tier"""


def _load_model(folder: Path) -> None:
    loaded = hub.load(folder / "model")
    assert first_not_finite(loaded.backbone) is None


def _load_gguf(folder: Path) -> None:
    loaded = hub.load(folder / "tiny.gguf")
    assert first_not_finite(loaded.backbone) is None


def _load_architecture(folder: Path) -> None:
    hub.load_architecture(folder / "model")


def _load_vectors(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        loaded = load_vectors(folder / name, tiny_model())
        loaded.check(ARCHITECTURE)
        assert first_not_finite(loaded) is None

    return read


STEPS = 5


def _train(folder: Path, stop_at: int | None = None) -> str:
    def on_step(step: int, steps: int, metrics: dict[str, float]) -> None:
        if step == stop_at:
            raise KeyboardInterrupt

    checkpoints = Checkpoints(folder, save_every_seconds=0.0)
    return fingerprint(
        fit(parameters(), PHASE, tiny_step(), make_streams(), steps=STEPS, checkpoints=checkpoints, on_step=on_step)
    )


def _resume(folder: Path) -> None:
    expected = (folder / "expected").read_text()
    assert _train(folder / "checkpoints") == expected, "a damaged checkpoint changed the result"


_WEIGHTS = "model/model.safetensors"
_TOKENIZER = ("model/tokenizer.json", "model/tokenizer_config.json")
KINDS = {
    "config": Kind(("model/config.json", "model/generation_config.json"), _load_architecture, 25),
    "model": Kind((_WEIGHTS, "model/config.json"), _load_model, 20),
    "tokenizer": Kind((*_TOKENIZER, "model/chat_template.jinja"), _load_model, 10),
    "checksums": Kind((_WEIGHTS, "model/checksums.json", *_TOKENIZER), _load_model, 10),
    "gguf": Kind(("tiny.gguf",), _load_gguf, 15),
    "adapter": Kind(("peft/adapter_model.safetensors", "peft/adapter_config.json"), _load_vectors("peft"), 15),
    **{name: Kind((f"{name}.safetensors",), _load_vectors(f"{name}.safetensors"), 8)
       for name in ("lora", "steering", "prompt")},
    "checkpoint": Kind(("checkpoints",), _resume, 4),
    "results": Kind(("results.json",), lambda folder: Results.load(folder), 15),
}  # fmt: skip


def make_whole(folder: Path) -> None:
    """Write a whole example of everything into a folder."""
    model = tiny_model()
    model.save(folder / "model")
    key = jax.random.key(0)
    lora = LoRA(rank=1, targets=("q_proj",)).init(ARCHITECTURE, key)
    save_vectors(lora, folder / "lora.safetensors", model)
    save_vectors(Steering().init(ARCHITECTURE, key), folder / "steering.safetensors", model)
    save_vectors(SoftPrompt().init(ARCHITECTURE, key), folder / "prompt.safetensors", model)
    save_peft(lora, folder / "peft", model)
    write_gguf(folder / "tiny.gguf")
    try:
        _train(folder / "checkpoints", stop_at=4)
    except KeyboardInterrupt:
        pass
    (folder / "expected").write_text(_train(folder / "uninterrupted"))
    Results("train.py", {"model": "x"}, rows=[{"name": "a", "metrics": {}}]).save(folder)


def write_gguf(path: Path) -> None:
    """The tiny model's shapes with random weights, as llama.cpp's converter writes them."""
    import gguf

    from secvec_jax.model.families import members, weight_names

    a, generator = ARCHITECTURE, np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(a.max_length)
    writer.add_embedding_length(a.hidden_size)
    writer.add_block_count(a.num_layers)
    writer.add_feed_forward_length(a.intermediate_size)
    writer.add_head_count(a.num_heads)
    writer.add_head_count_kv(a.num_kv_heads)
    writer.add_layer_norm_rms_eps(a.norm_eps)
    names, tree = weight_names(a), tiny_model().backbone
    shapes = {stored: leaf.shape for stored, leaf in tree.named_leaves()}
    for leaf, name in names.items():
        shape = shapes[leaf][1:] if name.layered else shapes[leaf]
        for layer in range(len(members(name, a))):
            weight = generator.normal(size=shape[::-1] if name.transpose else shape).astype(np.float32)
            writer.add_tensor(name.gguf.format(layer), weight)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    vocabulary = tiny_model().tokenizer.get_vocab()
    bpe = json.loads(tiny_model().tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([1] * len(vocabulary))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_eos_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    GGUF(path)


def damage(kind: str, number: int, whole: Path, folder: Path) -> str:
    """Copy the whole files into `folder`, damage one of this kind there, and return what was done."""
    choose = random.Random(f"{kind} {number}")
    shutil.copytree(whole, folder, symlinks=True)
    if kind != "checksums":
        (folder / "model/checksums.json").unlink()  # else nothing but the checksums would be tested
    name = choose.choice(KINDS[kind].files)
    path = folder / name
    if path.is_dir():
        path = choose.choice(sorted(file for file in path.rglob("*") if file.is_file()))
    how = choose.choice([_replace, *[_as_bytes] * 3, *[_as_json] * 4, *[_as_safetensors] * 4])
    return f"{kind} {number}: {path.relative_to(folder)}: {how(path, choose)}"


def _replace(path: Path, choose: random.Random) -> str:
    """Put something that is no regular file in the file's place, or nothing."""
    path.unlink()
    kind = choose.choice(["nothing", "folder", "pipe", "device", "dangling link", "loop"])
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "nothing":
        path.symlink_to({"device": "/dev/zero", "dangling link": "/nowhere/at/all", "loop": path.name}[kind])
    return kind


def _as_bytes(path: Path, choose: random.Random) -> str:
    data = bytearray(path.read_bytes())
    how = choose.choice(["cut", "flip", "integer", "noise", "longer", "zeros", "empty"])
    start = min(int(len(data) * choose.random() ** choose.choice([1, 4])), max(len(data) - 1, 0))
    if how == "cut":
        del data[start:]
    elif how == "empty":
        data.clear()
    elif how == "longer":
        data += choose.randbytes(choose.randrange(1, 100))
    elif how == "flip" and data:
        data[start] ^= 1 << choose.randrange(8)
    elif how == "integer":
        size = choose.choice([4, 8])
        data[start : start + size] = (choose.choice(INTEGERS) % 2 ** (8 * size)).to_bytes(size, "little")
    elif data:
        size = choose.randrange(1, 64)
        data[start : start + size] = choose.randbytes(size) if how == "noise" else bytes(size)
    path.write_bytes(bytes(data))
    return f"{how} at byte {start}"


def _as_json(path: Path, choose: random.Random) -> str:
    """Another value somewhere in a JSON file."""
    try:
        tree = json.loads(path.read_text())
    except ValueError:
        return _as_bytes(path, choose)
    if choose.random() < 0.05:
        path.write_text(DEEP)
        return "deep"
    what = _change(tree, choose)
    path.write_text(json.dumps(tree))
    return what


def _change(tree: Any, choose: random.Random) -> str:
    places = list(_places(tree))
    if not places:
        return "nothing to change"
    # Those near the root count as much as those of the many tokens of a vocabulary.
    depth = choose.choice(sorted({depth for depth, _, _ in places}))
    _, parent, key = choose.choice([place for place in places if place[0] == depth])
    how = choose.random()
    if how < 0.15:
        del parent[key]
        return f"without {str(key)[:40]}"
    if how < 0.25 and isinstance(parent, dict):
        parent[choose.choice(["unknown", "", "\n", "quantization_config", "auto_map"])] = choose.choice(VALUES)
        return "one more key"
    value = choose.choice(VALUES)
    parent[key] = value
    return f"{str(key)[:40]} is {str(value)[:20]!a}"


def _places(tree: Any, depth: int = 0) -> Iterator[tuple[int, Any, Any]]:
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield depth, tree, key
        if isinstance(value, dict | list):
            yield from _places(value, depth + 1)


def _as_safetensors(path: Path, choose: random.Random) -> str:
    """Another header, of any size that it says, or numbers that are not finite."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
        body = bytearray(data[8 + size :])
    except ValueError:
        return _as_json(path, choose)
    if not isinstance(header, dict) or choose.random() < 0.2:
        if len(body) < 4:
            return _as_bytes(path, choose)
        at = choose.randrange(len(body) // 4) * 4
        body[at : at + 4] = np.float32(choose.choice([np.nan, np.inf, -np.inf])).tobytes()
        what = "a number is not finite"
    else:
        what = _change(header, choose)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    length = choose.choice(INTEGERS) % 2**64 if choose.random() < 0.1 else len(text)
    path.write_bytes(length.to_bytes(8, "little") + text + bytes(body))
    return what


def check(kind: str, number: int, whole: Path, folder: Path) -> str | None:
    """Read a damaged input of a kind: the error message, None if it was read; AssertionError for anything else."""
    what = damage(kind, number, whole, folder)
    message = None
    with bounded(what):
        try:
            KINDS[kind].read(folder)
        except UserError as error:
            message = str(error)
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert message is None or (message.strip() and len(message) < 2000 and "Traceback" not in message), what
    shutil.rmtree(folder)
    return message


@contextmanager
def bounded(what: str) -> Iterator[None]:
    """Raise AssertionError if the block takes longer than `SECONDS` or more memory than `BYTES`."""

    is_late = False

    def late(number: int, frame: Any) -> None:
        nonlocal is_late
        is_late = True  # the block may catch what is raised here
        raise AssertionError(f"{what}: it takes longer than {20 * SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20 * SECONDS)  # for what blocks: the process's own time, which others' work does not add to, is below
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident memory begins anew
    start, resident = time.process_time(), _resident("VmRSS")
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert not is_late and time.process_time() - start < SECONDS, what
    assert _resident("VmHWM") - resident < BYTES, what


def _resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
