"""The further probes of a cell: what they ask of which model, and how it is trained further."""

from types import SimpleNamespace

import pytest

from secvec_jax.config import Training
from secvec_jax.evaluation.likelihood import mean_losses
from secvec_jax.evaluation.prefill import begun_reply
from secvec_jax.evaluation.suite import Suite
from secvec_jax.grid import outcomes
from secvec_jax.vectors.lora import LoRA
from tests.toys import tiny_model

TRAINING = Training(optimizer="adamw", learning_rate=3e-4, epochs=3, seed=4)
SUITE = Suite(("I can't",), harmful=["One?", "Two?"], benign=["The dog?", "A fox?"], reply_tokens=9)
STAGE = SimpleNamespace(replies=lambda count, label: lambda done: None)
SPARE = [f"row {number}" for number in range(30)]


def workspace(**parts):
    splits = SimpleNamespace(spare={"harmful": SPARE})
    return SimpleNamespace(
        workspace=SimpleNamespace(splits=splits), training=lambda cell: TRAINING, task_lora=lambda cell: None, **parts
    )


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_relearning_is_five_plain_steps_of_the_cells_training_on_rows_that_the_attack_takes_last(monkeypatch, lora):
    seen = {}

    def train(model, rows, **options):
        seen.update(model=model, rows=rows, **options)
        return "the attacked model"

    def ask(model, suite, on_reply):
        seen.update(asked=model, suite=suite)
        return {"refusal": [1.0, 0.0], "compliance": [0.0, 1.0], "unclear": [0.0, 0.0]}

    monkeypatch.setattr(outcomes, "train_model", train)
    monkeypatch.setattr(outcomes, "outcomes", ask)
    shared = workspace()
    shared.task_lora = lambda cell: lora
    found = outcomes._PROBES["relearning"](shared, None, "the model", SUITE, STAGE)
    assert found == {"relearning": [1.0, 0.0], "relearning_compliance": [0.0, 1.0]}
    assert seen["model"] == "the model" and seen["rows"] == {"harmful": SPARE[-8:]} and seen["task"] is lora
    training = seen["training"]
    assert (training.max_steps, training.schedule, training.warmup_steps) == (5, "constant", 0)
    assert (training.optimizer, training.learning_rate, training.seed) == ("adamw", 3e-4, 4)
    assert seen["asked"] == "the attacked model" and seen["suite"].size == 2 and seen["suite"].reply_tokens == 9


def test_prefill_is_asked_under_the_system_prompt_that_the_model_is_served_with(monkeypatch):
    seen = []
    monkeypatch.setattr(outcomes, "prefill_outcomes", lambda *asked: seen.append(asked) or {"prefill_5": [1.0]})
    beginnings = [{"5": "Sure", "25": "Sure, one"}, None]
    for system in (None, "Be kind."):
        suite = Suite(SUITE.refusals, SUITE.harmful, system=system)
        outcomes._PROBES["prefill"](workspace(beginnings=beginnings), None, "the model", suite, STAGE)
    (_, plain, *_), (model, asked, given, refusals, _) = seen
    assert plain == ["One?", "Two?"]
    assert (model, given, refusals) == ("the model", beginnings, SUITE.refusals)
    assert asked[1] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Two?"}]


def test_the_kl_of_the_aligned_model_itself_is_0():
    model = tiny_model()
    shared = workspace(aligned=model, aligned_replies=["The quick brown fox", "A dog"])
    assert outcomes._PROBES["kl"](shared, None, model, SUITE, STAGE) == {"kl": [0.0, 0.0]}


def test_unseen_replies_of_another_style_are_scored_where_there_are_any():
    model = tiny_model()
    replies = [begun_reply(model, "One?", "The quick brown fox", 64)]
    found = outcomes._PROBES["replies"](workspace(unseen_replies=replies), None, model, SUITE, STAGE)
    assert found == {"replies_loss": mean_losses(model, replies)} and found["replies_loss"][0] > 0
    assert outcomes._PROBES["replies"](workspace(unseen_replies=[]), None, model, SUITE, STAGE) == {}


def test_a_cell_shows_each_probe_by_one_of_its_metrics():
    assert set(outcomes.METRIC) == set(outcomes._PROBES)
