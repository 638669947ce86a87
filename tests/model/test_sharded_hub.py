"""Models in and out of folders on a mesh and in several processes: the same bits, in little memory."""

import dataclasses
import errno
import json
import textwrap
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from secvec_jax.errors import UserError
from secvec_jax.model import checkpoint_files, hub
from secvec_jax.model.architecture import PROJECTIONS, Architecture
from secvec_jax.model.hf_config import to_hf_config
from secvec_jax.model.metadata import Metadata
from secvec_jax.sharding import logical_axes, make_mesh, parse_mesh, partition_spec
from secvec_jax.trees import distance, fingerprint, num_parameters, pieces
from tests.processes import Program, free_port, outputs

MESHES = ["fsdp=8", "data=2,fsdp=2,tensor=2", "fsdp=4,tensor=2", "data=8"]


ALL_AXES, REPEATED = MESHES[1], [MESHES[0], *MESHES[2:]]


@pytest.fixture(params=[ALL_AXES, *(pytest.param(shape, marks=pytest.mark.release) for shape in REPEATED)])
def mesh(request):
    return make_mesh(**parse_mesh(request.param))


@pytest.fixture(params=MESHES)
def each_mesh(request):
    return make_mesh(**parse_mesh(request.param))


def _same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_leaf_is_sharded_as_the_table_says_on_each_mesh(tiny_model, each_mesh):
    assert_placed(tiny_model("llama-tied"), each_mesh)


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "qwen2", "qwen3-biases", "gemma2", "opt", "phi3"])
def test_every_leaf_is_sharded_as_the_table_says_and_has_the_same_values(tiny_model, mesh, variant):
    assert_placed(tiny_model(variant), mesh)


def assert_placed(tiny, mesh):
    with jax.set_mesh(mesh):
        model = hub.load(tiny.folder)
        for leaf, axes in zip(jax.tree.leaves(model.backbone), logical_axes(model.backbone), strict=True):
            assert leaf.sharding == NamedSharding(mesh, partition_spec(*axes)) and leaf.dtype == np.float32
    assert _same(model.backbone, tiny.model.backbone)
    assert model.fingerprint == tiny.model.fingerprint
    assert num_parameters(model.backbone) == num_parameters(tiny.model.backbone)
    moved = jax.tree.map(lambda leaf: leaf + 1, model.backbone)
    np.testing.assert_allclose(distance(moved, model.backbone), num_parameters(moved) ** 0.5, rtol=1e-5)


def test_the_weights_are_spread_over_both_axes(tiny_model):
    folder = tiny_model("llama").folder
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        backbone = hub.load(folder).backbone
    assert backbone.layers.attention.q_proj.kernel[...].sharding.spec == P(None, "fsdp", "tensor")
    assert backbone.layers.mlp.down_proj.kernel[...].sharding.spec == P(None, "tensor", "fsdp")
    assert backbone.embed[...].sharding.spec == P("tensor", "fsdp")
    assert backbone.embed[...].addressable_shards[0].data.shape == (160, 16)


@pytest.mark.parametrize("variant", ["llama", "qwen2", "phi3"])
def test_a_save_from_the_mesh_is_that_from_one_device(tiny_model, mesh, variant, tmp_path, monkeypatch):
    monkeypatch.setattr("secvec_jax.trees._PIECE_BYTES", 8192)
    monkeypatch.setattr(checkpoint_files, "_FILE_BYTES", 30_000)
    tiny = tiny_model(variant)
    tiny.model.save(tmp_path / "one")
    with jax.set_mesh(mesh):
        model = hub.load(tiny.folder)
        model.save(tmp_path / "many")
    assert _files(tmp_path / "one") == _files(tmp_path / "many")
    assert len(_files(tmp_path / "one")) > 5
    assert fingerprint(model.backbone) == tiny.model.fingerprint


@pytest.mark.parametrize("place", [P("fsdp"), P(("tensor", "fsdp"), None), P("tensor", "fsdp"), P(None, "fsdp"), P()])
@pytest.mark.parametrize("shape", [(8, 3), (16, 8), (8, 4, 5)])
def test_pieces_are_the_rows_in_order(place, shape, monkeypatch):
    monkeypatch.setattr("secvec_jax.trees._PIECE_BYTES", 100)
    whole = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    mesh = make_mesh(fsdp=4, tensor=2)
    if len(place) > 1 and place[1] and shape[1] % 4:
        pytest.skip("the mesh does not divide the shape")
    array = jax.device_put(whole, NamedSharding(mesh, place))
    for rows in (None, 3):
        blocks = list(pieces(array, rows))
        assert rows is None or {len(block) for block in blocks[:-1]} <= {rows}
        np.testing.assert_array_equal(np.concatenate(blocks), whole)
    assert fingerprint({"x": array}) == fingerprint({"x": whole})


@pytest.mark.parametrize(
    ("shape", "changes", "hint"),
    [
        ("tensor=8", {}, "mesh tensor=8 does not divide the model's 4 attention heads: use tensor=1 or 2"),
        ("fsdp=2,tensor=4", {}, "mesh tensor=4 does not divide the model's 2 key-value heads: use tensor=1 or 2"),
        ("data=4,tensor=2", {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8, "hidden_size": 24},
         "mesh tensor=2 does not divide the model's 3 attention heads: use tensor=1"),
        ("data=4,tensor=2", {"intermediate_size": 63}, "tensor=2 .* intermediate size of 63: use tensor=1"),
        ("data=4,tensor=2", {"vocab_size": 321}, "tensor=2 .* vocabulary of 321: use tensor=1"),
        ("fsdp=8", {"hidden_size": 36}, "mesh fsdp=8 .* hidden size of 36: use fsdp=1, 2, 3, 4 or 6"),
    ],
)  # fmt: skip
def test_a_mesh_that_does_not_divide_the_model_is_refused(tiny_model, tmp_path, shape, changes, hint):
    config = json.loads((tiny_model("llama").folder / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))  # No weights: nothing is read before.
    with jax.set_mesh(make_mesh(**parse_mesh(shape))), pytest.raises(UserError, match=hint):
        hub.load(tmp_path)


def test_weights_of_a_wrong_shape_are_refused_on_a_mesh_too(tiny_model, tmp_path, mesh):
    for path in tiny_model("llama").folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"] = np.zeros(31, np.float32)
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    with jax.set_mesh(mesh), pytest.raises(UserError, match=r"model\.norm\.weight has shape \(31,\).*\(32,\)"):
        hub.load(tmp_path)


def test_a_gguf_file_is_spread_as_well(tiny_model, mesh, monkeypatch, tmp_path):
    tiny = tiny_model("llama")
    weights = safetensors.numpy.load_file(tiny.folder / "model.safetensors")

    class File:
        def __init__(self, path):
            pass

        def read(self):
            shapes = {name: weight.shape for name, weight in weights.items()}
            return tiny.model.architecture, weights.__getitem__, shapes

        def tokenizer(self):
            return tiny.model.tokenizer

        def metadata(self):
            return Metadata()

    monkeypatch.setattr(hub, "GGUF", File)
    (tmp_path / "tiny.gguf").touch()
    with jax.set_mesh(mesh):
        model = hub.load(tmp_path / "tiny.gguf")
        assert model.backbone.embed[...].sharding == NamedSharding(mesh, partition_spec("vocab", "embed"))
    assert model.fingerprint == tiny.model.fingerprint

    # The embedded model goes through a folder in the cache, which one of several loads at a time makes.
    monkeypatch.setenv("SECVEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub.assets, "extract", lambda *_: tmp_path / "tiny.gguf")
    written, write = [], hub._write_folder

    def slowly(folder, *arguments, **options):
        written.append(folder)
        time.sleep(0.3)
        write(folder, *arguments, **options)

    monkeypatch.setattr(hub, "_write_folder", slowly)
    threads = [threading.Thread(target=hub._converted, args=["smollm2"]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert written == [tmp_path / "cache/models/smollm2"]
    with jax.set_mesh(mesh):
        model = hub.load("smollm2")
    assert model.fingerprint == tiny.model.fingerprint and model.name == "smollm2"
    dataclasses.replace(tiny.model, metadata=Metadata()).save(tmp_path / "saved")
    assert _files(tmp_path / "saved") == _files(written[0])


def test_a_cache_that_cannot_hold_the_embedded_model_is_refused(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("SECVEC_CACHE", str(tmp_path))
    monkeypatch.setattr(hub.assets, "extract", full)
    with pytest.raises(UserError, match=r"No space left on device.*SECVEC_CACHE"):
        hub.load("smollm2")


_START = """
import sys

import jax
process, processes, port, devices = map(int, sys.argv[1:5])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", devices)
if processes > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
from secvec_jax.sharding import make_mesh, parse_mesh
from secvec_jax.model import checkpoint_files, hub
"""


def _together(script: str, processes: int, devices: int, *arguments: object, timeout: float = 600) -> list[dict]:
    """What the script prints last, JSON, in each of so many processes with so many devices each."""
    port, code = free_port(), _START + textwrap.dedent(script)
    running = [Program("-c", code, i, processes, port, devices, *arguments) for i in range(processes)]
    try:
        finished = outputs(running, timeout)
    finally:
        for process in running:
            process.kill()
    assert all(process.returncode == 0 for process in running), "\n".join(errors[-3000:] for _, errors in finished)
    return [json.loads(out.splitlines()[-1]) for out, _ in finished]


@pytest.mark.slow
def test_two_processes_load_compare_and_save_as_one(tiny_model, tmp_path):
    tiny = tiny_model("llama-biases")
    script = """
        import json
        import safetensors.numpy
        from secvec_jax.trees import distance, num_parameters
        from secvec_jax.errors import UserError

        source, target = sys.argv[5:]
        jax.set_mesh(make_mesh(fsdp=2, tensor=2))
        model = hub.load(source)
        moved = jax.tree.map(lambda leaf: leaf + 1, model.backbone)
        checkpoint_files._FILE_BYTES = 30_000
        model.save(target)
        print(json.dumps(None), flush=True)
        real = safetensors.numpy.save_file

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        safetensors.numpy.save_file = full
        try:
            model.save(target)
        except (OSError, UserError) as error:
            failed = str(error)
        print(json.dumps({
            "fingerprint": model.fingerprint, "parameters": num_parameters(model.backbone),
            "distance": float(distance(moved, model.backbone)), "failed": failed,
        }))
    """
    first, second = _together(script, 2, 2, tiny.folder, tmp_path / "two")
    assert first["fingerprint"] == second["fingerprint"] == tiny.model.fingerprint
    assert first["parameters"] == second["parameters"] == num_parameters(tiny.model.backbone)
    assert first["distance"] == second["distance"] == pytest.approx(first["parameters"] ** 0.5)
    assert "No space left" in first["failed"] and "the first process could not write" in second["failed"]
    assert hub.load(tmp_path / "two").fingerprint == tiny.model.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["two"]


SMALL, LARGE = (
    Architecture("llama", 8192, 1024, 2816, 4, 16, 4, 64),
    Architecture("llama", 32000, 2048, 5632, 10, 32, 8, 64),
)
"""Some 0.24 and 2.1 GiB of weights in float32."""


@pytest.fixture(scope="module")
def large(request, tiny_model, tmp_path_factory):
    """A folder with random weights of the given architecture, written file by file."""
    a: Architecture = request.param
    folder = tmp_path_factory.mktemp("large")
    (folder / "config.json").write_text(json.dumps(to_hf_config(a, {})))
    tiny_model("llama").model.tokenizer.save_pretrained(folder)
    files = [
        {"model.embed_tokens.weight": (a.vocab_size, a.hidden_size)},
        {"model.norm.weight": (a.hidden_size,), "lm_head.weight": (a.vocab_size, a.hidden_size)},
    ]
    for layer in range(a.num_layers):
        prefix = f"model.layers.{layer}."
        shapes = {f"{prefix}{norm}_layernorm.weight": (a.hidden_size,) for norm in ("input", "post_attention")}
        for projection in PROJECTIONS:
            block = "self_attn" if projection in PROJECTIONS[:4] else "mlp"
            shapes[f"{prefix}{block}.{projection}.weight"] = a.kernel_shape(projection)[::-1]
        files.append(shapes)
    random = np.random.default_rng(0)
    names = {}
    for i, shapes in enumerate(files):
        file = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        noise = random.standard_normal(2**20, np.float32)
        safetensors.numpy.save_file({name: np.resize(noise, shape) for name, shape in shapes.items()}, folder / file)
        names |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    yield folder
    for path in folder.glob("*.safetensors"):
        path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    "large", [SMALL, pytest.param(LARGE, marks=pytest.mark.release)], ids=["small", "large"], indirect=True
)
@pytest.mark.parametrize(
    ("processes", "devices", "shape"),
    [(2, 2, "fsdp=2,tensor=2"), (1, 1, "")],
)
def test_loading_takes_little_more_memory_than_the_share(large, processes, devices, shape):
    script = """
        import json
        import threading
        import time

        def memory(key):
            with open("/proc/self/status") as lines:
                return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) * 1024

        def sample():
            while not done.wait(0.005):
                seen.append(memory("RssAnon"))

        folder, shape = sys.argv[5:]
        if shape:
            jax.set_mesh(make_mesh(**parse_mesh(shape)))
        jax.numpy.zeros(3).block_until_ready()
        before, seen, done = (memory("VmHWM"), memory("RssAnon")), [], threading.Event()
        sampler = threading.Thread(target=sample)
        sampler.start()
        start = time.monotonic()
        leaves = jax.tree.leaves(hub.load(folder).backbone)
        seconds = time.monotonic() - start
        done.set()
        sampler.join()
        share = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
        print(json.dumps({"share": share, "VmHWM": memory("VmHWM") - before[0], "RssAnon": max(seen) - before[1],
                          "seconds": seconds}))
    """
    size = sum(path.stat().st_size for path in large.iterdir())
    for report in _together(script, processes, devices, large, shape):
        print({key: round(value / 2**30, 2) if key != "seconds" else round(value, 1) for key, value in report.items()})
        bound = 1.5 * report["share"] + size / 2
        assert report["VmHWM"] <= bound and report["RssAnon"] <= bound
        assert report["VmHWM"] >= 0.9 * report["share"]
