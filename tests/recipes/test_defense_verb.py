"""`train.py finetune --defense` and `sv.defend`: every defense on a model and data of one's own."""

import dataclasses
import json
import random
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

import secvec_jax as sv
from secvec_jax import cli, command_line
from secvec_jax.config import Training
from secvec_jax.data.rows import row
from secvec_jax.data.sources import load_rows
from secvec_jax.defenses import guarded, registry
from secvec_jax.defenses.base import Defended
from secvec_jax.defenses.finetuning import train_model
from secvec_jax.defenses.prompting import SAFETY
from secvec_jax.defenses.registry import DEFENSES, usable_defenses
from secvec_jax.errors import UserError
from secvec_jax.evaluation.card import model_card
from secvec_jax.evaluation.intervals import bootstrap
from secvec_jax.evaluation.refusal_sample import RefusalSample
from secvec_jax.evaluation.results import Results
from secvec_jax.evaluation.suite import Suite
from secvec_jax.model.hub import load
from secvec_jax.recipes import finetune as finetune_module
from secvec_jax.recipes import training_run
from secvec_jax.recipes.finetune import Finetune, finetune
from secvec_jax.training import trainer
from secvec_jax.vectors.lora import LoRA, merge
from secvec_jax.vectors.peft import load_peft
from secvec_jax.vectors.store import load_vectors, save_vectors
from secvec_jax.workspace import packaged_rows, stages
from secvec_jax.workspace.stage import Stage
from tests.toys import example, tiny_model

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


QUICK = ("guarded vectors", "explained-away filter", "booster", "inoculation prompting", "caft", "ptst")
"""Of the defenses, which all run in grids in tests/grid/test_grid.py: together they need what any of them needs."""


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.release) for name in usable_defenses()]
)
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
        {"security vectors", "contrast rows"} & set(needs) != set() and name not in ("explained-away filter", "sbr")
    )


def direct(files, how, **options) -> sv.Model:
    """The model of a direct call on the same rows."""
    model = load(files["model"])
    return how(model, load_rows(files["user"]), training=TRAINING, **options)


def test_the_verb_and_the_function_give_what_a_direct_call_gives_bit_by_bit(files, tmp_path):
    vectors = load_vectors(files["vectors"], load(files["model"]))
    safe = random.Random(TRAINING.over(sv.Training.base).seed).sample(load_rows(files["safe"]), FILES["safe"])
    plain, _ = run(files, tmp_path / "plain", "none")
    assert plain.fingerprint == direct(files, train_model).fingerprint
    under, results = run(files, tmp_path / "under", vectors=(files["vectors"],))
    assert under.fingerprint == direct(files, sv.finetune, vectors=vectors).fingerprint
    assert results.config["defense"]["name"] == "security vectors"
    given = {"vectors": (files["vectors"],), "safe": (files["safe"],)}
    guard, _ = run(files, tmp_path / "guard", {"name": "guarded vectors", "weight": 2}, **given)
    assert guard.fingerprint == direct(files, guarded.finetune, vectors=vectors, safe=safe, weight=2.0).fingerprint
    defense = sv.defenses.GuardedVectors(weight=2)
    defended = direct(files, sv.defend, defense=defense, vectors=files["vectors"], safe=safe)
    assert isinstance(defended, Defended) and defended.model.fingerprint == guard.fingerprint
    assert len({plain.fingerprint, under.fingerprint, guard.fingerprint}) == 3


def test_a_defense_of_two_trainings_resumes_each_of_them_exactly(files, tmp_path, monkeypatch):
    stop_at: list[tuple[str, int]] = []
    on_step = Stage.on_step

    def stopping(self):
        show = on_step(self)

        def shown(step, steps, metrics):
            show(step, steps, metrics)
            if (self.name, step) in stop_at:
                raise KeyboardInterrupt

        return shown

    monkeypatch.setattr(Stage, "on_step", stopping)
    training = Training(max_steps=4).over(TRAINING)
    options = {"base": files["base"], "safe": (files["safe"],)}
    whole, _ = run(files, tmp_path / "whole", "vaccine", training=training, **options)
    options["training"] = Training(save_every_seconds=1e-9).over(training)
    for stop in (("align", 3), ("finetune", 3)):
        stop_at[:] = [stop]
        with pytest.raises(KeyboardInterrupt):
            run(files, tmp_path / "stopped", "vaccine", **options)
    stop_at.clear()
    resumed, results = run(files, tmp_path / "stopped", "vaccine", **options)
    assert resumed.fingerprint == whole.fingerprint
    steps = [json.loads(line) for line in (tmp_path / "stopped/metrics.jsonl").read_text().splitlines()]
    taken = [(record["stage"], record["step"]) for record in steps]
    assert taken.count(("align", 1)) == taken.count(("finetune", 1)) == 1, "neither started over"
    assert set(results.seconds) == {"align", "finetune"}


def test_the_vectors_of_a_run_are_trained_once_and_found_in_its_folder(files, tmp_path, capsys):
    known = {"harmful": (files["harmful"],), "benign": (files["benign"],)}
    _, results = run(files, tmp_path / "first", "security vectors", **known)
    kept = load_vectors(tmp_path / "first", load(files["model"]))
    assert results.rows[0]["vectors"] == [str(tmp_path / "first/vectors")]
    assert "- security-vectors\n" in model_card("mine", None, [results], [])
    again, results = run(files, tmp_path / "again", vectors=(str(tmp_path / "first"),))
    assert again.fingerprint == load(str(tmp_path / "first")).fingerprint
    assert results.rows[0]["vectors"] == [str(tmp_path / "first")] and kept.spec == LoRA()
    said = " ".join(capsys.readouterr().out.split())
    assert f"harmful rows: {files['harmful']} (4 rows)" in said


def test_a_system_prompt_is_stored_measured_and_reported(files, tmp_path, monkeypatch, capsys):
    systems = []

    def measure(model, suite):
        systems.append(suite.system)
        refused = len(systems) * 2  # two before, four after
        return RefusalSample(
            bootstrap([1.0] * refused + [0.0] * (5 - refused)), bootstrap([0.0] * 5), bootstrap([1.0] + [0.0] * 3)
        )

    monkeypatch.setattr(training_run, "sample_prompts", lambda count: Suite((), ["harm"] * 5, ["benign"] * 4))
    monkeypatch.setattr(training_run, "measure", measure)
    out = tmp_path / "out"
    _, results = run(files, out, "ptst", check_prompts=5)
    system = SAFETY
    assert systems == [None, system] and results.rows[0]["system"] == system
    assert (out / "system_prompt.txt").read_text() == system + "\n" and system in (out / "model/README.md").read_text()
    assert results.rows[0]["metrics"]["refusal"]["value"] == 0.8
    said = " ".join(capsys.readouterr().out.split())
    assert "refuses 4 of 5 harmful prompts (before: 2), complies with 0 (before: 0)" in said
    assert "answers 3 of 4 benign ones (before: 3)" in said
    assert system in model_card("mine", None, [results], [])
    assert "serve the model with it" in said and "the loss of your rows was" in said


def test_what_is_frozen_is_checked_and_reported(files, tmp_path, monkeypatch, capsys):
    lora = {"vectors": (files["vectors"],), "task_lora": LoRA(rank=2)}
    _, results = run(files, tmp_path / "fine", **lora)
    model = load(files["model"])
    assert results.rows[0]["frozen"]["backbone"] == model.fingerprint
    said = " ".join(capsys.readouterr().out.split())
    assert f"frozen, the same before and after: backbone sha256 {model.fingerprint[:12]}, vectors sha256" in said

    combine = trainer.combine

    def moving_all(trained, frozen):
        return jax.tree.map(lambda leaf: leaf + 1e-3, combine(trained, frozen))

    monkeypatch.setattr(trainer, "combine", moving_all)
    with pytest.raises(UserError, match=r"the vectors, which the training keeps frozen, changed in it \(sha256"):
        run(files, tmp_path / "wrong", vectors=(files["vectors"],))
    assert not (tmp_path / "wrong/model").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"defense": "vacine"}, "no defense is named 'vacine': did you mean 'vaccine'"),
        (
            {"defense": {"name": "lisa", "weight": 1}},
            "'lisa' has no setting 'weight': its settings are rho=1, aligned_",
        ),
        ({"defense": {"name": "lisa", "rho": -1}}, "'lisa': rho is -1.0: it must be at least 0"),
        ({"defense": {"rho": 2}}, "--defense.rho is given without --defense"),
        (
            {"defense": "benign only"},
            "'benign only' is for grids only: it drops the attack's rows, which only an",
        ),
        ({"defense": "vaccine"}, "'vaccine' needs --base: the model before it was aligned"),
        ({"defense": "lisa", "vectors": ("v",)}, "'lisa' reads no security vectors: leave out --vectors"),
        ({"defense": "lisa", "contrast": ("c",)}, "'lisa' reads no contrast rows: leave out --contrast"),
        (
            {"defense": "guarded vectors", "vectors": ("none",)},
            "'guarded vectors' needs vectors: leave out --vectors none",
        ),
        (
            {"vectors": ("v",), "harmful": ("h",)},
            "reads no harmful rows, since the vectors are given: leave out --harmful",
        ),
        ({"vectors": ("v", "none")}, "--vectors has both files and none"),
        ({}, "vectors is required"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(settings, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        Finetune(("rows.jsonl",), **settings)


def test_settings_of_vectors_that_are_given_are_refused(files, tmp_path):
    with pytest.raises(
        UserError, match="rank=4, alpha=8: these are settings for training vectors, but trained vectors are given"
    ):
        run(files, tmp_path / "out", {"name": "security vectors", "rank": 4}, vectors=(files["vectors"],))


def test_the_function_names_its_arguments(files):
    model = tiny_model()
    user = rows("user", 2)
    with pytest.raises(UserError, match="vectors is empty"):
        sv.defend(model, user, "security vectors", vectors=[])
    with pytest.raises(UserError, match=r"'vaccine' needs base=: the model before"):
        sv.defend(model, user, sv.defenses.Vaccine())
    with pytest.raises(UserError, match=r"reads no contrast rows: leave out contrast="):
        sv.defend(model, user, "lisa", contrast=user)
    with pytest.raises(UserError, match=r"defense is the class Lisa: pass one of sv.defenses"):
        sv.defend(model, user, sv.defenses.Lisa)
    with pytest.raises(UserError, match="both=capitals' is for grids only: it takes vectors of another behavior"):
        sv.defend(model, user, sv.defenses.SecurityVectors(both="capitals"), vectors=files["vectors"])


def test_what_it_says_of_the_loss_is_of_the_last_training_on_the_users_rows(tmp_path):
    log = tmp_path / "metrics.jsonl"

    def said(*records) -> str | None:
        log.write_text("".join(json.dumps({"stage": stage, "step": 1} | losses) + "\n" for stage, losses in records))
        return finetune_module._learned(log, ["a", "b"])

    first, then = ("finetune", {"loss/a": 5.0}), ("finetune", {"loss/a": 1.0, "loss/b": 3.0})
    assert said(first, then, ("finetune", {"loss/b": 2.0})) == (
        "the loss of your rows was 4.00 at first and 1.50 at the end of the training"
    ), "kind by kind: not every step has rows of each"
    safe, kept = ("finetune 2", {"loss/safe": 0.1}), ("finetune 3", {"loss/a": 0.5})
    assert said(first, then, safe, kept).startswith("the loss of your rows was 0.50 at first and 0.50")
    assert said(first, then, safe).endswith("at the end of the training; another training, on other rows, followed")
    once = ("finetune", {"loss/a": 1.0, "eval/loss": 4.0})
    assert said(first, once) == "the validation loss was 4.00 at the end of the training, and was not measured before"
    assert said(("vectors", {"loss/a": 5.0}), safe) is None


def test_a_task_lora_belongs_to_the_model_that_the_defense_aligned(files, tmp_path):
    options = {"task_lora": LoRA(rank=2), "safe": (files["safe"],), "base": files["base"]}
    tuned, _ = run(files, tmp_path / "out", "random perturbation", **options)
    aligned = load(str(tmp_path / "out/aligned"))
    adapter = load_peft(tmp_path / "out/task", aligned)
    np.testing.assert_allclose(
        jax.tree.leaves(merge(aligned.backbone, adapter))[0], jax.tree.leaves(tuned.backbone)[0], atol=1e-6
    )


def test_where_that_model_is_not_kept_the_task_lora_is_only_merged(files, tmp_path):
    model, elsewhere = load(files["model"]), load(files["base"])
    tuned = train_model(elsewhere, rows("user", 4), task=LoRA(rank=2), training=TRAINING)
    gone = dataclasses.replace(tuned.adapter, origin=tuned.adapter.origin._replace(name="no folder"))
    note = training_run.save_trained(tmp_path, dataclasses.replace(tuned, adapter=gone), model, None)
    assert "merged into the model and not saved by itself" in note
    assert not (tmp_path / "task").exists() and load(str(tmp_path / "model")).fingerprint == tuned.fingerprint


def test_random_vectors_are_as_many_as_are_given(files):
    model = load(files["model"])
    given = [load_vectors(files["vectors"], model)]
    guarded_random = sv.defenses.GuardedVectors(under="random")
    options = {"safe": files["safe"], "training": TRAINING}
    for vectors in (given, [*given, jax.tree.map(lambda leaf: 2 * leaf, given[0])]):
        defended = sv.defend(model, files["user"], guarded_random, vectors=vectors, **options)
        assert defended.model.fingerprint != model.fingerprint
    with pytest.raises(UserError, match="under=irrelevant' is for grids only"):
        sv.defend(model, files["user"], sv.defenses.GuardedVectors(under="irrelevant"), vectors=given, **options)


def test_validation_rows_and_a_task_lora_work_with_a_defense_of_two_trainings(files, tmp_path, capsys):
    options = {"task_lora": LoRA(rank=2), "eval_fraction": 0.25, "safe": (files["safe"],)}
    _, results = run(files, tmp_path / "out", {"name": "sequential", "steps": 3}, **options)
    log = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [(record["stage"], record["step"]) for record in log] == [
        ("finetune", 1), ("finetune", 2), ("finetune 2", 1), ("finetune 2", 2), ("finetune 2", 3)
    ]  # fmt: skip
    said = " ".join(capsys.readouterr().out.split())
    assert "eval/loss" in log[1] and "the validation loss was" in said
    assert "another training, on other rows, followed" in said
    assert (tmp_path / "out/task/adapter_config.json").exists()
    assert results.rows[0]["frozen"] == {"backbone": load(files["model"]).fingerprint}


def test_the_time_of_a_stage_within_a_stage_counts_once(tmp_path):
    found = stages.Stages(tmp_path, Console(quiet=True))
    found.run("outer", lambda stage: found.run("inner", lambda within: time.sleep(0.2)))
    assert found.seconds["inner"] >= 0.2 > found.seconds["outer"]


def parsed(*arguments: str) -> Finetune:
    return command_line.parse(cli.TRAIN["finetune"], Finetune, ["finetune", "--data", "x", *arguments])[0]


def test_a_defense_is_given_by_flags_or_by_a_file_that_flags_override(tmp_path, capsys):
    assert parsed("--defense", "lisa", "--defense.rho", "2").defense["rho"] == 2.0
    assert parsed("--defense", "none").defense == {"name": "none"}
    config = tmp_path / "config.yaml"
    config.write_text("defense: {name: guarded-vectors, weight: 3}\n")
    guarded_3 = {"name": "guarded vectors", "weight": 3.0, "rank": 8, "safe_batch": 1.0}
    guarded_3 |= {"under": "trained", "share": 1.0}
    assert parsed("--config", str(config)).defense == guarded_3
    assert parsed("--config", str(config), "--defense.rank", "4").defense["weight"] == 3.0
    assert parsed("--config", str(config), "--defense", "lisa").defense["name"] == "lisa"
    config.write_text("defense: guarded vectors\n")
    assert parsed("--config", str(config), "--defense.rank", "4").defense["rank"] == 4
    for words in ((), ("list",)):
        with pytest.raises(SystemExit) as ended:
            parsed("--defense", *words)
        assert not ended.value.code
        shown = capsys.readouterr().out
        for name, defense in DEFENSES.items():
            assert f"\n{name}: " in f"\n{shown}" or f"    {name}: {defense.only_in_grids}" in shown
        assert shown.count("cost:") == shown.count("evidence:") == len(usable_defenses())


def test_packaged_safe_rows_leave_out_the_prompts_that_the_model_is_measured_on(own_cache, tmp_path, monkeypatch):
    """Its own replies to the others are made once and kept in the cache, and in the run's file."""
    monkeypatch.undo()
    monkeypatch.setenv("SECVEC_CACHE", str(own_cache))
    made = []

    class Splits:
        refusals, align_benign = ["refusal"] * 2, ["a", "b", "c"]
        suite = type("Suite", (), {"refusals": ()})

    monkeypatch.setattr(packaged_rows, "make_splits", lambda *_: Splits())

    def greedy_openings(model, prompts, *_):
        made.append(prompts)
        return [example([ord(prompt)], [1, 2]) for prompt in prompts]

    def own_replies(without=(), **options) -> list[int]:
        training = TRAINING.over(Training.base)
        safe = packaged_rows.PackagedRows(tiny_model(), training, without=without, **options).sources()["safe rows"]()
        assert safe.count("refusal") == 2
        assert all(each.supervised.tolist() == [False, True, True] for each in safe if each != "refusal")
        return sorted(int(each.tokens[0]) for each in safe if each != "refusal")

    monkeypatch.setattr(packaged_rows, "greedy_openings", greedy_openings)
    assert own_replies(["b"]) == own_replies(["b"]) == [ord("a"), ord("c")] and made == [["a", "c"]]
    assert own_replies(file=tmp_path / "replies.json") == [ord("a"), ord("b"), ord("c")] and len(made) == 2
    shutil.rmtree(own_cache / "results")
    assert own_replies(file=tmp_path / "replies.json") == [ord("a"), ord("b"), ord("c")] and len(made) == 2
    assert own_replies() == [ord("a"), ord("b"), ord("c")] and len(made) == 3
