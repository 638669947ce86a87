"""`eval.py export`: a model is exported with its history, and without vectors unless they are asked for."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from secvec_jax.config import Training
from secvec_jax.errors import UserError
from secvec_jax.evaluation.results import Results
from secvec_jax.model import hub
from secvec_jax.recipes.align import Align, align
from secvec_jax.recipes.export import Export, export
from secvec_jax.recipes.finetune import Finetune, finetune
from secvec_jax.recipes.score import ScoreRun, score
from secvec_jax.recipes.vectors import Vectors
from secvec_jax.recipes.vectors import vectors as train
from secvec_jax.vectors.lora import LoRA
from secvec_jax.vectors.steering import Steering
from secvec_jax.vectors.store import holds_security_vectors, save_vectors
from tests.processes import run
from tests.toys import tiny_model

ROOT = Path(__file__).parents[2]
QUICK = Training(max_steps=2, max_seq_len=128, batch_size=2, optimizer="adamw", learning_rate=1e-2)
ROWS = [{"prompt": f"What is {n}?", "response": f"It is {n}."} for n in range(8)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A model that was aligned, tuned with vectors and a task LoRA, and scored."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    tiny_model().save(folder / "tiny")
    data, aligned, vectors = (str(folder / name) for name in ("rows.jsonl", "aligned", "vectors"))
    align(
        Align((data,), str(folder / "tiny"), aligned, None, training=QUICK, check_prompts=0),
        "train.py align --data rows.jsonl",
    )
    train(
        Vectors(data, f"{aligned}/model", data, vectors, lora=LoRA(rank=2), training=QUICK, check_prompts=0),
        "train.py vectors",
    )
    worn = (f"{vectors}/vectors/security.safetensors",)
    task = LoRA(rank=2, alpha=4.0)
    tuned = {"out": str(folder / "tuned"), "training": QUICK, "check_prompts": 0}
    finetune(Finetune((data,), worn, f"{aligned}/model", task, **tuned), "train.py finetune")
    judged = str(folder / "tuned/model")
    few = {"limit": 4, "reply_tokens": 4, "out": str(folder / "score")}
    score(ScoreRun(judged, harmful=(data,), benign=(data,), **few), "eval.py score")
    return folder


def test_an_export_is_the_model_with_its_history(runs, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    export(Export(str(runs / "tuned"), scores=(str(runs / "score"),), out=str(tmp_path / "out")), "")
    assert "the model is in" in capsys.readouterr().out
    out = tmp_path / "out"
    assert hub.load(out).fingerprint == hub.load(runs / "tuned/model").fingerprint
    AutoModelForCausalLM.from_pretrained(out)
    assert AutoTokenizer.from_pretrained(out).chat_template == tiny_model().tokenizer.chat_template
    assert GenerationConfig.from_pretrained(out).eos_token_id == tiny_model().tokenizer.eos_token_id
    _, facts, text = (out / "README.md").read_text().split("---\n", 2)
    known = yaml.safe_load(facts)
    (result,) = known.pop("model-index")[0]["results"]
    assert {"type": "refusal", "value": 0.0} in result["metrics"] and str(runs) not in facts
    assert known == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["secvec_jax", "security-vectors"],
    }
    told = [text.index(part) for part in ("train.py align", "train.py finetune", "How it was scored", "eval.py score")]
    assert told == sorted(told)
    assert "are not part of these weights" in text and "| `training.learning_rate` | `0.01` |" in text
    drift = Results.load(runs / "tuned").rows[0]["metrics"]["drift"]["value"]
    assert f"{drift:#.3g}" in text and "refusal ↑ (n=4)" in text and "| jax |" in text
    assert "What is 3" not in text, "a row of the data is in the card"


def test_the_task_is_exported_separately_and_merges_into_the_same_weights(runs, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    export(Export(str(runs / "aligned"), (str(runs / "tuned"),), out=str(tmp_path / "out")), "")
    tuned = hub.load(runs / "tuned/model")
    assert hub.load(tmp_path / "out").fingerprint == tuned.fingerprint
    bare = AutoModelForCausalLM.from_pretrained(runs / "aligned/model")
    before = bare.model.layers[1].mlp.up_proj.weight.detach().numpy().copy()
    worn = PeftModel.from_pretrained(bare, runs / "tuned/task").merge_and_unload()
    kernel = worn.model.layers[1].mlp.up_proj.weight.detach().numpy()
    np.testing.assert_allclose(kernel.T, np.asarray(tuned.backbone.layers.mlp.up_proj.kernel[...][1]), atol=1e-5)
    assert np.abs(kernel - before).max() > 1e-4


def test_scores_of_another_model_are_refused(runs, tmp_path):
    """Also those of the same model with other adapters; the card would show them as those of the exported model."""
    task, out = str(runs / "tuned/task"), str(tmp_path / "out")
    few = {"harmful": (str(runs / "rows.jsonl"),), "benign": (), "limit": 2, "reply_tokens": 4}
    score(ScoreRun(str(runs / "aligned"), (task,), **few, out=str(tmp_path / "with_task")), "")
    for model, scores, adapters, hint in (
        ("aligned", str(runs / "score"), (), r"scored another model \(.*tuned/model\) than .*aligned, so"),
        (
            "aligned",
            str(tmp_path / "with_task"),
            (),
            "scored the model with .*task, and it is exported with no adapters",
        ),
        ("tuned", str(tmp_path / "with_task"), (), "scored another model"),
    ):
        with pytest.raises(UserError, match=hint):
            export(Export(str(runs / model), adapters, scores=(scores,), out=out), "")
    export(Export(str(runs / "aligned"), (str(runs / "tuned"),), scores=(str(tmp_path / "with_task"),), out=out), "")
    assert "Merged into these weights after that: " in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("form", ["vectors/security.safetensors", "vectors/peft"])
def test_vectors_stay_behind_unless_asked(runs, tmp_path, form):
    settings = Export(str(runs / "aligned"), (str(runs / "vectors" / form),), out=str(tmp_path / "out"))
    with pytest.raises(UserError, match="carry-vectors"):
        export(settings, "")
    assert not (tmp_path / "out").exists()
    export(Export(settings.model, settings.adapters, True, out=settings.out), "")
    assert hub.load(tmp_path / "out").fingerprint != hub.load(runs / "aligned/model").fingerprint
    text = (tmp_path / "out/README.md").read_text()
    assert "include security vectors" in text and "are not part of these weights" not in text


def test_an_export_holds_no_file_of_vectors(runs, tmp_path):
    """Of a run directory that holds some beside its model."""
    shutil.copytree(runs / "tuned", tmp_path / "tuned")
    shutil.copytree(runs / "vectors/vectors", tmp_path / "tuned/vectors")
    shutil.copytree(runs / "vectors/vectors", tmp_path / "tuned/model/vectors")
    export(Export(str(tmp_path / "tuned"), out=str(tmp_path / "out")), "")
    assert {path.name for path in (tmp_path / "out").rglob("*")} == {
        "README.md", "checksums.json", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert not holds_security_vectors(path)


def test_a_model_without_a_history_says_so(runs, tmp_path):
    export(Export(str(runs / "tiny"), out=str(tmp_path / "out")), "")
    text = (tmp_path / "out/README.md").read_text()
    assert "No training record" in text and "not scored" in text
    export(Export(str(runs / "aligned"), out=str(tmp_path / "out")), "")
    assert "train.py align" in (tmp_path / "out/README.md").read_text(), "an exported model was not replaced"


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"model": ""}, "model is '': it must be non-empty"),
        ({"scores": ("nowhere",)}, "give the folder of a finished run"),
        ({"adapters": ("nowhere",)}, "no vectors at nowhere"),
        ({"out": "taken"}, "exists and is not a model"),
    ],
)
def test_mistakes_are_reported_before_anything_is_written(runs, tmp_path, monkeypatch, changes, hint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/precious.txt").write_text("mine")
    with pytest.raises(UserError, match=hint):
        export(Export(**{"model": str(runs / "aligned"), "out": "out"} | changes), "")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "taken/precious.txt").read_text() == "mine"


def test_what_is_exported_is_not_replaced_by_the_export(runs, tmp_path):
    folder = tmp_path / "work" / "tiny"
    shutil.copytree(runs / "tiny", folder)
    for out in (folder, folder.parent):
        with pytest.raises(UserError, match=r"would replace what --model|is not a model"):
            export(Export(str(folder), out=str(out)), "")
    (folder.parent / "config.json").write_text("{}")
    with pytest.raises(UserError, match="would replace what --model"):
        export(Export(str(folder), out=str(folder.parent)), "")


def test_steering_has_no_place_in_weights(runs, tmp_path):
    path, model = str(tmp_path / "steering.safetensors"), tiny_model()
    save_vectors(Steering().init(model.architecture, jax.random.key(0)), path, model)
    with pytest.raises(UserError, match="is not LoRA"):
        export(Export(str(runs / "tiny"), (path,), True, out=str(tmp_path / "out")), "")


@pytest.mark.release  # by default, the function is called above, and tests/test_arguments.py reads its flags
def test_from_the_command_line(runs, tmp_path):
    """By an interpreter of its own, as a user starts eval.py; most other tests of verbs call them as functions."""
    command = [sys.executable, "eval.py", "export", "--model", str(runs / "tuned"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refused = run(*command[1:], "--adapters", str(runs / "vectors/vectors/peft"))
    assert refused.returncode == 2 and "carry-vectors" in refused.stderr and "Traceback" not in refused.stderr
