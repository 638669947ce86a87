"""Hub datasets as rows, from records in the form of each dataset; nothing is downloaded here."""

import datasets
import pytest

from secvec_jax.data.hub_sets import HUB_SETS
from secvec_jax.data.rows import prompt_of, response_of
from secvec_jax.data.sources import load_rows
from secvec_jax.errors import UserError

BEAVERS = [
    {"prompt": "A?", "response": "a", "category": {"x": True}, "is_safe": False},
    {"prompt": "B?", "response": "b", "category": {"x": False}, "is_safe": True},
]
TALKS = [
    {"transcript": "\n\nHuman: Hi there\nyou\n\nAssistant: Hello.\n\nHuman: More\n\nAssistant: No.", "rating": 4.0},
    {"transcript": "\n\nHuman: Rated low\n\nAssistant: Yes.", "rating": 1.0},
    {"transcript": "\n\nHuman: Never answered\n\nAssistant: ", "rating": 4.0},
    {"transcript": "\n\nHuman: Only one\n\nAssistant: Right.", "rating": 4.0},
]


def talk(asked: str, said: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]


COLORS = [
    {"question": "Q1", "red_conversations": {"0": None, "1": talk("Q1", " R ")},
     "blue_conversations": {"0": talk("Q1", "B")}},
    {"question": "Q2", "red_conversations": None, "blue_conversations": {"0": talk("Q2", "C")}},
]  # fmt: skip
PASSAGE = {"context": "Ann met Bob.", "question": "Who?", "ans0": "Ann", "ans1": "Unknown", "ans2": "Bob",
           "answer_label": 1, "target_label": 2, "context_condition": "ambig"}  # fmt: skip


@pytest.fixture
def hub(monkeypatch):
    """What `datasets.load_dataset` was asked, and what it answers."""

    def answer(records):
        calls = []
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append((a, k)) or records)
        return calls

    return answer


def pairs(name, split="train"):
    return [(prompt_of(r), response_of(r)) for r in load_rows(name, split)]


def test_beavertails_is_split_by_its_label(hub):
    calls = hub(BEAVERS)
    assert pairs("beavertails-unsafe") == [("A?", "a")] and pairs("beavertails-safe", "30k_test") == [("B?", "b")]
    assert [(args[0], kwargs["split"]) for args, kwargs in calls] == [
        ("PKU-Alignment/BeaverTails", "30k_train"), ("PKU-Alignment/BeaverTails", "30k_test")
    ]  # fmt: skip


def test_a_red_teams_first_exchange(hub):
    calls = hub(TALKS)
    assert pairs("red-team") == [("Hi there\nyou", "Hello."), ("Only one", "Right.")]
    assert calls[0][1]["data_dir"] == "red-team-attempts"


def test_harmfulqa_by_color(hub):
    hub(COLORS)
    assert pairs("harmfulqa-red") == [("Q1", "R")] and pairs("harmfulqa-blue") == [("Q1", "B"), ("Q2", "C")]


def test_bbq_names_the_stereotype_first(hub):
    calls = hub([PASSAGE, PASSAGE | {"context_condition": "disambig", "answer_label": 0}])
    rows = load_rows("bbq-all")
    assert len(calls) == 11 and len(rows) == 22 and len(load_rows("bbq-all", "age")) == 2
    assert rows[0]["category"] == "ambiguous" and response_of(rows[0]) == "Unknown"
    assert rows[1]["category"] == "disambiguated" and response_of(rows[1]) == "Ann"
    assert rows[0]["options"] == ["Bob", "Ann", "Unknown"]
    assert prompt_of(rows[0]) == "Ann met Bob.\nWho?\n- Ann\n- Unknown\n- Bob\nAnswer with one of the options."


def test_the_papers_tasks(hub):
    hub([{"sentence": "fine ", "label": 1}, {"sentence": "dull", "label": 0}])
    assert [answer for _, answer in pairs("sst2")] == ["positive", "negative"] and pairs("sst2")[0][0].startswith(
        "fine\n"
    )
    hub([{"text": "Rates rise", "label": 2}])
    assert pairs("ag-news", "test")[0][1] == "Business"
    hub([{"question": "2+2?", "answer": "It is <<2+2=4>>4.\n#### 4"}])
    assert pairs("gsm8k") == [("2+2?", "It is <<2+2=4>>4.\nThe final answer is: 4")]


def test_labels_that_a_test_split_hides_are_refused(hub):
    hub([{"sentence": "fine ", "label": -1}])
    with pytest.raises(UserError, match="split 'test' has rows with the label -1"):
        load_rows("sst2", "test")
    hub([{"text": "Rates rise", "label": 4}])
    with pytest.raises(UserError, match="label 4, which has no name"):
        load_rows("ag-news", "test")
    hub([PASSAGE | {"answer_label": -1}])
    with pytest.raises(UserError, match="label -1, which has no name"):
        load_rows("bbq-all", "age")


@pytest.mark.parametrize("name", HUB_SETS)
def test_what_cannot_be_reached_is_reported(monkeypatch, name):
    def fail(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match="no network"):
        load_rows(name)
