"""lm-evaluation-harness on our decoder, compared with its Hugging Face backend on the same weights and tasks."""

import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from secvec_jax.errors import UserError
from secvec_jax.evaluation.lm_eval import HarnessModel
from secvec_jax.evaluation.results import Results
from secvec_jax.model import hub
from secvec_jax.recipes.harness import Harness, _metrics, find_tasks, harness
from secvec_jax.sharding import make_mesh

lm_eval = pytest.importorskip("lm_eval")


@pytest.fixture(autouse=True)
def no_census(monkeypatch):
    """Without the harness's list of the machine's packages, for which it starts pip each time."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


TASKS = {
    "our_choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "num_fewshot": 2,
        "fewshot_split": "train",
    },
    "our_perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "our_replies": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[label]}}",
        "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}
COLORS = ["red", "green", "blue", "yellow"]


def write_tasks(folder: Path) -> Path:
    """Three tasks of the harness on rows that lie beside them."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for index in range(9):
        choices = [str(color) for color in rng.permutation(COLORS)[: 2 + index % 3]]
        text = " ".join(f"The {rng.choice(COLORS)} one is number {number}." for number in range(2 + 40 * (index % 3)))
        lines.append({"question": f"What color has thing {index}?", "choices": choices,
                      "label": int(rng.integers(len(choices))), "text": text})  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, lines[:3])))  # of every length; long ones take long
    for name, task in TASKS.items():
        rows = str(folder / ("texts.jsonl" if task["output_type"] == "loglikelihood_rolling" else "rows.jsonl"))
        files = {"train": rows, "test": rows}
        common = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name} | common | task))  # JSON is YAML
    return folder


def evaluated(model, folder: Path, **options):
    found = lm_eval.simple_evaluate(
        model,
        tasks=list(TASKS),
        task_manager=lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )
    answers = {
        name: [reply for sample in sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
               for reply in sample["resps"]] for name in TASKS
    }  # fmt: skip
    return found["results"], answers


def backend(folder: Path, **options):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4, **options)


def assert_alike(ours, theirs):
    for name in TASKS:
        scores = {key: value for key, value in theirs[0][name].items() if "," in key and "stderr" not in key}
        assert scores and {key: ours[0][name][key] for key in scores} == pytest.approx(scores, rel=1e-4)
    pairs = list(zip(ours[1]["our_choices"], theirs[1]["our_choices"], strict=True))
    assert len(pairs) > 20
    for (mine,), (other,) in pairs:
        assert mine[0] == pytest.approx(other[0], abs=1e-3) and mine[1] == other[1]
    for (mine,), (other,) in zip(ours[1]["our_perplexity"], theirs[1]["our_perplexity"], strict=True):
        assert mine == pytest.approx(other, abs=1e-2, rel=1e-5)
    assert ours[1]["our_replies"] == theirs[1]["our_replies"]


@pytest.mark.parametrize(
    ("variant", "chat"),
    [pytest.param(*case, marks=pytest.mark.release) for case in (
        ("qwen3", True), ("llama", False), ("llama", True), ("qwen3", False))],  # by default, test_under_vectors
)  # fmt: skip
def test_as_the_hugging_face_backend(tiny_model, tmp_path, variant, chat):
    tiny, folder = tiny_model(variant), write_tasks(tmp_path / "tasks")
    theirs = evaluated(backend(tiny.folder), folder, apply_chat_template=chat)
    ours = evaluated(HarnessModel(tiny.model), folder, apply_chat_template=chat)
    assert_alike(ours, theirs)


@pytest.mark.release  # by default, replies and losses on a mesh are compared in tests/test_sharded.py
def test_on_a_mesh(tiny_model, tmp_path):
    tiny, folder = tiny_model("llama"), write_tasks(tmp_path / "tasks")
    alone = evaluated(HarnessModel(tiny.model), folder)
    with jax.set_mesh(make_mesh(fsdp=4, tensor=2)):
        spread = evaluated(HarnessModel(hub.load(tiny.folder)), folder)
    assert_alike(spread, alone)


def test_under_vectors(tiny_model, tmp_path, random_vectors):
    """Merged into the weights, the vectors give the Hugging Face backend what ours reads with them on."""
    from secvec_jax.vectors.lora import merge

    tiny, folder = tiny_model("llama"), write_tasks(tmp_path / "tasks")
    vectors = random_vectors(tiny.model, rank=2)
    jax.block_until_ready(vectors)
    tiny.model.with_backbone(merge(tiny.model.backbone, vectors)).save(tmp_path / "merged")
    ours = evaluated(HarnessModel(tiny.model, vectors), folder)
    assert_alike(ours, evaluated(backend(tmp_path / "merged"), folder))
    off = evaluated(HarnessModel(tiny.model), folder)
    assert off[1]["our_choices"] != ours[1]["our_choices"]


@pytest.mark.release
def test_the_embedded_model(tmp_path):
    folder, model = write_tasks(tmp_path / "tasks"), hub.load("smollm2")
    model.save(tmp_path / "model")
    ours = evaluated(HarnessModel(model), folder)
    assert_alike(ours, evaluated(backend(tmp_path / "model"), folder))


@pytest.fixture
def few_tasks(monkeypatch):
    """The harness without its own thousands of tasks, whose files it takes ten seconds to list."""
    manager = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)


def test_the_verb(tiny_model, tmp_path, capsys, few_tasks):
    tiny, folder = tiny_model("llama"), write_tasks(tmp_path / "tasks")
    settings = Harness(
        "our_choices, our_rep*", str(tiny.folder), include=str(folder), limit=4, out=str(tmp_path / "out")
    )
    harness(settings, "python eval.py harness")
    rows = {row["name"]: row["metrics"] for row in Results.load(tmp_path / "out").rows}
    assert set(rows) == {"our_choices", "our_replies"} and set(rows["our_choices"]) == {"acc", "acc_norm"}
    assert rows["our_choices"]["acc"]["n"] == 4
    low, high = rows["our_choices"]["acc"]["ci95"]
    assert low <= rows["our_choices"]["acc"]["value"] <= high
    assert "our_choices" in capsys.readouterr().out


def test_a_group_counts_the_questions_of_the_groups_in_it():
    results = {
        "n-samples": {name: {"effective": count} for name, count in (("a", 3), ("b", 4), ("c", 5))},
        "group_subtasks": {"outer": ["inner", "c"], "inner": ["a", "b"], "a": [], "b": [], "c": []},
        "higher_is_better": {"outer": {"acc": True}, "c": {"ter": False}},
    }
    scores = {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "outer"}
    assert _metrics("outer", scores, results)["acc"] | {"ci95": None} == {
        "value": 0.5, "n": 12, "ci95": None, "higher_is_better": True
    }  # fmt: skip
    all_right = _metrics("c", {"ter,none": 1.0, "ter_stderr,none": 0.0}, results)["ter"]
    assert all_right["n"] == 5 and all_right["higher_is_better"] is False and all_right["ci95"][0] < 0.6


@pytest.mark.parametrize(
    ("given", "message"),
    [({}, "tasks is required"), ({"tasks": "no_such_task"}, "no task 'no_such_task'"),
     ({"tasks": "mmlu", "include": "nowhere"}, "No such directory: nowhere")],
)  # fmt: skip
def test_what_is_wrong_is_reported(given, message, tmp_path, few_tasks):
    with pytest.raises(UserError, match=message):
        harness(Harness(**given, out=str(tmp_path / "out")), "command")


@pytest.mark.release
def test_the_tasks_of_the_harness_are_found(tmp_path):
    _, names = find_tasks(Harness("arc_easy, hellaswag", out=str(tmp_path / "out")))
    assert set(names) == {"arc_easy", "hellaswag"}
    with pytest.raises(UserError, match="no task 'no_such_task'"):
        find_tasks(Harness("no_such_task", out=str(tmp_path / "out")))


def test_what_we_cannot_generate_is_reported(tiny_model, tmp_path):
    tiny, folder = tiny_model("llama"), write_tasks(tmp_path / "tasks")
    for kwargs, message in (({"top_k": 3}, "sets top_k"), ({"max_gen_toks": 512}, "leave no room")):
        with pytest.raises(UserError, match=message):
            evaluated(HarnessModel(tiny.model), folder, gen_kwargs=kwargs)
