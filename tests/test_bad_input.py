"""Whatever a file holds: a clear error in one line, or a correct result. No traceback, no half-written file."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from secvec_jax import config
from secvec_jax.data.rows import response_of
from secvec_jax.data.sources import load_rows
from secvec_jax.errors import UserError
from secvec_jax.evaluation.judges import score_of
from secvec_jax.evaluation.results import Results
from secvec_jax.grid.grid import GridConfig
from secvec_jax.model import checkpoint_files, weights
from secvec_jax.model.architecture import Architecture
from secvec_jax.model.families import FAMILIES, weight_names
from secvec_jax.model.hf_config import from_hf_config, to_hf_config
from secvec_jax.recipes.finetune import Finetune
from secvec_jax.recipes.vectors import Vectors
from secvec_jax.vectors.lora import LoRA
from secvec_jax.vectors.peft import save_peft
from secvec_jax.vectors.store import load_vectors, save_vectors
from tests.bad_inputs import models
from tests.bad_inputs import rows as bad_rows
from tests.conftest import VARIANTS
from tests.toys import ARCHITECTURE, tiny_model

many = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])

texts = st.text(st.characters(codec="utf-8"), max_size=12)
scalars = st.none() | st.booleans() | st.integers(-3, 10**6) | st.floats(allow_nan=False, width=32) | texts
FIELDS = ["messages", "conversations", "role", "content", "from", "value", "prompt", "response", "completion",
          "question", "answer", "instruction", "input", "output", "goal", "target", "category", "options"]  # fmt: skip
words = st.sampled_from([*FIELDS, "user", "assistant", "system", "human", "gpt"]) | texts
trees = st.recursive(
    scalars | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=4),
    max_leaves=8,
)
turns = st.fixed_dictionaries(
    {}, optional={"role": words | scalars, "content": scalars, "from": words, "value": scalars}
)
records = (
    trees
    | st.dictionaries(st.sampled_from(FIELDS), scalars | texts, max_size=4)
    | st.fixed_dictionaries({"messages": st.lists(turns, max_size=3)})
    | st.fixed_dictionaries({"conversations": st.lists(turns, max_size=3)})
)


def told_in_one_line(error: UserError) -> None:
    message = str(error)
    assert message.strip() and len(message) < 1000, message
    assert "Traceback" not in message


def rows_or_error(path: Path) -> list[Any] | UserError:
    """The rows of a file; or the error, of one line that names the file."""
    try:
        return list(load_rows(str(path)))
    except UserError as error:
        told_in_one_line(error)
        assert path.name in str(error)
        return error


def is_complete(row: Any) -> bool:
    """Whether the row is a conversation of known roles and texts that ends with an answer."""
    roles = {turn["role"] for turn in row["messages"]}
    texts = [turn["content"] for turn in row["messages"]]
    has_answer = bool(response_of(row).strip())
    return roles <= {"system", "user", "assistant", "tool"} and all(isinstance(t, str) for t in texts) and has_answer


@many
@given(st.lists(records, max_size=3))
def test_rows(tmp_path, found):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in found))
    rows = rows_or_error(path)
    (tmp_path / "rows.json").write_text(json.dumps(found))
    same_rows = rows_or_error(tmp_path / "rows.json")
    if isinstance(rows, UserError):
        assert isinstance(same_rows, UserError), "the two forms differ"
    else:
        assert len(rows) == len(found) and all(map(is_complete, rows))
        assert same_rows == rows, "the two forms differ"


@many
@given(st.binary(max_size=40) | texts.map(str.encode) | st.lists(trees, max_size=2).map(lambda t: str(t).encode()),
       st.sampled_from([".jsonl", ".json", ".csv", ".parquet"]))  # fmt: skip
@example(b"prompt,response\na,b\n", ".csv")
@example(b'{"prompt": "a", "response": "\\ud800"}', ".jsonl")
@example(b"[" * 2_000, ".jsonl")
def test_files_of_rows(tmp_path, data, suffix):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(data)
    rows = rows_or_error(path)
    assert isinstance(rows, UserError) or (rows and all(map(is_complete, rows)))


KINDS = [Finetune, Vectors, GridConfig]


def names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


keys = st.sampled_from([name for kind in (*KINDS, config.Training, LoRA) for name in names(kind)]) | texts
settings_of = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=10
)


@many
@given(st.dictionaries(keys, settings_of, max_size=4) | settings_of, st.sampled_from(KINDS))
def test_configs(tmp_path, found, kind):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(found))
    try:
        loaded = config.load(kind, path)
    except UserError as error:
        told_in_one_line(error)
        return
    assert config.from_dict(kind, config.to_dict(loaded)) == loaded
    for name in found or {}:
        assert name in names(kind)


@many
@given(texts | st.binary(max_size=30).map(lambda data: data.decode("latin-1")))
@example("a: &a [*a]")
@example("!!python/object/apply:os.getcwd []")
@example("training: {<<: 3}")
@example("a: 1\na: 2")
def test_files_of_configs(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        assert config.load(Finetune, path) is not None
    except UserError as error:
        told_in_one_line(error)


HF_CONFIGS = [json.loads(json.dumps(to_hf_config(dataclasses.replace(ARCHITECTURE, family=name), {})))
              for name in FAMILIES] + [dict(changes) for changes in VARIANTS.values()]  # fmt: skip
hf_keys = sorted({key for found in HF_CONFIGS for key in found} | {"rope_parameters", "rope_scaling", "layer_types"})


@many
@given(st.sampled_from(HF_CONFIGS), st.dictionaries(st.sampled_from(hf_keys), trees, max_size=2),
       st.sets(st.sampled_from(hf_keys), max_size=2))  # fmt: skip
def test_model_configs(found, changes, dropped):
    changed = {key: value for key, value in (found | changes).items() if key not in dropped}
    try:
        architecture = from_hf_config(changed)
    except UserError as error:
        told_in_one_line(error)
        return
    assert isinstance(architecture, Architecture) and weight_names(architecture)
    again = from_hf_config(json.loads(json.dumps(to_hf_config(architecture, {}))))
    assert again == architecture


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """A model's weights, our vectors and PEFT's, as bytes."""
    folder, model = tmp_path_factory.mktemp("whole"), tiny_model()
    model.save(folder / "model")
    vectors = LoRA(rank=1, targets=("q_proj",)).init(model.architecture, jax.random.key(0))
    save_vectors(vectors, folder / "vectors.safetensors", model)
    save_peft(vectors, folder / "peft", model)
    return {"model": (folder / "model/model.safetensors").read_bytes(),
            "vectors": (folder / "vectors.safetensors").read_bytes(),
            "peft": (folder / "peft/adapter_model.safetensors").read_bytes(),
            "adapter": (folder / "peft/adapter_config.json").read_bytes()}  # fmt: skip


damages = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 1), st.just(b"")),
    st.tuples(st.just("put"), st.floats(0, 1), st.binary(min_size=1, max_size=4)),
    st.tuples(st.just("length"), st.just(0.0), st.binary(min_size=8, max_size=8)),
    st.tuples(st.just("word"), st.floats(0, 1), st.sampled_from([b"I32", b"F64", b"BF1", b"999", b"[0,", b'"q"'])),
)


def damaged(whole: bytes, damage: tuple[str, float, bytes]) -> bytes:
    """The file cut off, or with other bytes somewhere in its header."""
    how, share, data = damage
    header = 8 + int.from_bytes(whole[:8], "little")
    at = 0 if how == "length" else 8 + int(share * (header - 8 - len(data)))
    if how == "cut":
        return whole[: int(share * len(whole))]
    if how == "word":  # in the place of a word of the same length, so that the header stays readable
        found = [i for i in range(8, header - 3) if whole[i : i + 3] in (b"F32", b"320", b"64,")]
        at = found[int(share * (len(found) - 1))]
    return whole[:at] + data + whole[at + len(data) :]


def unchanged(one: Any, other: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@many
@given(damages)
def test_headers_of_weights(tmp_path, files, damage):
    (tmp_path / "model.safetensors").write_bytes(damaged(files["model"], damage))
    try:
        found = checkpoint_files.open_safetensors(tmp_path)
        shapes = {name: stored.shape for name, stored in found.items()}
        decoder = weights.assemble(ARCHITECTURE, found.__getitem__, shapes, tmp_path)
    except UserError as error:
        told_in_one_line(error)
        return
    assert damage[2] != b"I32", "whole numbers were taken for weights"
    shapes = [leaf.shape for leaf in jax.tree.leaves(decoder)]
    assert shapes == [leaf.shape for leaf in jax.tree.leaves(tiny_model().backbone)]


@many
@given(damages)
def test_headers_of_vectors(tmp_path, files, damage):
    whole, path = files["vectors"], tmp_path / "vectors.safetensors"
    changed = damaged(whole, damage)
    path.write_bytes(changed)
    try:
        found = load_vectors(path, tiny_model())
    except UserError as error:
        told_in_one_line(error)
        return
    path.write_bytes(whole)
    assert unchanged(found, load_vectors(path, tiny_model())), "altered vectors were taken for whole ones"


@many
@given(damages | st.dictionaries(st.sampled_from(["r", "lora_alpha", "peft_type", "bias", "use_rslora"]), trees))
def test_adapters_of_peft(tmp_path, files, damage):
    own = json.loads(files["adapter"])
    weights_, settings_ = files["peft"], json.dumps(own | damage) if isinstance(damage, dict) else json.dumps(own)
    (tmp_path / "adapter_model.safetensors").write_bytes(
        weights_ if isinstance(damage, dict) else damaged(weights_, damage)
    )
    (tmp_path / "adapter_config.json").write_text(settings_)
    try:
        vectors = load_vectors(tmp_path, tiny_model())
    except UserError as error:
        told_in_one_line(error)
        return
    assert isinstance(damage, dict) or damage[2] != b"I32", "whole numbers were taken for factors"
    vectors.check(tiny_model().architecture)
    assert np.isfinite(vectors.spec.scale)


@many
@given(st.binary(max_size=30) | trees.map(lambda tree: json.dumps(tree).encode())
       | st.dictionaries(st.sampled_from(["command", "config", "environment", "seconds", "rows", "name", "metrics"]),
                         trees).map(lambda tree: json.dumps(tree).encode()))  # fmt: skip
def test_results(tmp_path, data):
    (tmp_path / "results.json").write_bytes(data)
    try:
        assert isinstance(Results.load(tmp_path), Results)
    except UserError as error:
        told_in_one_line(error)


@many
@given(st.text(max_size=60) | st.tuples(texts, st.sampled_from(["Score: ", "**Score:** ", "score = ", ""]),
                                        st.integers(-2, 12), texts).map(lambda p: "".join(map(str, p))))  # fmt: skip
def test_replies_of_judges(reply):
    assert score_of(reply) in (None, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("kind", bad_rows.KINDS)
def test_inputs_of_others(tmp_path, kind):
    assert bad_rows.run(kind, 30, tmp_path) == 30


@pytest.mark.release
@pytest.mark.parametrize("kind", bad_rows.KINDS)
def test_many_inputs_of_others(tmp_path, kind):
    assert bad_rows.run(kind, 500, tmp_path) == 500


@pytest.fixture(scope="module")
def whole_models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    models.make_whole(folder)
    return folder


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.release) for part in range(1, 11))])
@pytest.mark.parametrize("kind", models.KINDS)
def test_damaged_models(whole_models, tmp_path, kind, part):
    """3,000 in the release tier: each is told in one line or read, in bounded time and memory."""
    count = models.KINDS[kind].default
    numbers = range(count) if part == 0 else range(count + 25 * (part - 1), count + 25 * part)
    outcomes = [models.check(kind, number, whole_models, tmp_path / "damaged") for number in numbers]
    assert kind == "checkpoint" or any(outcomes), "no damage was noticed"
