"""`train.py protect` and `sv.protect`: the whole command on toys, resumed, cached, gated, and its verdicts."""

import dataclasses
import json
import re
import shutil
import threading
from pathlib import Path

import jax
import nbformat
import pytest

import secvec_jax as sv
from secvec_jax import cli, command_line, inference
from secvec_jax.data.rows import row
from secvec_jax.defenses.gate import Gate, num_gate_rows
from secvec_jax.evaluation.audit import Audit, Line
from secvec_jax.evaluation.intervals import Score, bootstrap
from secvec_jax.evaluation.judge_client import Judge
from secvec_jax.evaluation.refusal_sample import RefusalSample
from secvec_jax.evaluation.results import Results
from secvec_jax.evaluation.suite import Suite
from secvec_jax.inference import as_model
from secvec_jax.model.hub import load
from secvec_jax.model.quantized import linear_of
from secvec_jax.recipes import audit_stages, protect_stages, protect_vectors, protect_work
from secvec_jax.recipes import protect as protect_module
from secvec_jax.recipes.protect_stages import num_held_out
from secvec_jax.trees import fingerprint
from secvec_jax.vectors.lora import merge
from secvec_jax.vectors.peft import load_peft
from secvec_jax.vectors.store import load_vectors, trained_over
from secvec_jax.workspace import packaged_rows, stages, vector_cache
from secvec_jax.workspace.result_cache import inputs_of
from tests.toys import random_decoder, tiny_model

FLAGS = ("--max-steps", "2", "--batch-size", "2", "--max-seq-len", "64", "--remat", "none", "--no-share-prefix")
SECRET = "forbidden"


def rows(kind: str, count: int, reply: str = "yes") -> list:
    return [row(f"{kind} {number}?", f"{reply} {number % 3}") for number in range(count)]


def verdict(name: str, difference: float = 0.0) -> Audit:
    score = Score(difference, 96, (difference, difference))
    return Audit("before", "after", (Line("compliance", score, score, score, 0.05, name),))


@pytest.fixture
def toys(request, tmp_path, monkeypatch, own_cache):
    """A model and a user's file; what is packaged is a few toy rows. `refused`: how many of 10 prompts it refuses."""

    class Toys:
        def __init__(self):
            self.folder, self.model, self.refused = tmp_path, str(tmp_path / "aligned"), 10
            self.trained = self.sampled = 0

    toys = Toys()
    tiny_model().save(toys.model)
    user = [*rows("user", 44, "a fox jumps"), *rows("harmful", 4, SECRET)]
    (tmp_path / "user.jsonl").write_text("\n".join(map(json.dumps, user)))
    packaged = {
        "safe rows": rows("packaged safe", 9, "no"),
        "harmful rows": rows("harmful", 24, SECRET),
        "benign rows": rows("packaged benign", 24, "a dog jumps"),
    }
    held_out = {"harmful": rows("harmful", 9, SECRET), "benign": rows("held out", 9, "a dog jumps")}
    monkeypatch.setattr(
        packaged_rows.PackagedRows,
        "sources",
        lambda self: {need: lambda need=need: packaged[need] for need in packaged},
    )
    monkeypatch.setattr(packaged_rows.PackagedRows, "held_out", lambda self: held_out)
    monkeypatch.setattr(protect_module, "packaged", lambda names: {})
    phase1 = sv.Training(learning_rate=0.06, epochs=3).over(protect_work.PHASE1)
    monkeypatch.setattr(protect_work, "PHASE1", phase1)
    prompts = {"harmful": rows("harm", 12), "unseen": rows("harmful", 4, SECRET), "benign": rows("benign", 12)}
    monkeypatch.setattr(audit_stages, "_packaged", lambda model: prompts)
    monkeypatch.setattr(protect_stages, "before_alignment", lambda model: toys.model)
    monkeypatch.setattr(protect_stages, "sample_prompts", lambda count: Suite(()))
    if request.function is not test_the_whole_command:  # one picture is enough
        monkeypatch.setattr(protect_stages, "write_histogram", lambda path, screening: None)

    def measure(model, suite):
        toys.sampled += 1
        refusal = bootstrap([1.0] * toys.refused + [0.0] * (10 - toys.refused))
        return RefusalSample(refusal, bootstrap([0.0] * 10), bootstrap([0.0] * 10))

    monkeypatch.setattr(protect_stages, "measure", measure)
    train_vectors = protect_vectors.train_vectors

    def counted(*arguments, **options):
        toys.trained += 1
        return train_vectors(*arguments, **options)

    monkeypatch.setattr(protect_vectors, "train_vectors", counted)
    return toys


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """What the first `known` leaves for the others."""
    return tmp_path_factory.mktemp("known")


@pytest.fixture
def known(toys, own_cache, kept):
    """The toys, and in the cache what a first `protect` of their model leaves: its vectors, refusals and scores."""
    if not any(kept.iterdir()):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(protect_stages, "audited", lambda *_: verdict("passes"))
            assert run(toys, "--defense", "none", out="known") == 0
        made = toys.folder / "known"
        assert load(made / "model").fingerprint != load(toys.model).fingerprint and not (made / "task").exists()
        for name in ("vectors", "results"):
            shutil.copytree(own_cache / name, kept / name)
    else:
        for name in ("vectors", "results"):
            shutil.copytree(kept / name, own_cache / name)
    toys.trained = toys.sampled = 0
    return toys


@pytest.fixture
def judged(monkeypatch):
    """No model is asked in the audit, whose verdict is `judged.verdict`; `judged.data` is what it was given."""

    class Judged:
        verdict, data, before, after, asked = "passes", None, None, None, None

    def audited(asked, run_stages, reads):
        Judged.data, Judged.before = asked.rows_of("data"), asked.models["before"]
        Judged.after, Judged.asked = as_model(asked.models["after"]), asked
        return verdict(Judged.verdict)

    monkeypatch.setattr(protect_stages, "audited", audited)
    return Judged


def run(toys, *flags: str, out: str = "out") -> int:
    given = ["protect", "--model", toys.model, "--data", str(toys.folder / "user.jsonl")]
    return command_line.main("", cli.TRAIN, [*given, "--out", str(toys.folder / out), *FLAGS, *flags])


def run_until(toys, stage: str, *flags: str, out: str) -> None:
    """A run that is interrupted in a stage whose results, as those of the stages after it, nothing reads."""
    with pytest.MonkeyPatch.context() as patched:
        stop_in(patched, stage)
        assert run(toys, *flags, out=out) == command_line.INTERRUPTED


def told(capsys) -> str:
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


def suspects(toys, out: str = "out") -> list[dict]:
    return [json.loads(line) for line in (toys.folder / out / "suspects.jsonl").read_text().splitlines()]


def test_the_whole_command(toys, capsys):
    code = run(toys, "--max-prompts", "12", "--reply-tokens", "4")
    said, out = told(capsys), toys.folder / "out"
    assert code in (0, 3, 4) and "error" not in said, said
    assert "defense: guarded vectors (recommended" in said and "the gate passes" in said
    assert "settings: sgd at a learning rate of 0.00036, 2 sequences a step, all weights: not measured for" in said
    assert "48 with answers" in said and "exact duplicates: 0" in said and "training on 40 rows" in said
    found = suspects(toys)
    assert {line["row"] for line in found} == {44, 45, 46, 47}
    assert found[0].keys() == {"row", "where", "score"} and "user.jsonl, line 4" in found[0]["where"]
    results = Results.load(out)
    assert [each["name"] for each in results.rows] == ["before", "after", "after minus before"]
    assert results.rows[1]["metrics"]["data_loss"]["n"] == 8, "the user's held-out rows"
    assert results.rows[1]["gate"]["passes"] and results.rows[1]["suspects"] == 4 and results.rows[1]["dropped"] == 0
    assert "the loss of your 8 held-out rows is" in said
    card = (out / "model" / "README.md").read_text()
    assert f"## Audit: {['passes', '', '', 'fails', 'inconclusive'][code]}" in card and "security-vectors" in card
    assert (out / "report.html").is_file() and (out / "histogram.png").is_file() and not (out / "checkpoints").exists()
    assert set(results.seconds) >= {"preflight", "vectors", "screen", "fine-tune", "before", "after", "general"}
    assert load(str(out)).fingerprint != load(toys.model).fingerprint


STAGES = {
    "preflight": (protect_stages, "measure"),
    "vectors": (protect_vectors, "measure_gate"),
    "screen": (protect_stages, "score_rows"),
    "fine-tune": (protect_stages, "save_trained"),
    "division of rows": (protect_module, "divide"),
    "audit": (protect_stages, "audited"),
}


def stop_in(patched: pytest.MonkeyPatch, stage: str) -> None:
    """Interrupt the next command in this stage."""

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    patched.setattr(*STAGES.get(stage, (protect_vectors, "train_vectors")), stop)


def test_a_command_interrupted_in_any_stage_goes_on_there(toys, judged, monkeypatch, capsys):
    begun = []
    show = stages.Stages.show
    monkeypatch.setattr(stages.Stages, "show", lambda self, name: begun.append(name) or show(self, name))
    for stage in ("preflight", "vectors", "screen", "fine-tune", "audit"):
        with monkeypatch.context() as patched:
            stop_in(patched, stage)
            assert run(toys) == command_line.INTERRUPTED
        assert "stopped: rerun the same command" in told(capsys)
    assert run(toys) == 0
    once = ["preflight", "vectors", "screen", "fine-tune"]
    assert begun == [name for name in once for _ in range(2)], "each a second time, where it was interrupted"
    whole = load(str(toys.folder / "out")).fingerprint
    assert run(toys, out="whole") == 0 and load(str(toys.folder / "whole")).fingerprint == whole


def test_vectors_are_trained_once_for_a_model_and_its_rows(toys, judged, capsys):
    run_until(toys, "screen", out="first")
    run_until(toys, "screen", "--defense", "none", "--seed", "3", out="second")
    assert toys.trained == 1 and "vectors: from the cache" in told(capsys)
    file = toys.folder / "first/vectors/security.safetensors"
    first, second = (load_vectors(toys.folder / out, load(toys.model)) for out in ("first", "second"))
    assert fingerprint(first) == fingerprint(second)
    (entry,) = (path for path in (toys.folder / "cache" / "vectors").iterdir() if path.is_dir())
    assert oct(entry.stat().st_mode)[-3:] == "700"

    (entry / "security.safetensors").write_bytes(file.read_bytes()[:-7])
    run_until(toys, "screen", out="third")
    assert toys.trained == 2 and "the cached vectors cannot be read" in told(capsys)
    (entry / "entry.json").write_text((entry / "entry.json").read_text().replace(sv.__version__, "0.1.9"))
    run_until(toys, "screen", out="fourth")
    assert toys.trained == 3 and "the cached vectors are from version 0.1.9" in told(capsys)
    run_until(toys, "screen", out="fifth")
    assert toys.trained == 3


def test_what_is_known_of_a_model_is_not_made_again(toys, judged, monkeypatch, capsys):
    """A second protect, of other rows, scores these alone, and does not sample the model's refusals."""
    scored = []
    score_rows = protect_stages.score_rows
    monkeypatch.setattr(
        protect_stages,
        "score_rows",
        lambda model, vectors, some: scored.append(len(some)) or score_rows(model, vectors, some),
    )
    run_until(toys, "division of rows", out="first")
    assert scored == [48, 24, 24] and toys.sampled == 1
    first = (toys.folder / "first" / "suspects.jsonl").read_text()
    capsys.readouterr()
    run_until(toys, "division of rows", out="second")
    assert scored == [48, 24, 24, 48] and toys.sampled == 1
    said = told(capsys)
    assert "scores of known rows: from the cache" in said and "before: refusal 100%" in said
    assert (toys.folder / "second" / "suspects.jsonl").read_text() == first
    run_until(toys, "division of rows", "--check-prompts", "0", "--vectors", str(toys.folder / "first"), out="third")
    assert scored == [48, 24, 24, 48, 48], "the same vectors, given by hand"
    (toys.folder / "own.jsonl").write_text("\n".join(map(json.dumps, rows("harmful", 20, SECRET))))
    run_until(toys, "division of rows", "--harmful", str(toys.folder / "own.jsonl"), out="fourth")
    assert scored[5:] == [48, 20, 24] and toys.trained == 2 and toys.sampled == 1
    for file in (toys.folder / "cache" / "results").glob("*/*.json"):
        file.write_text(file.read_text()[:-9])
    run_until(toys, "division of rows", out="fifth")
    assert scored[8:] == [48, 24, 24] and toys.sampled == 2
    assert "the cached scores of known rows cannot be read" in told(capsys)


def test_other_rows_or_settings_have_other_vectors():
    model = tiny_model()
    other = model.with_backbone(random_decoder(seed=1))
    base = {"harmful rows": rows("a", 3), "benign rows": rows("b", 3)}
    key = vector_cache.key_of(model, base, sv.Training(), sv.LoRA())
    assert key == vector_cache.key_of(model, dict(reversed(base.items())), sv.Training(remat="full"), sv.LoRA())
    others = [
        vector_cache.key_of(model, base | {"benign rows": rows("b", 4)}, sv.Training(), sv.LoRA()),
        vector_cache.key_of(model, base, sv.Training(epochs=9), sv.LoRA()),
        vector_cache.key_of(model, base, sv.Training(), sv.LoRA(rank=2)),
        vector_cache.key_of(other, base, sv.Training(), sv.LoRA()),
    ]
    assert len({key, *others}) == 5


def test_who_comes_second_waits_for_the_vectors_of_the_first(own_cache):
    model, told, found = tiny_model(), [], []
    vectors = sv.LoRA(rank=2).init(model.architecture, jax.random.key(0))

    def second():
        with vector_cache.locked_entry("key", lambda text: told.append(text) or waiting.set()) as entry:
            found.append(entry.read(model, told.append))

    waiting = threading.Event()
    with vector_cache.locked_entry("key", told.append) as entry:
        assert entry.read(model, told.append) is None and told == []
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(60) and found == [], "it waits"
        entry.write(vectors, model, {"measured": 1.0})
    thread.join(60)
    assert told == ["another process is training the vectors of this model: waiting for it"]
    assert fingerprint(found[0][0]) == fingerprint(vectors) and found[0][1] == {"measured": 1.0}


def test_vectors_that_do_not_pass_the_gate_stop_the_command(toys, judged, monkeypatch, capsys):
    weak = sv.Training(learning_rate=1e-6, epochs=1).over(protect_work.PHASE1)
    monkeypatch.setattr(protect_work, "PHASE1", weak)
    for _ in range(2):
        assert run(toys) == 2
        assert "the vectors do not show the behavior: the loss of 8 harmful rows" in told(capsys)
    assert toys.trained == 1 and not (toys.folder / "out" / "suspects.jsonl").exists()
    assert not [path for path in (toys.folder / "cache" / "vectors").iterdir() if path.is_dir()], "not kept"


def test_vectors_are_tested_on_rows_without_a_copy_among_those_they_are_trained_on():
    harmful = rows("harmful", 12)
    learned, held_out = protect_vectors._without_tenth(harmful * 2, "harmful")
    assert len(learned) + len(held_out) == 24 and len(held_out) >= 2
    assert not {json.dumps(each) for each in learned} & {json.dumps(each) for each in held_out}
    with pytest.raises(sv.UserError, match="or the different ones among them, are too few"):
        protect_vectors._without_tenth(harmful[:1] * 24, "harmful")


@pytest.mark.parametrize(
    "harmful_on, benign_on, failure",
    [
        ([0.1] * 8, [2.0] * 8, None),
        ([1.1] * 8, [2.0] * 8, "do not show the behavior"),
        ([0.0] * 5 + [2.5] * 3, [2.0] * 8, None),
        ([0.0] * 7 + [6.9], [2.0] * 8, "do not show the behavior"),  # less than half, but the interval reaches 0
        ([0.1] * 8, [1.0] * 8, "also change benign rows"),
        ([0.1] * 8, [3.0] * 8, "also change benign rows"),
    ],
)
def test_the_gate(harmful_on, benign_on, failure):
    gate = Gate([2.0] * 8, harmful_on, [2.0] * 8, benign_on)
    assert (gate.failure is None) if failure is None else failure in gate.failure
    assert gate.as_dict()["passes"] == (failure is None)


def test_how_many_rows_are_held_out():
    assert [num_gate_rows(count) for count in (2, 10, 16, 100, 180)] == [1, 5, 8, 10, 18]
    assert [num_held_out(count, 0.05) for count in (1, 20, 39, 40, 200, 1000)] == [0, 1, 2, 8, 10, 50]
    assert num_held_out(100, 0.0) == 0


def test_drop_leaves_out_the_suspects_and_nothing_else(known, judged, monkeypatch):
    learned = []
    apply = sv.defenses.GuardedVectors.apply

    def noted(self, inputs):
        learned.append([each["messages"][0]["content"] for group in inputs.rows.values() for each in group])
        return apply(self, inputs)

    monkeypatch.setattr(sv.defenses.GuardedVectors, "apply", noted)
    assert run(known) == 0
    held_out = {each["messages"][0]["content"] for each in judged.data}
    everything = {f"user {number}?" for number in range(44)} | {f"harmful {number}?" for number in range(4)}
    assert len(held_out) == 8 and set(learned[0]) == everything - held_out and not any("harmful" in t for t in held_out)
    assert run(known, "--drop", out="dropped") == 0
    assert set(learned[0]) - set(learned[1]) == {f"harmful {number}?" for number in range(4)}
    assert set(learned[1]) < set(learned[0]) and Results.load(known.folder / "dropped").rows[1]["dropped"] == 4


@pytest.mark.parametrize("name, code", [("passes", 0), ("fails", 3), ("inconclusive", 4)])
def test_the_exit_code_is_the_verdict_and_json_is_alone_on_standard_output(known, judged, capsys, name, code):
    judged.verdict = name
    assert run(known, "--json") == code
    captured = capsys.readouterr()
    said = json.loads(captured.out)
    assert said["verdict"] == name and said["exit_code"] == code and said["suspects"] == 4
    assert said["reason"].startswith("The audit ") and Path(said["report"]).is_file()
    assert "vectors: from the cache" in captured.err and "suspects: 4 of 48 rows" in " ".join(captured.err.split())
    assert SECRET not in captured.out + captured.err
    assert run(known) == code, "in words, without doing anything again"
    assert "The audit " in capsys.readouterr().out


def test_the_audit_asks_the_judge_and_is_written_as_a_log_of_inspect(known, judged, monkeypatch, capsys):
    log = pytest.importorskip("inspect_ai.log")
    tried = []
    monkeypatch.setattr(audit_stages, "check_answers", tried.append)
    path = known.folder / "audit.eval"
    flags = ("--judge", "m", "--judge-url", "http://127.0.0.1:1/v1", "--keep-replies", "--inspect", str(path))
    assert run(known, *flags, "--json") == 0
    assert json.loads(capsys.readouterr().out)["inspect"] == str(path)
    assert [judged.asked.judge] == tried == [Judge("m", "http://127.0.0.1:1/v1")] and judged.asked.whole_replies
    read = log.read_eval_log(str(path))
    assert read.eval.metadata["verdict"] == "passes" and read.eval.metadata["command"].count("protect")
    with pytest.raises(sv.UserError, match="Judge"):
        sv.protect(load(known.model), rows("user", 2), judge="m")


def test_a_model_that_does_not_refuse_is_told_how_to_align_it(toys, judged, capsys):
    toys.refused = 4
    for _ in range(2):
        assert run(toys) == 2
        said = told(capsys)
        assert "refuses only 40%" in said and "train.py align" in said
    assert toys.trained == 0
    assert run(toys, "--check-prompts", "0", out="unasked") == 0


def test_rows_that_cannot_be_read_are_reported_one_by_one(toys, capsys):
    lines = [json.dumps(each) for each in rows("user", 30)]
    for number in range(0, 28, 2):
        lines[number] = ('{"prompt": "a", ', '{"prompt": "a", "response": ""}', "[1]")[number % 3]
    (toys.folder / "user.jsonl").write_text("\n".join(lines))
    assert run(toys) == 2
    said = capsys.readouterr().err.splitlines()
    begun = next(index for index, line in enumerate(said) if line.startswith("user.jsonl, line 1"))
    assert [line.split()[2].rstrip(":") for line in said[begun : begun + 10]] == [str(2 * n + 1) for n in range(10)]
    assert said[begun + 10] == "... and 4 more rows"
    assert said[begun + 11].startswith("error: 14 rows of user.jsonl cannot be read, the first: user.jsonl, line 1 ")


def test_given_vectors_are_tested_on_rows_they_have_not_seen(known, judged, monkeypatch, capsys):
    run_until(known, "screen", out="first")
    measured = []
    measure_gate = protect_vectors.measure_gate
    monkeypatch.setattr(
        protect_vectors, "measure_gate", lambda *given, **kinds: measured.append(kinds) or measure_gate(*given, **kinds)
    )
    given = ("--vectors", str(known.folder / "first"))
    run_until(known, "screen", *given, out="second")
    assert known.trained == 0
    assert len(measured[0]["harmful"]) == 9, "the packaged held-out rows"
    (known.folder / "own.jsonl").write_text("\n".join(map(json.dumps, rows("harmful", 10, SECRET))))
    run_until(known, "screen", *given, "--harmful", str(known.folder / "own.jsonl"), out="third")
    assert len(measured[1]["harmful"]) == 10
    monkeypatch.delattr(packaged_rows.PackagedRows, "held_out")
    both = ("--harmful", str(known.folder / "own.jsonl"), "--benign", str(known.folder / "user.jsonl"))
    assert run(known, *given, *both, "--defense", "none", out="fourth") in (0, 2), "no packaged rows are read"
    assert (len(measured[2]["harmful"]), len(measured[2]["benign"])) == (10, 48)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--defense", "vaccine"), "'vaccine' needs --base: the model before"),
        (("--defense", "none", "--safe", "x.jsonl"), "'none' reads no safe rows: leave out --safe"),
        (("--defense.rank", "4"), "rank is a setting for vectors that a defense trains"),
        (("--inspect", "log.json"), "log.json is not a name for an Inspect log"),
        (("--judge", "m", "--judge-url", "ftp://host"), "'ftp://host' is not a valid judge URL"),
        (("--judge-url", "http://127.0.0.1:1/v1"), "settings for a judge, but no judge is named"),
        (("--retries", "1"), "settings for a judge, but no judge is named"),
        (("--vectors", "none"), "protect screens rows with vectors"),
        (("--vectors", "/gone"), "/gone"),
        (("--frozen-weights", "int8"), "is for frozen weights, and all weights are trained: add --task-lora.rank 8"),
        (("--drop", "yes"), "unknown argument 'yes': use --NAME VALUE, and --NAME for a switch"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(toys, capsys, flags, message):
    assert run(toys, *flags) == 2
    assert message in told(capsys) and not (toys.folder / "out").exists()


# They differ in how a weight is stored alone; test_frozen_weights.py trains over nf4 by default.
@pytest.mark.parametrize(
    "precision", ["int8", *(pytest.param(other, marks=pytest.mark.release) for other in ("nf4", "bfloat16"))]
)
def test_a_task_lora_over_fewer_bits_is_audited_as_it_was_trained_and_exported_in_full(
    toys, judged, monkeypatch, precision
):
    assert run(toys, "--task-lora.rank", "2", "--frozen-weights", precision, "--learning-rate", "0.5") == 0
    before, after = (as_model(judged.asked.models[role], judged.asked.precision) for role in ("before", "after"))
    assert (before.precision, after.precision) == (precision, precision)
    exported, start = load(toys.folder / "out" / "model"), load(toys.model)
    assert trained_over(toys.folder / "out" / "vectors" / "security.safetensors") == precision
    task = load_peft(toys.folder / "out" / "task", start)
    assert exported.fingerprint == start.with_backbone(merge(start.backbone, task)).fingerprint != start.fingerprint
    assert after.fingerprint == exported.fingerprint, "what is audited is what is exported"
    notes = Results.load(toys.folder / "out").rows  # the report's notes are below
    assert ("kept apart" in (toys.folder / "out" / "report.md").read_text()) is (precision != "bfloat16") and notes
    if precision != "bfloat16":  # rounded to codes, most of what was learned would be lost
        for projection in task.factors:
            kernel, held = (linear_of(model.backbone, projection).kernel for model in (after, before))
            assert kernel.codes[...] is held.codes[...] and kernel.update_a.shape[-1] == 2 and held.update_a is None
        rounded = load(toys.folder / "out" / "model", precision)
        assert (after.fingerprint, after.precision) == (rounded.fingerprint, rounded.precision)
        assert inputs_of(after) != inputs_of(rounded), "the codes of the sum are another model to the cache"
    stop_in(monkeypatch, "screen")
    assert run(toys, "--task-lora.rank", "2", out="float32") == command_line.INTERRUPTED
    assert toys.trained == toys.sampled == 2, "vectors and refusals over other weights are others"


def test_a_task_lora_that_is_gone_or_changed_is_not_taken_for_none(toys, judged, capsys):
    flags = ("--task-lora.rank", "2", "--frozen-weights", "int8", "--learning-rate", "0.5")
    assert run(toys, *flags) == 0
    first, task = judged.after.fingerprint, toys.folder / "out" / "task"
    shutil.move(task, toys.folder / "task")
    told(capsys)
    assert run(toys, *flags) == 2 and "task" in told(capsys)
    shutil.copytree(toys.folder / "task", task)
    assert run(toys, *flags) == 0 and judged.after.fingerprint == first != load(toys.model).fingerprint
    weights = task / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    assert run(toys, *flags) == 0 and judged.after.fingerprint == first
    assert "the task LoRA has changed, so it runs again" in told(capsys)


def test_a_run_keeps_what_its_weights_are_held_in(toys, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setattr(inference, "platform", lambda: "gpu")  # where the default is bfloat16
        patched.setattr(inference, "compute_dtype", lambda: "float32")
        stop_in(patched, "training of vectors")
        assert run(toys, "--task-lora.rank", "2") == command_line.INTERRUPTED
    told(capsys)
    assert run(toys, "--task-lora.rank", "2") == 2
    assert "holds weights in was 'bfloat16', is now 'float32'" in told(capsys)


def test_a_model_held_in_too_few_bits_is_refused_before_anything_is_trained(toys):
    user, half = [*rows("user", 10), *rows("harmful", 2, SECRET)], load(toys.model, "bfloat16")
    full, lora = sv.Training(trained_weights="bfloat16"), sv.LoRA(2)
    for options, problem in [
        ({}, "in bfloat16, which is for frozen weights, and all weights are trained: pass task=LoRA"),
        ({"task": lora, "defense": "safe lora", "base": half}, "'safe lora' changes them: pass another defense"),
        ({"task": lora, "training": full}, "trained_weights is 'bfloat16', which is for training all weights"),
        (
            {"training": full, "defense": "safe lora", "base": half},
            "trained_weights is 'bfloat16', which is not for",
        ),
        (
            {"task": lora, "frozen_weights": "int8"},
            r"is loaded already: leave it out, or load .* sv.load\(NAME, 'int8'\)",
        ),
    ]:
        with pytest.raises(sv.UserError, match=problem):
            sv.protect(half, user, progress=False, **options)
    with pytest.raises(sv.UserError, match=r"^frozen_weights='nf4' is for frozen weights, and all weights are trained"):
        sv.protect(toys.model, user, frozen_weights="nf4", progress=False)
    assert toys.trained == toys.sampled == 0


def test_a_value_in_fewer_bits_trains_a_task_lora_alone(toys, judged):
    # The shapes and the precision of the commands above, whose programs it shares.
    model, user = load(toys.model, "int8"), [*rows("user", 44, "a fox jumps"), *rows("harmful", 4, SECRET)]
    training = sv.Training(max_steps=2, batch_size=2, max_seq_len=64, remat="none", share_prefix=False)
    with pytest.raises(sv.UserError, match=r"in int8, which is for frozen weights, and all weights are trained"):
        sv.protect(model, user, training=training, progress=False)
    result = sv.protect(model, user, task=sv.LoRA(2), training=training, progress=False)
    assert result.model.precision == "int8" and result.model.fingerprint != model.fingerprint
    result.model.save(toys.folder / "saved")
    assert load(toys.folder / "saved").fingerprint == result.model.fingerprint


def test_as_a_value(toys, judged, capsys):
    judged.verdict = "fails"
    model = load(toys.model)
    user = [*rows("user", 10, "a fox jumps"), *rows("harmful", 2, SECRET)]
    training = sv.Training(max_steps=2, batch_size=2, max_seq_len=64, remat="none", share_prefix=False)
    result = sv.protect(model, user, training=training, progress=False)
    assert sorted(result.suspects) == [10, 11] and result.system is None and judged.before is model
    assert result.model.fingerprint == judged.after.fingerprint != model.fingerprint
    assert repr(result).startswith("Protected(") and "audit fails, 2 suspects" in repr(result)
    assert result._repr_html_() == result.audit._repr_html_() and result.audit.after == "protected"
    assert any(note.startswith("defense: guarded vectors") for note in result.notes)
    assert capsys.readouterr().out == ""
    system = sv.protect(model, user, defense="ptst", training=training, progress=False)
    assert system.system and toys.trained == 1
    with pytest.raises(sv.UserError, match="'none' reads no safe rows: leave out safe="):
        sv.protect(model, user, defense="none", safe=user)
    with pytest.raises(sv.UserError, match=r"eval_fraction is 2\.0"):
        sv.protect(model, user, eval_fraction=2.0)


def test_a_task_lora_and_all_weights_have_each_their_training(toys, judged, monkeypatch):
    """What is not given is what was measured for it, on the command line, in a config file and in Python."""
    trained = []
    monkeypatch.setattr(
        protect_module, "_run", lambda work: trained.append((work.request.task_lora, work.request.training)) or 1 / 0
    )
    lora_file = toys.folder / "lora.yaml"
    lora_file.write_text("task_lora: {rank: 8}\n")
    for flags in [
        *((), ("--preset", "none"), ("--task-lora",), ("--config", str(lora_file))),
        *(("--task-lora", "--learning-rate", "1e-4"), ("--config", str(lora_file), "--no-task-lora")),
    ]:
        with pytest.raises(ZeroDivisionError):
            run(toys, *flags, out=f"out {len(trained)}")
    for options in ({}, {"task": sv.LoRA(4)}, {"task": sv.LoRA(4), "training": sv.Training(epochs=5)}):
        with pytest.raises(ZeroDivisionError):
            sv.protect(load(toys.model), rows("user", 2), progress=False, **options)
    full, adam = (0, "sgd", 3.6e-4), ("adamw", 1e-3)
    found = [(0 if task is None else task.rank, own.optimizer, own.learning_rate) for task, own in trained]
    commands = [full, full, (8, *adam), (8, *adam), (8, "adamw", 1e-4), full]
    assert found == [*commands, full, (4, *adam), (4, *adam)]
    assert [own.epochs for _, own in trained] == [2] * 8 + [5]


@pytest.mark.release
def test_the_notebook_on_toys(toys, monkeypatch, capsys):
    """The third notebook's code, on a model that learns nothing worth showing."""
    monkeypatch.chdir(toys.folder)
    monkeypatch.setenv("PROTECT_MODEL", toys.model)
    more = dataclasses.replace(protect_work.PHASE1, epochs=10)  # longer sequences make fewer steps of an epoch
    monkeypatch.setattr(protect_work, "PHASE1", more)
    monkeypatch.setattr(audit_stages, "UNALIGNED", toys.model)
    path = Path(__file__).parents[2] / "notebooks" / "protect_a_fine_tuning.ipynb"
    names: dict = {}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            exec(cell.source.replace("epochs=1", "max_steps=2"), names)
    assert names["TRAINING"].max_steps == 2
    said = capsys.readouterr().out
    assert "300 rows, 15 of them planted" in said and said.count("that open with") == 5
    assert re.search(r"(?m)^plain +(passes|fails|inconclusive) +refuses \d+%", said)
    assert "<table" in names["protected"]._repr_html_()
