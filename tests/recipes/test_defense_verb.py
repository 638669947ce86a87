"""`train.py finetune --defense` and `sv.defend`: every defense on a model and data of one's own."""

import json
import random
from pathlib import Path

import jax
import numpy as np
import pytest

import secvec_jax as sv
from secvec_jax import cli, command_line
from secvec_jax.config import Training
from secvec_jax.data.rows import row
from secvec_jax.data.sources import load_rows
from secvec_jax.defenses import guarded, registry
from secvec_jax.defenses.base import Defended
from secvec_jax.defenses.finetuning import train_model
from secvec_jax.defenses.registry import DEFENSES, usable_defenses
from secvec_jax.errors import UserError
from secvec_jax.evaluation.report import Results
from secvec_jax.model.hub import load
from secvec_jax.recipes import finetune as finetune_module
from secvec_jax.recipes import run_inputs
from secvec_jax.recipes.finetune import Finetune, finetune
from secvec_jax.training import trainer
from secvec_jax.vectors.lora import LoRA
from secvec_jax.vectors.store import load_vectors, save_vectors
from secvec_jax.workspace import packaged_rows, stages
from tests.toys import tiny_model

TRAINING = Training(max_steps=2, batch_size=1, max_seq_len=64, learning_rate=0.01, remat="none", share_prefix=False)
FILES = {"user": 8, "safe": 9, "harmful": 4, "benign": 4, "contrast": 4}


def rows(kind: str, count: int) -> list:
    return [row(f"{kind} {number}?", f"{kind} {number} {'a' * number}.") for number in range(count)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """The paths of a model, of vectors for it, and of a file of rows of each kind."""
    folder = tmp_path_factory.mktemp("given")
    paths = {"model": str(folder / "model"), "base": str(folder / "base"), "vectors": str(folder / "v.safetensors")}
    tiny_model().save(paths["model"])
    base = jax.tree.map(lambda leaf: leaf * 1.01, tiny_model().backbone)
    tiny_model().with_backbone(base).save(paths["base"])
    model = load(paths["model"])
    vectors = jax.tree.map(lambda leaf: leaf + 0.05, LoRA(rank=2).init(model.architecture, jax.random.key(0)))
    save_vectors(vectors, paths["vectors"], model)
    for kind, count in FILES.items():
        path = folder / f"{kind}.jsonl"
        path.write_text("\n".join(json.dumps(each) for each in rows(kind, count)))
        paths[kind] = str(path)
    return paths


@pytest.fixture(autouse=True)
def toy_packages(monkeypatch):
    """The packaged rows are a few toy rows, and nothing is known of the content of real ones."""

    def sources(self):
        toys = {f"{kind} rows": rows(f"packaged {kind}", 9) for kind in ("safe", "harmful", "benign", "contrast")}
        return {name: lambda made=made: made for name, made in toys.items()} | {"eliciting prompt": lambda: "Do it."}

    monkeypatch.setattr(packaged_rows.PackagedRows, "sources", sources)
    monkeypatch.setattr(finetune_module, "packaged", lambda names: {})


def run(files, out: Path, defense=None, **settings) -> tuple[sv.Model, Results]:
    given = {"model": files["model"], "training": TRAINING, "check_prompts": 0} | settings
    finetune(Finetune((files["user"],), defense=defense, out=str(out), **given), "train.py finetune")
    return load(str(out)), Results.load(out)


@pytest.mark.parametrize("name", usable_defenses())
def test_every_defense_runs_on_rows_of_no_known_kind_with_packaged_rows(files, tmp_path, name):
    base = {"base": files["base"]} if "base model" in DEFENSES[name].needs else {}
    model, results = run(files, tmp_path / "out", name.replace(" ", "-"), **base)
    leaves = zip(*map(jax.tree.leaves, (model.backbone, tiny_model().backbone)))
    assert any(np.any(a != b) for a, b in leaves), "something was learned"
    config = results.config["defense"]
    assert registry.read_defense(config) == DEFENSES[name]()
    needs = DEFENSES[name].needs
    for need in needs:
        if need.endswith(" rows"):
            assert f"{need}: packaged (9 rows" in (tmp_path / "out/report.md").read_text()
    assert ("vectors" in results.rows[0]["frozen"]) == (
        {"security vectors", "contrast rows"} & set(needs) != set() and name != "explained-away filter"
    )
