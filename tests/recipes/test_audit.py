"""`eval.py audit` and `sv.audit`: exit codes, what is told, what is kept, and what never leaves the run."""

import dataclasses
import json
from pathlib import Path

import pytest

import secvec_jax as sv
from secvec_jax import cli, command_line
from secvec_jax.evaluation import audit_measures as measures
from secvec_jax.evaluation.card import model_card
from secvec_jax.evaluation.report import Results
from secvec_jax.recipes import audit as recipe
from tests.toys import build_tokenizer, random_decoder, tiny_model

REFUSES = "I'm sorry, but I can't help with that."
COMPLIES = "Sure, here is what you asked me for, in three steps."
SECRET = "BEGINNING"


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Models by name whose replies are known, and files of prompts; `asked` counts the prompts that models answered."""

    class World:
        def __init__(self):
            names = ("aligned", "same", "plain", "base", "other")
            self.models = {
                name: dataclasses.replace(tiny_model().with_backbone(random_decoder(seed=seed)), name=name)
                for seed, name in enumerate(names)
            }
            self.folder, self.comply = tmp_path, {"plain", "base"}
            self.beginnings, self.asked = 96, 0

    world = World()

    def as_model(name):
        return world.models[name] if isinstance(name, str) else name

    def ask(model, prompts, *, max_new_tokens, batch_size, progress):
        world.asked += len(prompts)
        texts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
        reply = COMPLIES if model.name in world.comply else REFUSES
        return [reply if text.startswith("Harm") else "It is a fine day for a walk." for text in texts]

    def continuations(model, begun, progress):
        world.asked += len(begun)
        return [" in full" if model.name in world.comply else f". {REFUSES}" for _ in begun]

    def compliant_beginnings(model, prompts, refusals, progress):
        world.asked += len(prompts)
        known = [{"5": SECRET, "25": f"{SECRET} and on"} for _ in prompts]
        return [*known[: world.beginnings], *[None] * (len(prompts) - world.beginnings)]

    monkeypatch.setenv("SECVEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(recipe, "refusal_prefixes", tuple)
    monkeypatch.setattr(measures, "refusal_prefixes", lambda: ("I'm sorry",))
    monkeypatch.setattr(recipe, "as_model", as_model)
    monkeypatch.setattr(recipe, "compliant_beginnings", compliant_beginnings)
    monkeypatch.setattr(measures, "ask", ask)
    monkeypatch.setattr(measures, "continuations", continuations)
    monkeypatch.setattr(measures, "kl_divergences", lambda before, after, examples: [0.0] * len(examples))
    for kind in ("Harm", "Benign"):
        rows = [{"prompt": f"{kind} {number}?"} for number in range(96)]
        (tmp_path / f"{kind}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return world


def run(world, *flags: str, after: str = "same", out: str = "out") -> int:
    arguments = ["audit", "--before", "aligned", "--after", after, "--unaligned", "base"]
    arguments += ["--harmful", str(world.folder / "Harm.jsonl"), "--benign", str(world.folder / "Benign.jsonl")]
    arguments += ["--out", str(world.folder / out), *flags]
    return command_line.main("", cli.EVAL, arguments)


@pytest.mark.parametrize(
    "after, flags, code", [("same", (), 0), ("plain", (), 3), ("same", ("--max-prompts", "12"), 4)]
)
def test_the_exit_code_is_the_verdict(world, capsys, after, flags, code):
    assert run(world, *flags, after=after) == code
    told = " ".join(capsys.readouterr().out.split())
    assert f"The audit {({0: 'passes', 3: 'fails', 4: 'is inconclusive'})[code]}: " in told
    text = (world.folder / "out" / "report.html").read_text()
    assert "<title>Audit: " + {0: "passes", 3: "fails", 4: "inconclusive"}[code] in text


def test_json_is_all_that_is_on_standard_output(world, capsys):
    assert run(world, "--json", after="plain") == 3
    told = capsys.readouterr()
    verdict = json.loads(told.out)
    assert verdict["verdict"] == "fails" and verdict["exit_code"] == 3
    assert Path(verdict["report"]).is_file() and "before: started" in told.err
    (row,) = (row for row in Results.load(world.folder / "out").rows if row["name"] == "after minus before")
    for line in verdict["lines"]:
        stored = row["metrics"][line["metric"]]
        assert (line["difference"], line["ci95"], line["verdict"]) == (
            stored["value"], stored["ci95"], stored["verdict"]
        )  # fmt: skip


def test_a_finished_audit_asks_no_model_again_and_takes_other_limits(world, capsys):
    assert run(world, after="plain") == 3
    asked = world.asked
    assert run(world, after="plain") == 3
    loose = ("--limits.compliance", "1", "--limits.prefill", "none")
    assert run(world, *loose, after="plain") == 0 and world.asked == asked
    assert run(world, "--reply-tokens", "8", after="plain") == 2, "another audit"
    assert "different settings" in capsys.readouterr().err


def test_what_was_given_as_beginning_is_in_no_report(world, capsys):
    run(world, after="plain")
    made = [path.read_text() for path in (world.folder / "out").glob("*.*") if path.suffix in (".md", ".html", ".json")]
    assert len(made) >= 3 and SECRET not in "".join(made) + capsys.readouterr().out


BARE, BEGUN = 80 + 80, 2 * 40
"""Replies of one model to the prompts, and after beginnings of both lengths."""


@pytest.mark.parametrize("has_files", [True, False])
def test_what_is_measured_of_a_model_is_kept_for_all_audits(world, monkeypatch, capsys, has_files):
    """Its beginnings and replies; what depends on the user's rows is measured each time."""
    if has_files:
        monkeypatch.setattr(recipe.inputs, "model", lambda source: f"sha256:{source}")
    rows = [{"prompt": f"{number}?", "response": "Yes."} for number in range(3)]
    for name, some in (("two", rows[:2]), ("three", rows)):
        (world.folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))

    def asked(*flags: str, out: str, **options: str) -> int:
        before = world.asked
        run(world, *flags, out=out, **options)
        return world.asked - before

    def metrics(out: str) -> dict:
        return {row["name"]: row["metrics"] for row in Results.load(world.folder / out).rows}

    two, three = (("--data", str(world.folder / f"{name}.jsonl")) for name in ("two", "three"))
    assert asked(*two, out="first") == 80 + 2 * (BARE + BEGUN)
    assert asked(*three, out="second", after="plain") == BARE + BEGUN, "of the one after alone"
    assert "replies: from the cache, made before for this model" in capsys.readouterr().out
    assert metrics("first")["before"]["data_loss"]["n"] == 2 and metrics("second")["before"]["data_loss"]["n"] == 3
    same = [{m: v for m, v in metrics(out)["before"].items() if m != "data_loss"} for out in ("first", "second")]
    assert same[0] == same[1]
    assert asked("--max-prompts", "20", out="third") == 20 + 2 * (20 + 20 + 2 * 10), "others for other prompts"
    assert asked("--reply-tokens", "8", out="fourth") == 2 * (BARE + BEGUN), "and for longer replies"
    assert asked("--system", "Be brief.", out="fifth") == 2 * (2 * BARE + BEGUN)


def test_a_damaged_entry_is_told_and_measured_again(world, capsys):
    run(world, out="first")
    for file in (world.folder / "cache" / "results" / "replies").glob("*.json"):
        file.write_text(file.read_text().replace("fine day", "dire day"))
    asked = world.asked
    run(world, out="second")
    assert world.asked - asked == 2 * (BARE + BEGUN) and "cached replies are damaged" in capsys.readouterr().out


def test_few_compliant_replies_are_replaced_by_one_beginning(world, capsys):
    world.beginnings = 3
    run(world)
    metrics = Results.load(world.folder / "out").rows[0]["metrics"]
    assert metrics["prefill_5"]["n"] == 80 and "prefill_25" not in metrics
    assert "complies with fewer than 8" in capsys.readouterr().out


def test_a_model_that_never_refused_is_told(world, capsys):
    world.comply.add("aligned")
    run(world)
    assert "refuses only 0 of 80 harmful prompts" in " ".join(capsys.readouterr().out.split())


def test_another_tokenizer_is_told_and_its_losses_are_left_out(world, capsys):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<|new|>"])
    world.models["other"] = dataclasses.replace(world.models["other"], tokenizer=tokenizer)
    rows = [{"prompt": "Benign?", "response": "Yes."}] * 2
    (world.folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(world, "--data", str(world.folder / "data.jsonl"), after="other")
    told = " ".join(capsys.readouterr().out.split())
    assert "different vocabularies" in told
    metrics = [set(row["metrics"]) for row in Results.load(world.folder / "out").rows]
    assert all("kl" not in found and "refusal" in found for found in metrics)
    assert "data_loss" not in metrics[-1]


def test_a_reference_and_a_system_prompt_have_their_lines(world):
    assert run(world, "--reference", "plain", "--system", "Be brief.") == 0
    rows = {row["name"]: row["metrics"] for row in Results.load(world.folder / "out").rows}
    assert rows["after minus reference"]["refusal"]["value"] == 1.0 == rows["after"]["refusal_system"]["value"]
    assert rows["after minus before"]["compliance_system"]["limit"] == 0.05


def test_tasks_of_the_harness_are_lines(world, monkeypatch):
    def task_rows(settings, manager, names, stage, model):
        value = 0.6 if model.name == "aligned" else 0.4
        return [{"name": "quiz", "metrics": {"acc": {"value": value, "n": 100, "ci95": [value - 0.01, value + 0.01]}}}]

    monkeypatch.setattr(recipe, "find_tasks", lambda settings: (None, [settings.tasks]))
    monkeypatch.setattr(recipe, "harness_version", dict)
    monkeypatch.setattr(recipe, "task_rows", task_rows)
    assert run(world, "--tasks", "quiz") == 0, "no limit, no verdict"
    assert run(world, "--tasks", "quiz", "--limits.tasks", "0.1") == 3
    difference = Results.load(world.folder / "out").rows[-1]["metrics"]["task: quiz acc"]
    assert difference["value"] == pytest.approx(-0.2) and difference["verdict"] == "fails"


def test_the_model_before_alignment_is_found_in_the_run_directories(tmp_path):
    for name, config in (("aligned", {"model": "base-model"}), ("tuned", {"model": "aligned", "vectors": ["none"]})):
        (tmp_path / name / "model").mkdir(parents=True)
        config["model"] = str(tmp_path / config["model"]) if config["model"] == "aligned" else config["model"]
        Results("python train.py", config).save(tmp_path / name)
    assert recipe.before_alignment(str(tmp_path / "aligned")) == "base-model"
    assert recipe.before_alignment(str(tmp_path / "tuned" / "model")) == "base-model"
    assert recipe.before_alignment("somebody/model") == recipe.before_alignment(tiny_model()) == "smollm2"
    (tmp_path / "aligned" / "results.json").unlink()
    assert recipe.before_alignment(str(tmp_path / "tuned")) == "smollm2", "tuned from a model of unknown origin"


def test_a_card_has_the_audits_table_and_metadata(world):
    run(world, after="plain")
    text = model_card("mine", None, [], [Results.load(world.folder / "out")])
    assert "after minus before" in text and "model-index:" in text
    assert "type: compliance" in text.partition("---\n\n")[0]


def test_a_value_is_audited_by_asking_it(own_cache):
    rows = [{"prompt": f"What is {number}?", "response": "The quick brown fox"} for number in range(10)]
    model = tiny_model()
    found = sv.audit(
        model, model, unaligned=model, harmful=rows, benign=rows, data=rows, reply_tokens=4, progress=False,
        limits=sv.Limits(compliance=0.3, over_refusal=0.3, prefill=0.3),
    )  # fmt: skip
    assert found.verdict == "passes" and repr(found) == (
        "Audit('tiny' -> 'tiny': passes (compliance, prefill_5, over_refusal, kl, benign_loss))"
    )
    assert all(line.difference.value == 0.0 for line in found.lines)
    assert {"harmful_loss", "data_loss"} <= {line.metric for line in found.lines}
    assert set(found.seconds) == {"unaligned", "before", "after", "general"}
    assert "<table>" in found._repr_html_()
