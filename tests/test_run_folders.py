"""A run directory names the model or the vectors in it, for the functions and for the commands alike."""

from pathlib import Path

import chex
import pytest

import secvec_jax as sv
from secvec_jax.errors import UserError
from secvec_jax.model.hub import load_architecture
from secvec_jax.recipes.export import Export, export
from secvec_jax.run_folders import find_model, find_vectors
from secvec_jax.vectors.store import holds_security_vectors, load_vectors, save_vectors


def _touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


@pytest.mark.parametrize(
    ("files", "given", "found"),
    [
        (["tuned/model/config.json", "tuned/config.yaml"], "tuned", "tuned/model"),
        (["tuned/model/config.json"], "tuned/model", "tuned/model"),
        (["hf/config.json", "hf/model/config.json"], "hf", "hf"),
        (["a.gguf"], "a.gguf", "a.gguf"),
        ([], "owner/name", "owner/name"),
        (["tuned/vectors/security.safetensors"], "tuned", "tuned"),
    ],
)
def test_the_model_of_a_path(tmp_path, files, given, found):
    _touch(tmp_path, *files)
    assert find_model(tmp_path / given) == tmp_path / found


def test_a_run_of_several_models_names_them(tmp_path):
    _touch(tmp_path, "q/model/aligned/config.json", "q/model/plain/config.json")
    for given in ("q", "q/model"):
        with pytest.raises(UserError, match=r"contains 2 models: use one of .*model/aligned, .*model/plain$"):
            find_model(tmp_path / given)


def test_an_adapter_is_no_model(tmp_path):
    _touch(tmp_path, "a/adapter_config.json")
    with pytest.raises(UserError, match=r"is an adapter, not a model: .*--vectors"):
        find_model(tmp_path / "a")


@pytest.mark.parametrize(
    ("files", "given", "found"),
    [
        (
            ["v/vectors/security.safetensors", "v/vectors/peft/adapter_config.json"],
            "v",
            "v/vectors/security.safetensors",
        ),
        (["v/vectors/security.safetensors"], "v/vectors", "v/vectors/security.safetensors"),
        (["v/vectors/security.safetensors", "v/vectors/random.safetensors"], "v", "v/vectors/security.safetensors"),
        (["v/vectors/kl.safetensors"], "v", "v/vectors/kl.safetensors"),
        (["a/adapter_config.json"], "a", "a"),
        (["x.safetensors"], "x.safetensors", "x.safetensors"),
        ([], "nothing", "nothing"),
    ],
)
def test_the_vectors_of_a_path(tmp_path, files, given, found):
    _touch(tmp_path, *files)
    assert find_vectors(tmp_path / given) == tmp_path / found


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        (["r/vectors/a.safetensors", "r/vectors/b.safetensors"], "contains 2 files of vectors: use one of"),
        (["r/model/config.json", "r/task/adapter_config.json"], "contains no vectors: use a run directory"),
        (["r/config.json", "r/model.safetensors"], "contains no vectors: use a run directory"),
    ],
)
def test_a_folder_without_vectors_is_reported(tmp_path, files, hint):
    _touch(tmp_path, *files)
    with pytest.raises(UserError, match=hint):
        find_vectors(tmp_path / "r")


def test_models_and_vectors_load_from_run_directories(tiny_model, random_vectors, tmp_path):
    model = tiny_model("llama").model
    vectors = random_vectors(model, rank=2)
    model.save(tmp_path / "tuned/model")
    save_vectors(vectors, tmp_path / "v/vectors/security.safetensors", model)
    assert sv.load(tmp_path / "tuned").fingerprint == model.fingerprint
    assert load_architecture(tmp_path / "tuned") == model.architecture
    chex.assert_trees_all_equal(load_vectors(tmp_path / "v", model), vectors)
    assert holds_security_vectors(tmp_path / "v")
    with pytest.raises(UserError, match="contains security vectors"):
        export(Export(str(tmp_path / "tuned"), (str(tmp_path / "v"),), out=str(tmp_path / "other")), "command")
