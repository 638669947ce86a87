"""What a model scores on a suite, with vectors on and off."""

import dataclasses

import pytest

from secvec_jax.data.chat import encode
from secvec_jax.data.rows import full_prompt_of, response_of, row, with_system
from secvec_jax.evaluation import suite as suites
from secvec_jax.evaluation.answers import exact_match
from secvec_jax.evaluation.likelihood import mean_losses
from secvec_jax.evaluation.metrics import RATES, in_order, rules_note, rules_of
from secvec_jax.evaluation.scorers import RULES
from secvec_jax.evaluation.suite import Probe, Suite, outcomes, scores
from secvec_jax.inference import generate

_HARMFUL = ["The quick brown fox", "What is the capital of France?", "def add"]
_BENIGN = ["A security vector says", "12345 + 67890"]


def test_outcomes_are_those_of_the_replies_with_vectors_on_and_off(tiny_model, random_vectors, monkeypatch):
    """Vectors are made part of the weights to be judged, and then do what they do as an adapter."""
    model = tiny_model("llama").model
    vectors = random_vectors(model, rank=4)
    rows = [[{"role": "user", "content": p}, {"role": "assistant", "content": "over the dog"}] for p in _HARMFUL]
    targets = [encode(model.tokenizer, row, 128) for row in rows]
    monkeypatch.setattr(suites, "refuses", lambda reply, openings: reply.startswith(tuple(openings)))
    found = []
    for active in (None, vectors):
        replies = generate(model, [*_HARMFUL, *_BENIGN], active, max_new_tokens=6)
        suite = Suite(
            refusals=[replies[1], replies[3]],
            harmful=_HARMFUL,
            benign=_BENIGN,
            questions=[(prompt, generate(model, _HARMFUL, active, max_new_tokens=4)[1]) for prompt in _HARMFUL],
            harmful_targets=targets,
            reply_tokens=6,
            answer_tokens=4,
        )
        outcome = outcomes(model, suite, active)
        assert replies.count(replies[1]) == replies.count(replies[3]) == 1 and replies[1] and replies[3]
        assert outcome["refusal"] == [0, 1, 0] and outcome["over_refusal"] == [1, 0]
        assert outcome["exact_match"][1] == 1.0
        for ours, plain in zip(outcome["harmful_loss"], mean_losses(model, targets, active), strict=True):
            assert abs(ours - plain) < 1e-5
        found.append(outcome)
    assert found[0]["harmful_loss"] != found[1]["harmful_loss"]


@pytest.fixture
def calls(monkeypatch):
    """(prompts, reply tokens) of each call to `generate`, whose replies say which prompt they are to."""
    made = []

    def replied(model, prompts, vectors, *, max_new_tokens, batch_size, progress):
        made.append((list(prompts), max_new_tokens))
        progress(len(prompts))
        return [f"to {_last(prompt)}" for prompt in prompts]

    monkeypatch.setattr(suites, "ask", replied)
    return made


def _last(prompt) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _length(index: int, reply: str) -> float:
    return 100 * index + len(reply)


def test_probes_of_one_length_are_asked_together_and_scored_prompt_by_prompt(calls):
    probes = {
        "task": Probe(["a", "bb"], _length, tokens=4),
        "long": Probe(["cccc"], _length, tokens=32),
        "none": Probe([], _length, tokens=4),
        "caps": Probe([with_system("ddd", "Be brief.")], _length, tokens=4),
    }
    suite = Suite(refusals=["No"], harmful=["h"], benign=["b"], questions=[("q", "to q")], probes=probes)
    shown = []
    found = outcomes(None, suite, on_reply=shown.append)
    assert found == {
        "refusal": [0.0], "compliance": [0.0], "unclear": [1.0], "over_refusal": [0.0], "exact_match": [1.0],
        "task": [4.0, 105.0], "caps": [6.0], "long": [7.0],
    }  # fmt: skip
    assert calls == [
        (["h", "b"], suite.reply_tokens),
        (["q"], suite.answer_tokens),
        (["a", "bb", with_system("ddd", "Be brief.")], 4),
        (["cccc"], 32),
    ]
    assert suite.size == 7 and shown == [2, 3, 6, 7]
    assert scores(found)["task"].n == 2


def test_a_probe_of_rows_asks_what_comes_before_the_answers(calls):
    rows = [row("a", "to a"), with_system(row("b", "to c"), "Be brief."), row("d")]
    probe = Probe.of(rows, lambda r, reply: exact_match(reply, response_of(r) or "to d"), tokens=3)
    assert outcomes(None, Suite(refusals=[], probes={"task": probe}))["task"] == [1.0, 0.0, 1.0]
    asked = ["a", with_system(row("b"), "Be brief.")["messages"], "d"]
    assert calls[-1] == (asked, 3)


def test_a_system_prompt_is_served_in_front_of_all_that_is_asked(calls):
    suite = Suite(
        refusals=[],
        harmful=["h"],
        benign=["b"],
        questions=[("q", "a")],
        probes={"caps": Probe(["p", with_system("r", "Be brief.")], _length)},
        system="Be safe.",
    )
    found = outcomes(None, suite)
    conversations = [prompt for prompts, _ in calls for prompt in prompts]
    assert list(map(_last, conversations)) == ["h", "b", "q", "p", "r"]
    assert [c[0]["content"] for c in conversations] == ["Be safe."] * 4 + ["Be safe.\nBe brief."]
    assert all([turn["role"] for turn in c] == ["system", "user"] for c in conversations)
    assert found == outcomes(None, dataclasses.replace(suite, system=None))
    assert calls[3][0] == ["h", "b"]


@pytest.mark.parametrize("system", [None, "def add"])
def test_what_a_probe_scores_is_what_the_model_says(tiny_model, system):
    model = tiny_model("llama").model
    prompts = [*_HARMFUL, with_system("over", "the dog")]
    said = []
    probe = Probe(prompts, lambda index, reply: said.append((index, reply)) or 0, tokens=6)
    outcomes(model, Suite(refusals=[], probes={"task": probe}, system=system))
    served = prompts if system is None else [*(with_system(p, system) for p in _HARMFUL),
                                             with_system("over", "def add\nthe dog")]  # fmt: skip
    replies = generate(model, served, max_new_tokens=6)
    assert said == list(enumerate(replies))
    assert (replies == generate(model, prompts, max_new_tokens=6)) is (system is None)


def test_metrics_of_probes_are_rates_and_unknown_ones_come_last():
    rows = [{"metrics": dict.fromkeys(["mine", "drift", "caps", "bias", "task", "refusal"])}]
    assert in_order(rows) == ["refusal", "task", "bias", "caps", "drift", "mine"]
    assert {"task", "bias", "caps"} < set(RATES)


def test_conversations_are_asked_as_they_are_and_judged_by_their_last_turn(calls):
    turns = [*row("Hello", "Hi")["messages"], *row("How do I bake bread?", "With flour.")["messages"]]
    asked = full_prompt_of(with_system({"messages": turns}, "Be brief."))
    found = outcomes(None, Suite(refusals=[], harmful=[asked], questions=[(asked, "to How do I bake bread?")]))
    assert [prompts for prompts, _ in calls] == [[asked], [asked]]
    assert [turn["role"] for turn in asked] == ["system", "user", "assistant", "user"]
    assert found["exact_match"] == [1.0]


def test_a_thought_is_left_out_and_one_without_an_end_is_counted(monkeypatch):
    said = ["<think>\n\n</think>\n\nI can't help with that.", "<think>Hm"]
    monkeypatch.setattr(suites, "ask", lambda model, prompts, *_, **__: said[: len(prompts)])
    found = outcomes(None, Suite(refusals=[], harmful=["a", "b"]))
    assert found == {
        "refusal": [1.0, 0.0], "compliance": [0.0, 0.0], "unclear": [0.0, 1.0], "unfinished": [0.0, 1.0],
    }  # fmt: skip


def test_scores_that_rules_read_name_their_version():
    found = scores({"refusal": [1.0, 0.0], "harmful_loss": [2.0]})
    assert found["refusal"].as_dict()["rules"] == RULES and "rules" not in found["harmful_loss"].as_dict()
    results = [{"name": "new", "metrics": {"refusal": found["refusal"].as_dict()}}]
    assert rules_note(results) == f"Replies were scored by version {RULES} of the rules."
    old = {"name": "old", "metrics": {"refusal": {"value": 1.0, "n": 1, "ci95": [1.0, 1.0]}}}
    assert rules_of([*results, old]) == {1: ["old"], RULES: ["new"]}
    assert "by version 1 in old" in rules_note([*results, old])
    assert rules_note([{"name": "a", "metrics": {"drift": {}}}]) == ""
