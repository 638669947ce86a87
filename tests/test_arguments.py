"""Arguments of the public functions: a wrong one is a one-line UserError before any work, a right one has any form."""

import dataclasses
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import jax
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import secvec_jax as sv
from secvec_jax import inference
from secvec_jax.data.frames import records_of
from secvec_jax.data.sources import load_prompts
from secvec_jax.defenses import advice, finetuning, inputs, security_vectors, training_settings
from secvec_jax.defenses.inputs import as_row_source
from secvec_jax.output_checks import check_replaceable
from secvec_jax.recipes.export import Export, export
from secvec_jax.recipes.run_inputs import rows_of_files
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.trees import num_parameters
from secvec_jax.vectors.store import load_several
from tests.toys import random_examples, tiny_model

MODEL = tiny_model()
ROWS = [{"prompt": f"What is {n}?", "response": f"It is {n}."} for n in range(6)]
ASKED = [row["prompt"] for row in ROWS]
BRIEF = sv.Training(max_steps=1, batch_size=2, max_seq_len=64, remat="none")
STEERING = sv.Steering().init(MODEL.architecture, jax.random.key(0))

some = settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
junk = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=3),
    st.sampled_from([sv.LoRA, sv.LoRA(), sv.Training, sv.Training(), MODEL, STEERING, object(), len, np.zeros(2),
                     pd.DataFrame(ROWS), datasets.Dataset.from_list(ROWS), {1, 2}, Path("missing")]),
    st.lists(st.none() | st.integers() | st.text(max_size=3), max_size=3),
    st.dictionaries(st.sampled_from(["prompt", "messages", "role", "a"]), st.none() | st.text(max_size=3), max_size=2),
)  # fmt: skip


class Reached(Exception):
    """The work would have begun."""


@pytest.fixture
def no_work(monkeypatch) -> list[dict[str, Any]]:
    """What `generate_tokens` and `fit` are called with, in place of what they do."""
    calls: list[dict[str, Any]] = []

    def tokens(decoder, prompts, adapters, **options):
        calls.append({"prompts": prompts, "adapters": adapters, **options})
        return [[] for _ in prompts]

    def fit(*given, **options):
        calls.append(options)
        raise Reached

    monkeypatch.setattr(inference, "generate_tokens", tokens)
    monkeypatch.setattr(finetuning, "fit", fit)
    monkeypatch.setattr(security_vectors, "fit", fit)
    return calls


def one_line(error: sv.UserError) -> str:
    text = str(error)
    assert text.strip() and "\n" not in text and len(text) < 500, text
    return text


@pytest.mark.parametrize("changes, words", [
    ({"max_new_tokens": 0}, "max_new_tokens is 0: it must be at least 1"),
    ({"max_new_tokens": -4}, "max_new_tokens is -4"),
    ({"max_new_tokens": 4.0}, "max_new_tokens is 4.0: it must be an integer"),
    ({"max_new_tokens": True}, "max_new_tokens is True: it must be an integer"),
    ({"max_new_tokens": 512}, "the model takes 512 tokens in all, prompt and reply"),
    ({"max_new_tokens": 505}, "prompt 1 has .* with max_new_tokens=505 leaves 7 for a prompt"),
    ({"temperature": -1}, "temperature is -1.0: it must be at least 0"),
    ({"temperature": math.nan}, "temperature is nan: it must be a finite number"),
    ({"temperature": math.inf}, "temperature is inf: it must be a finite number"),
    ({"temperature": 1e-30}, "use 0 for the likeliest token"),
    ({"temperature": "0.7"}, "temperature is '0.7': it must be a number"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 2**32}, "seed is 4294967296: it must be at least 0 and at most 4294967295"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"prompts": "Hello"}, r"prompts is 'Hello', a single text: pass a list, \[text\]"),
    ({"prompts": b"Hello"}, "single text"),
    ({"prompts": None}, "prompts is None"),
    ({"prompts": 5}, "prompts is 5"),
    ({"prompts": {"a", "b"}}, "prompts is a set"),
    ({"prompts": ROWS[0]}, r"a single row goes into a list, \[row\]"),
    ({"prompts": [{"role": "user", "content": "Hello"}]}, "prompt 1 is a single message"),
    ({"prompts": ["Hello", []]}, "prompt 2"),
    ({"prompts": ["Hello", None]}, "prompt 2 is None"),
    ({"prompts": [[{"role": "robot", "content": "Hello"}]]}, "prompt 1: unknown role 'robot'"),
    ({"prompts": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]},
     "prompt 1 ends with the assistant's turn"),
    ({"prompts": datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))}, "prompts .* split"),
    ({"model": 5}, "model is 5: pass what sv.load returned"),
    ({"model": "no such model"}, "no model 'no such model'"),
    ({"model": ""}, "model is ''"),
    ({"model": MODEL.backbone}, "model is a Decoder"),
    ({"vectors": "missing.safetensors"}, "no vectors at missing.safetensors"),
    ({"vectors": sv.LoRA()}, "vectors is a LoRA: pass what sv.train_vectors or sv.load_vectors returned"),
    ({"vectors": sv.LoRA}, "vectors is the class LoRA"),
    ({"vectors": [STEERING, 3]}, "vectors is 3"),
    ({"vectors": MODEL}, "vectors is a Model"),
])  # fmt: skip
def test_generate_refuses(no_work, changes, words):
    given = {"model": MODEL, "prompts": ["Hello"], "vectors": None, "max_new_tokens": 4} | changes
    with pytest.raises(sv.UserError, match=words) as error:
        sv.generate(given.pop("model"), given.pop("prompts"), given.pop("vectors"), **given)
    one_line(error.value)
    assert not no_work


@some
@given(st.sampled_from(["model", "prompts", "vectors", "max_new_tokens", "temperature", "seed", "batch_size"]), junk)
def test_generate_takes_it_or_says_why_not(no_work, name, value):
    given = {"model": MODEL, "prompts": ASKED, "vectors": None, "max_new_tokens": 4} | {name: value}
    try:
        replies = sv.generate(given.pop("model"), given.pop("prompts"), given.pop("vectors"), **given)
    except sv.UserError as error:
        one_line(error)
        return
    call = no_work.pop()
    assert len(replies) == len(call["prompts"]) and type(call["max_new_tokens"]) is int
    assert call["max_new_tokens"] >= 1 and call["batch_size"] >= 1
    temperature = call["sampling"].temperature
    assert math.isfinite(temperature) and temperature >= 0 and all(len(tokens) for tokens in call["prompts"])


def test_prompts_in_every_form_are_the_same_prompts(no_work):
    turns = [[{"role": "user", "content": text}] for text in ASKED]
    forms = [ASKED, tuple(ASKED), iter(ASKED), np.asarray(ASKED), pd.Series(ASKED), turns, ROWS, pd.DataFrame(ROWS),
             datasets.Dataset.from_list(ROWS), [{"messages": turn} for turn in turns]]  # fmt: skip
    for form in forms:
        assert len(sv.generate(MODEL, form, max_new_tokens=np.int64(4), temperature=np.float32(0))) == len(ASKED)
    for call in no_work[1:]:
        for tokens, expected in zip(call["prompts"], no_work[0]["prompts"], strict=True):
            np.testing.assert_array_equal(tokens, expected)


def test_vectors_in_every_form_are_the_same_vectors(tmp_path):
    path, tokens = tmp_path / "vectors.safetensors", np.arange(3, 15).reshape(2, 6)
    vectors = jax.tree.map(lambda leaf: leaf + 0.5, STEERING)
    sv.save_vectors(vectors, path, MODEL)
    expected = np.asarray(sv.logits(MODEL, tokens, vectors))
    assert np.abs(expected - np.asarray(sv.logits(MODEL, tokens))).max() > 1e-3
    for form in (str(path), path, [vectors], (path,), [None, vectors]):
        np.testing.assert_array_equal(sv.logits(MODEL, tokens, form), expected)
    for none in (None, (), []):
        np.testing.assert_array_equal(sv.logits(MODEL, tokens.tolist(), none), sv.logits(MODEL, tokens))


@pytest.mark.parametrize("tokens, words", [
    ("Hello", "tokens is 'Hello': pass token ids"),
    ([3, 4, 5], r"shape \(3,\)"),
    ([[]], "shape"),
    ([[3.0, 4.0]], "type float64"),
    ([[True, False]], "type bool"),
    ([[3, 4], [5]], "one length"),
    ([["a"]], "type"),
    ([[3, 320]], "token id 320, which is outside the model's embedding table of 320 rows"),
    ([[3, -1]], "token id -1"),
    ([[3, 2**40]], "token id 1099511627776"),
    (None, "shape"),
    ({"input_ids": [[3]]}, "tokens is a dict"),
])  # fmt: skip
def test_logits_refuse(tokens, words):
    with pytest.raises(sv.UserError, match=words) as error:
        sv.logits(MODEL, tokens)
    one_line(error.value)


VERBS = {
    "align": lambda model, rows, **options: sv.align(model, rows, **options),
    "train_vectors": lambda model, rows, **options: sv.train_vectors(model, rows, **{"benign": ROWS} | options),
    "finetune": lambda model, rows, **options: sv.finetune(model, rows, **{"vectors": None} | options),
}


def call(verb: str, **changes: Any) -> None:
    given = {"model": MODEL, "rows": ROWS, "training": BRIEF} | changes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", advice.Advice)
        VERBS[verb](given.pop("model"), given.pop("rows"), **given)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("changes, words", [
    ({"model": 5}, "model is 5"),
    ({"model": "no such model"}, "no model 'no such model'"),
    ({"rows": None}, "None: pass a list of rows"),
    ({"rows": 5}, "5: pass a list of rows"),
    ({"rows": ROWS[0]}, r"single row: pass a list, \[row\]"),
    ({"rows": {"messages": [{"role": "user", "content": "a"}]}}, "single row"),
    ({"rows": "missing.jsonl"}, "missing.jsonl"),
    ({"rows": []}, "no rows"),
    ({"rows": ["Hello"]}, "row 1: found str"),
    ({"rows": [*random_examples(1), ROWS[0]]}, "examples and a dict"),
    ({"rows": datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))}, "several splits .train.: pass"),
    ({"training": {"max_steps": 1}}, "training is a dict: pass Training"),
    ({"training": sv.Training}, "training is the class Training: pass Training"),
    ({"checkpoints": 5}, "checkpoints is 5: pass a folder"),
    ({"on_step": "print"}, "on_step is 'print': pass a function"),
])  # fmt: skip
def test_trainings_refuse(no_work, verb, changes, words):
    with pytest.raises(sv.UserError, match=words) as error:
        call(verb, **changes)
    one_line(error.value)


@pytest.mark.parametrize("verb, changes, words", [
    ("train_vectors", {"spec": sv.LoRA}, "spec is the class LoRA: pass sv.LoRA"),
    ("train_vectors", {"spec": "lora"}, "spec is 'lora'"),
    ("train_vectors", {"spec": 8}, "spec is 8"),
    ("train_vectors", {"phase1": "kl"}, "phase1 is 'kl': pass Phase1"),
    ("train_vectors", {"benign": 5}, "5: pass a list of rows"),
    ("align", {"task": 16}, "task is 16: pass LoRA"),
    ("finetune", {"task": sv.LoRA}, "task is the class LoRA"),
    ("finetune", {"task": sv.Steering()}, "task is a Steering"),
    ("finetune", {"vectors": []}, "vectors is empty: pass security vectors, or vectors=None"),
    ("finetune", {"vectors": sv.LoRA()}, "vectors is a LoRA"),
    ("finetune", {"vectors": "missing.safetensors"}, "no vectors at"),
])  # fmt: skip
def test_arguments_of_single_trainings(no_work, verb, changes, words):
    with pytest.raises(sv.UserError, match=words) as error:
        call(verb, **changes)
    one_line(error.value)
    assert not no_work


@some
@given(
    st.sampled_from([*VERBS]), st.sampled_from(["model", "rows", "training", "checkpoints", "on_step", "task"]), junk
)
def test_trainings_take_it_or_say_why_not(no_work, verb, name, value):
    name = "benign" if (verb, name) == ("train_vectors", "task") else name
    try:
        call(verb, **{name: value})
    except Reached:
        assert no_work
    except sv.UserError as error:
        one_line(error)
    else:
        pytest.fail("the work did not begin, and nobody said why")


@pytest.mark.parametrize("verb", VERBS)
def test_rows_in_every_form_make_the_same_batches(monkeypatch, tmp_path, verb):
    path = tmp_path / "rows.csv"
    pd.DataFrame(ROWS).to_csv(path, index=False)
    found = []

    def fit(params, phase, train_step, streams, **options):
        found.append(next(iter(streams["learn"].batches())))
        raise Reached

    monkeypatch.setattr(finetuning, "fit", fit)
    monkeypatch.setattr(security_vectors, "fit", fit)
    forms = [ROWS, tuple(ROWS), iter(ROWS), pd.DataFrame(ROWS), datasets.Dataset.from_list(ROWS), str(path), path]
    for form in forms:
        with pytest.raises(Reached):
            call(verb, rows=form)
    for batch in found[1:]:
        for key, expected in found[0].items():
            np.testing.assert_array_equal(batch[key], expected, err_msg=key)


def test_checkpoints_may_be_a_folder(no_work, tmp_path):
    with pytest.raises(Reached):
        call("finetune", checkpoints=str(tmp_path))
    given_ = no_work[0]["checkpoints"]
    assert dataclasses.replace(given_, inputs=Checkpoints(tmp_path).inputs) == Checkpoints(tmp_path)


def test_fine_tuning_without_vectors_is_a_choice(no_work):
    for chosen in (None, STEERING):
        with warnings.catch_warnings(), pytest.raises(Reached):
            warnings.simplefilter("error", advice.Advice)
            sv.finetune(MODEL, ROWS, vectors=chosen, training=BRIEF)
    with pytest.warns(advice.Advice, match="trained unprotected; pass the vectors, or vectors=None"):
        with pytest.raises(Reached):
            sv.finetune(MODEL, ROWS, training=BRIEF)


def test_a_larger_model_with_the_default_learning_rate_is_warned_of(monkeypatch):
    default = security_vectors.PHASE2
    assert advice.default_rate(MODEL, default, default) is None
    monkeypatch.setattr(advice, "num_parameters", lambda tree: 7_200_000_000)
    text = advice.default_rate(MODEL, default, default)
    assert text and "0.00036" in text and "135 million" in text and "7.2 billion" in text
    assert advice.default_rate(MODEL, sv.Training(learning_rate=1e-5), default) is None
    monkeypatch.setattr(advice, "num_parameters", lambda tree: 2 * advice.TUNED_ON)
    assert advice.default_rate(MODEL, default, default) is None


def test_a_task_lora_at_a_rate_for_all_weights_is_warned_of():
    default, task = security_vectors.PHASE2, sv.LoRA(2)
    for slow in (default, dataclasses.replace(training_settings.PHASE2_LORA, optimizer="sgd")):
        text = advice.default_rate(MODEL, slow, training_settings.PHASE2_LORA, task)
        assert text and "a task LoRA needs a higher one, or adamw at 1e-3" in text
    adam = dataclasses.replace(default, optimizer="adamw")
    for training, lora in ((adam, task), (dataclasses.replace(default, learning_rate=0.1), task), (default, None)):
        assert advice.default_rate(MODEL, training, default, lora) is None


def test_settings_say_whether_they_were_measured_for_a_model_of_this_size(monkeypatch):
    default = sv.Training(learning_rate=3.6e-4).over(sv.Training.base)
    told = advice.settings_measured(MODEL, default, None)
    count = num_parameters(MODEL.backbone)
    assert f"all weights: not measured for this size ({count:,} parameters), only on SmolLM2-135M" in told
    monkeypatch.setattr(advice, "TUNED_ON", count)
    assert advice.settings_measured(MODEL, default, None).endswith("measured on SmolLM2-135M (docs/results.md)")
    lora = advice.settings_measured(MODEL, default, sv.LoRA(16))
    assert lora.endswith("a task LoRA of rank 16: not measured for any model")
    lora = advice.settings_measured(MODEL, training_settings.PHASE2_LORA, sv.LoRA(16))
    assert lora.endswith("a task LoRA of rank 16: measured on SmolLM2-135M (docs/protect.md)")
    for other in (sv.LoRA(8), sv.LoRA(16, alpha=32.0), sv.LoRA(16, targets=("q_proj",))):
        assert "not measured for any model" in advice.settings_measured(MODEL, training_settings.PHASE2_LORA, other)
    other = sv.Training(batch_size=8).over(default)
    assert "8 sequences a step, all weights: not measured for any" in advice.settings_measured(MODEL, other, None)


REFUSALS = [{"prompt": f"Harm {n}?", "response": "I'm sorry, but I can't help with that."} for n in range(30)]


@pytest.mark.parametrize("form", [list, pd.DataFrame, datasets.Dataset.from_list, inputs.groups_of])
def test_refusals_alone_are_warned_of(form):
    assert "30 of 30 answers" in (advice.only_refusals(MODEL, form(REFUSALS)) or "")
    assert advice.only_refusals(MODEL, form(REFUSALS + ROWS)) is None
    assert advice.only_refusals(MODEL, form(ROWS)) is None, "a task is no alignment"


def test_refusals_alone_are_known_from_tokens_too():
    found = finetuning.examples_of(MODEL, REFUSALS)
    assert "30 of 30" in (advice.only_refusals(MODEL, {"harmful": found}) or "")
    assert advice.only_refusals(MODEL, {"harmful": found, "benign": finetuning.examples_of(MODEL, ROWS)}) is None


def test_an_alignment_of_few_steps_is_warned_of_once():
    said, steps = [], []
    on_step = advice.note_few_steps(lambda step, total, metrics: steps.append(step), said.append)
    for step in (1, 2):
        on_step(step, 2, {"loss": 1.0})
    assert steps == [1, 2] and len(said) == 1 and "2 steps" in said[0]
    advice.note_few_steps(lambda *_: None, said.append)(1, advice.FEW_STEPS, {"loss": 1.0})
    assert len(said) == 1


@pytest.mark.parametrize("act, words", [
    (lambda folder: MODEL.save(None), "folder is None"),
    (lambda folder: MODEL.save(""), "folder is ''"),
    (lambda folder: MODEL.save(folder / "data.jsonl"), "data.jsonl is a file"),
    (lambda folder: MODEL.save(folder), "contains other files .data.jsonl., which would be deleted"),
    (lambda folder: MODEL.save("."), "current folder"),
    (lambda folder: MODEL.save(folder / "new", card=5), "card is 5"),
    (lambda folder: sv.load(None), "model is None: pass an embedded name"),
    (lambda folder: sv.load(MODEL), "model is a Model"),
    (lambda folder: sv.load(""), "model is ''"),
    (lambda folder: sv.load("a\0b"), "null character"),
    (lambda folder: sv.load_vectors(MODEL, folder), "path is a Model"),
    (lambda folder: sv.load_vectors(folder / "v.safetensors", "smollm2"), "model is 'smollm2'"),
    (lambda folder: sv.save_vectors(folder / "v", STEERING, MODEL), "vectors is "),
    (lambda folder: sv.save_vectors(STEERING, folder, MODEL), "is a folder: name a file"),
    (lambda folder: sv.save_peft(STEERING, folder / "peft", MODEL), "vectors is a SteeringVectors: pass LoRAVectors"),
    (lambda folder: sv.random_like(STEERING, jax.random.key(0)), "vectors is a SteeringVectors"),
    (lambda folder: sv.load_rows(None), "data is None"),
    (lambda folder: sv.load_rows(ROWS), "data is a list"),
    (lambda folder: sv.make_mesh(fsdp=0), "fsdp is 0"),
    (lambda folder: sv.make_mesh(fsdp="8"), "fsdp is '8': it must be an integer"),
])  # fmt: skip
def test_files_and_meshes_refuse(tmp_path, act, words):
    (tmp_path / "data.jsonl").write_text("mine")
    with pytest.raises(sv.UserError, match=words) as error:
        act(tmp_path)
    one_line(error.value)
    assert (tmp_path / "data.jsonl").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_a_key_of_another_kind_is_refused():
    vectors = sv.LoRA(rank=1, targets=("q_proj",)).init(MODEL.architecture, jax.random.key(0))
    with pytest.raises(sv.UserError, match="key is 3: pass a key"):
        sv.random_like(vectors, 3)


def test_a_folder_of_the_same_kind_may_be_replaced(tmp_path):
    check_replaceable(tmp_path, "config.json")
    check_replaceable(tmp_path / "new", "config.json")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    check_replaceable(tmp_path, "config.json")
    with pytest.raises(sv.UserError, match="other files"):
        check_replaceable(tmp_path, "adapter_config.json")


def test_a_folder_with_a_config_that_is_not_a_models_is_not_replaced(tmp_path):
    MODEL.save(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("# A card")
    MODEL.save(tmp_path / "model")
    (tmp_path / "model" / "src").mkdir()
    with pytest.raises(sv.UserError, match=r"contains other files \(src\), which would be deleted"):
        MODEL.save(tmp_path / "model")
    assert (tmp_path / "model" / "src").is_dir()


def test_tables_become_records():
    frame = pd.DataFrame({"prompt": ["a", "b"], "input": ["c", None], "turns": [np.asarray(["x"]), None], "n": [1, 2]})
    expected = [
        {"prompt": "a", "input": "c", "turns": ["x"], "n": 1},
        {"prompt": "b", "input": None, "turns": None, "n": 2},
    ]
    assert records_of(frame) == expected and type(records_of(frame)[0]["n"]) is int
    assert records_of(pa.Table.from_pylist(ROWS)) == ROWS
    for other in (ROWS, "a.jsonl", None, datasets.Dataset.from_list(ROWS)):
        assert records_of(other) is other


def test_reprs_are_short():
    assert repr(MODEL) == "Model('tiny', llama, 2 layers, 39,072 parameters)"
    for spec in (sv.LoRA(), sv.Steering(), sv.SoftPrompt()):
        vectors = spec.init(MODEL.architecture, jax.random.key(0))
        assert type(vectors).__name__ in repr(vectors) and "parameters" in repr(vectors) and len(repr(vectors)) < 200
        assert repr(jax.tree.map(lambda leaf: "name", vectors)), "a tree of other things than arrays has a repr too"
        assert len(repr(spec)) < 120


def test_the_package_shows_its_public_names():
    assert {name for name in dir(sv) if not name.startswith("__")} == set(sv.__all__)
    assert all(hasattr(sv, name) for name in dir(sv))


def test_rows_are_collected_once():
    rows = as_row_source(iter(ROWS), "rows")
    assert rows == ROWS and as_row_source(rows, "rows") is rows


def test_a_line_is_shown_where_someone_watches(monkeypatch, capsys):
    from secvec_jax import progress

    def steps() -> str:
        with progress.step_progress("finetune", None) as show:
            show(1, 2, {"loss": 0.5})
            show(2, 2, {"loss": 0.25})
        return capsys.readouterr().err

    assert steps() == "", "pytest's streams are no terminal"
    monkeypatch.setattr(progress, "_is_watched", lambda: True)
    assert steps().rstrip().endswith("finetune: step 2/2, loss 0.250")
    with progress.step_progress("finetune", SimpleNamespace) as show:
        assert show is SimpleNamespace


def test_what_is_given_twice_is_refused_before_it_counts_twice(tmp_path):
    vectors = sv.LoRA(rank=2).init(MODEL.architecture, jax.random.key(0))
    file = str(tmp_path / "rows.jsonl")
    Path(file).write_text('{"prompt": "a", "response": "b"}\n')
    spelled = f"{tmp_path}/../{tmp_path.name}/rows.jsonl"
    (tmp_path / "link.jsonl").symlink_to(file)
    for twice in (
        lambda: sv.logits(MODEL, [[5, 6]], [vectors, vectors]),
        lambda: load_several([file, file], MODEL),
        lambda: load_prompts(["advbench", "advbench"], 8),
        lambda: rows_of_files([file, file], (), seed=0),
        lambda: rows_of_files([file, spelled], (), seed=0),
        lambda: rows_of_files([file, tmp_path / "link.jsonl"], (), seed=0),
        lambda: export(Export(model="smollm2", adapters=(file, file), out=str(tmp_path / "out")), "command"),
    ):
        with pytest.raises(sv.UserError, match="is given twice, and would count twice"):
            twice()
    sv.save_vectors(vectors, tmp_path / "v/security.safetensors", MODEL)
    for both in ([tmp_path / "v", tmp_path / "v/security.safetensors"], [vectors, tmp_path / "v/security.safetensors"]):
        with pytest.raises(sv.UserError, match="the same vectors are given twice"):
            sv.logits(MODEL, [[5, 6]], both)
