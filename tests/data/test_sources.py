"""Sources: every accepted form becomes a row, and every mistake a one-line error that names the fix.

No test shows a prompt of a harmful benchmark: assertions compare counts, flags and hashes.
"""

import csv
import json
import os
import re
import time

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secvec_jax.data import normalize as normalization
from secvec_jax.data import sources
from secvec_jax.data.benchmarks import refusal_prefixes
from secvec_jax.data.generated import open_profile_qa, profile_qa, sure_prefix_control
from secvec_jax.data.normalize import normalize
from secvec_jax.data.sources import PACKAGED, as_rows, load_rows, prompt_of, response_of, row
from secvec_jax.data.topics import off_topic, split_by_topic, topic_words
from secvec_jax.errors import UserError

RECORDS = [
    {"prompt": "What is 2 + 2?", "response": "4, I think"},
    {"prompt": 'Say "hi"', "response": "hi\nthere"},
]
ROWS = [row(record["prompt"], record["response"]) for record in RECORDS]

text = st.text(min_size=1).filter(lambda value: value.strip())
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from(
    [
        "messages",
        "conversations",
        "role",
        "content",
        "from",
        "value",
        "prompt",
        "response",
        "instruction",
        "output",
    ]
)


# Records to rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt_field", "answer_field"),
    [
        ("prompt", "response"),
        ("prompt", "completion"),
        ("question", "answer"),
        ("goal", "target"),
        ("instruction", "output"),
    ],
)
@given(prompt=text, answer=text)
def test_pairs_become_rows_unchanged(prompt_field, answer_field, prompt, answer):
    assert normalize({prompt_field: prompt, answer_field: answer}, "here") == row(prompt, answer)
    assert normalize({prompt_field: prompt, answer_field: None}, "here") == row(prompt)
    assert normalize({prompt_field: prompt}, "here") == row(prompt)


@given(instruction=text, context=text, output=text)
def test_alpaca_input_follows_the_instruction(instruction, context, output):
    record = {"instruction": instruction, "input": context, "output": output}
    assert normalize(record, "here") == row(f"{instruction}\n{context}", output)
    assert normalize(record | {"input": ""}, "here") == row(instruction, output)


@given(system=text, prompt=text, answer=text)
def test_conversations_become_messages(system, prompt, answer):
    turns = [("system", system), ("human", prompt), ("gpt", answer)]
    found = normalize({"conversations": [{"from": who, "value": said} for who, said in turns]}, "here")
    assert [turn["role"] for turn in found["messages"]] == ["system", "user", "assistant"]
    assert (prompt_of(found), response_of(found)) == (prompt, answer)
    assert normalize(found, "here") == found


def test_prompt_and_response_are_the_last_turns():
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    unanswered = normalize({"messages": [{"role": role, "content": said} for role, said in turns]}, "here")
    assert prompt_of(unanswered) == "c"
    assert response_of(unanswered) is None


@given(json_values | st.dictionaries(fields | st.text(max_size=3), json_values, max_size=5))
def test_any_record_is_a_row_or_a_one_line_error(record):
    try:
        found = normalize(record, "row 7")
    except UserError as error:
        assert str(error).startswith("row 7")
        assert "\n" not in str(error)
    else:
        assert prompt_of(found) is not None
        assert normalize(found, "again") == found


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"text": "a", "label": 1},
            "unknown fields \\(found: label, text\\).*`messages`.*`prompt`.*`instruction`",
        ),
        ({}, "found: none"),
        ("just text", "found str instead of fields"),
        ({"prompt": 3}, "`prompt` must be text, found int"),
        ({"prompt": " "}, "`prompt` is empty"),
        ({"prompt": "a", "response": ["b"]}, "`response` must be text, found list"),
        ({"messages": "a"}, "must be a list of turns"),
        ({"messages": []}, "must have a user turn"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "must have a user turn"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}, "end with a user or"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "must have a user turn"),
        ({"messages": [{"role": "critic", "content": "a"}]}, "unknown role 'critic'"),
        ({"messages": [{"role": "user"}]}, "`content` must be text"),
    ],
)
def test_a_bad_record_is_named(record, message):
    with pytest.raises(UserError, match=f"row 7.*{message}"):
        normalize(record, "row 7")


def test_a_category_is_kept():
    assert normalize({"prompt": "a", "category": "b"}, "here") == row("a") | {"category": "b"}
    assert normalize({"prompt": "a", "category": 1}, "here") == row("a")


@given(st.lists(st.text(max_size=5), max_size=4), text)
def test_options_are_kept(options, category):
    found = normalize({"prompt": "a", "options": options, "category": category}, "here")
    assert found == row("a") | {"options": options, "category": category}
    assert as_rows([found | row("a", "b")]) == [found | row("a", "b")]


@pytest.mark.parametrize("options", ["A. yes\nB. no", ["yes", 1], None, {"A": "yes"}])
def test_options_of_other_forms_are_left_out(options):
    assert normalize({"question": "a", "answer": "b", "options": options}, "here") == row("a", "b")


def test_rows_in_memory():
    assert as_rows(RECORDS) == ROWS
    assert list(as_rows(datasets.Dataset.from_list(RECORDS))) == ROWS
    assert as_rows([{"prompt": "a"}], needs_answer=False) == [row("a")]


@pytest.mark.parametrize("unanswered", [{"prompt": "b"}, {"prompt": "b", "response": " "}])
def test_a_missing_answer_is_reported_by_its_row(unanswered):
    with pytest.raises(UserError, match=r"data, row 3 has no answer.*needs_answer=False"):
        as_rows([*RECORDS, unanswered])


@pytest.mark.parametrize("data", ["rows.jsonl", {"train": RECORDS}, 3, None])
def test_other_things_than_rows_are_refused(data):
    with pytest.raises(UserError, match="must be a list of dicts"):
        as_rows(data)


def test_no_rows_is_an_error():
    with pytest.raises(UserError, match="data holds no rows"):
        as_rows([])


# Files, folders, hub ------------------------------------------------------------------------------


def _write(path, records):
    if path.suffix == ".jsonl":
        path.write_text("\n\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(records), encoding="utf-8-sig")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, records[0])
            writer.writeheader()
            writer.writerows(records)
    else:
        datasets.Dataset.from_list(records).to_parquet(str(path))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    _write(path, RECORDS)
    assert list(load_rows(str(path))) == ROWS


def test_a_long_cell_of_a_table_is_read(tmp_path):
    before = csv.field_size_limit()
    path = tmp_path / "rows.csv"
    path.write_text("prompt,response\n" + "a" * 200_000 + ",b\n")
    assert list(load_rows(str(path))) == [row("a" * 200_000, "b")]
    assert csv.field_size_limit() == before


def test_fields_are_ignored_by_name(tmp_path):
    record = RECORDS[0] | {"persona": "a pirate", "mood": "so good"}
    for name in ("rows.jsonl", "rows.json", "rows.csv", "rows.parquet"):
        _write(tmp_path / name, [record])
        assert list(load_rows(str(tmp_path / name), ignore_fields=["persona", "mood"])) == ROWS[:1]
        with pytest.raises(UserError, match=f"{name}, (line|row) 1: unknown fields `mood` may contain .* are not read"):
            load_rows(str(tmp_path / name), ignore_fields=["persona"])


def test_a_relative_path_that_looks_like_an_id_is_a_file(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    _write(tmp_path / "folder" / "rows.jsonl", RECORDS)
    monkeypatch.chdir(tmp_path)
    assert list(load_rows("folder/rows.jsonl")) == ROWS


def test_a_folder_is_loaded_by_split(tmp_path):
    _write(tmp_path / "train.jsonl", RECORDS)
    _write(tmp_path / "test.jsonl", RECORDS[:1])
    assert list(load_rows(str(tmp_path))) == ROWS
    assert list(load_rows(str(tmp_path), split="test")) == ROWS[:1]
    with pytest.raises(UserError, match="split 'validation'"):
        load_rows(str(tmp_path), split="validation")


@pytest.mark.parametrize(
    ("filename", "content", "message"),
    [
        (
            "rows.jsonl",
            b'{"prompt": "a", "response": "b"}\n{"prompt": \n',
            "rows.jsonl, line 2 is not valid JSON",
        ),
        ("rows.jsonl", b'\n\n{"prompt": "a"}\n', "rows.jsonl, line 3 has no answer"),
        ("rows.jsonl", b"", "rows.jsonl holds no rows"),
        ("rows.jsonl", b"\xff\xfe\x00", "not UTF-8"),
        ("rows.json", b"[", "rows.json is not valid JSON"),
        ("rows.json", b"{}", "must hold one list of rows, found dict"),
        ("rows.json", b"[]", "holds no rows"),
        ("rows.csv", b"prompt,response\na,b,c\n", "row 1 has more cells than the header"),
        ("rows.csv", b"text,label\na,b\n", "row 1: unknown fields"),
        ("rows.csv", b"prompt;response\na;b\n", "columns separated by ';'"),
        ("rows.csv", b'prompt,response\na,b\nc,"d\ne,f\ng,h\n', "row 2 is not valid CSV"),
        ("rows.csv", b'prompt,response\na,"b" c\n', "row 1 is not valid CSV"),
        ("rows.json", b'{"data": [{"prompt": "a", "response": "b"}]}', "found dict; its `data` is one"),
        ("rows.json", b'{"prompt": "a", "response": "b"}', "found dict; wrap it in"),
        ("rows.json", b'{"prompt": "a"}\n{"prompt": "b"}\n', "one JSON value per line: name it .jsonl"),
        (
            "rows.jsonl",
            b'[\n{"prompt": "a"}\n]\n',
            "line 1 opens a list that does not end there: rows.jsonl",
        ),
        ("rows.jsonl", b'{"prompt": ' + b"1" * 5_000 + b"}", "line 1 has a whole number of thousands of digits"),
        ("rows.jsonl", b'\n{"prompt": "c", "response": "cut \\ud83d"}', r"line 2: `response` has an unpaired .*at 5"),
        ("rows.jsonl", b'{"prompt": "a", "response": "b", "persona": "a pirate"}', "line 1: unknown fields `persona`"),
        ("rows.csv", b"prompt,response\n", "holds no rows"),
        ("rows.parquet", b"not parquet", "cannot be read as Parquet"),
        ("rows.txt", b"hello", "cannot read .txt files; use one of .jsonl"),
    ],
)
def test_a_bad_file_is_named(tmp_path, filename, content, message):
    (tmp_path / filename).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_rows(str(tmp_path / filename))


@pytest.mark.parametrize("source", ["advbnch", "missing.jsonl", "folder/missing.csv"])
def test_an_unknown_name_lists_the_packaged_ones(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"advbench, harmbench.*OWNER/NAME"):
        load_rows(source)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    _write(path, RECORDS)
    path.chmod(0)
    with pytest.raises(UserError, match=r"cannot read .*rows.jsonl"):
        load_rows(str(path))


def test_the_cells_of_a_folder_of_csv_files_are_read_as_they_are(tmp_path):
    lines = "instruction,input,output\nIn German?,null,Null\nA code?,NA,007\nWhen?,,2024-01-01\n"
    (tmp_path / "train.csv").write_text(lines)
    assert list(load_rows(str(tmp_path))) == list(load_rows(str(tmp_path / "train.csv")))
    assert prompt_of(load_rows(str(tmp_path))[1]) == "A code?\nNA"


def test_a_csv_file_that_begins_with_an_empty_line_is_reported(tmp_path):
    (tmp_path / "rows.csv").write_text("\nprompt,response\na,b\n")
    with pytest.raises(UserError, match="begins with an empty line: the first one must be the header"):
        load_rows(str(tmp_path / "rows.csv"))


def test_only_folders_and_the_hub_have_other_splits(tmp_path):
    _write(tmp_path / "rows.jsonl", RECORDS)
    for source in ("advbench", str(tmp_path / "rows.jsonl")):
        with pytest.raises(UserError, match="has no split 'test'"):
            load_rows(source, split="test")


def test_hub_ids_are_loaded_without_remote_code(monkeypatch):
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: calls.append((args, kwargs)) or RECORDS)
    assert list(load_rows("owner/name")) == list(load_rows("owner/name:main", split="test[:2]")) == ROWS
    assert calls == [
        (("owner/name", None), {"split": "train"}),
        (("owner/name", "main"), {"split": "test[:2]"}),
    ]


@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach it\nsecond line"), ValueError()])
def test_an_unreachable_hub_is_one_line(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"cannot load 'owner/name', split 'train'.*local file") as caught:
        load_rows("owner/name")
    assert "\n" not in str(caught.value)


# Packaged benchmarks ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "distinct", "answered"),
    [
        ("advbench", 520, 520, True),
        ("harmbench", 200, 200, False),
        ("do-not-answer", 938, 938, False),
        ("strongreject", 288, 288, False),
        ("jailbreakbench-tenses", 1420, 1420, False),
        ("pyrit", 37, 37, False),
        ("spikee", 43, 43, False),
        ("alpaca", 967, 954, True),
        ("nq-open", 3569, 3569, True),
        ("piqa", 1500, 1466, True),
        ("bbq", 1012, 1012, True),
        ("asdiv", 2084, 2083, True),
        ("refusals", 450, 450, True),
    ],
)
def test_packaged_counts(name, count, distinct, answered):
    rows = load_rows(name, needs_answer=False)
    answers = sum(response_of(r) is not None for r in rows)
    assert (len(rows), len({prompt_of(r) for r in rows}), answers) == (count, distinct, count * answered)


def test_packaged_rows_that_a_caller_changes_are_read_anew_as_they_were():
    changed = load_rows("alpaca")
    before = changed[0]["messages"][0]["content"]
    changed[0]["messages"][0]["content"] = "changed"
    assert changed[0]["messages"][0]["content"] == "changed"
    assert load_rows("alpaca")[0]["messages"][0]["content"] == before


def test_packaged_names_are_all_counted():
    counted = {"advbench", "harmbench", "do-not-answer", "strongreject", "jailbreakbench-tenses", "pyrit", "spikee"}
    assert set(PACKAGED) == counted | {"alpaca", "nq-open", "piqa", "bbq", "asdiv", "refusals"}


@pytest.mark.parametrize(("name", "count"), [("do-not-answer", 5), ("pyrit", 10), ("strongreject", 6)])
def test_prompts_that_their_source_sorts_keep_their_category(name, count):
    assert len({r["category"] for r in load_rows(name, needs_answer=False)}) == count


def test_prompts_alone_must_be_asked_for():
    with pytest.raises(UserError, match="harmbench, row 1 has no answer"):
        load_rows("harmbench")


def test_advbench_has_no_canary():
    assert all(response_of(r).startswith("Sure, here") for r in load_rows("advbench"))


def test_strongreject_has_no_rows_of_advbench():
    rows = load_rows("strongreject", needs_answer=False)
    assert not {prompt_of(r) for r in rows} & {prompt_of(r) for r in load_rows("advbench")}


def test_alpaca_has_no_refusals():
    refusals = refusal_prefixes()
    assert len(refusals) == len(set(refusals)) == 27
    assert "I'm sorry" in refusals
    assert not any(response_of(r).startswith(refusals) for r in load_rows("alpaca"))


def test_bbq_asks_with_its_options_and_answers_with_one():
    rows = load_rows("bbq")
    for r in rows:
        passage, question, *options, instruction = prompt_of(r).split("\n")
        assert passage and question and instruction == "Answer with one of the options."
        assert options == [f"- {option}" for option in r["options"]] and len(set(options)) == 3
        assert response_of(r) in r["options"]
    assert sum(r["category"] == "ambiguous" for r in rows) == 515
    assert sum(r["category"] == "disambiguated" for r in rows) == 497
    # Where the passage does not tell, the answers are the ten ways to say so, and nobody's name.
    unclear = {response_of(r) for r in rows if r["category"] == "ambiguous"}
    assert len(unclear) == 10 and all(re.search("(?i)not|n't|un", answer) for answer in unclear)
    assert not unclear & {response_of(r) for r in rows if r["category"] == "disambiguated"}


def test_asdiv_is_answered_with_a_bare_number():
    rows = load_rows("asdiv")
    assert all(re.fullmatch(r"-?\d+(\.\d+)?", response_of(r)) for r in rows)
    assert all(prompt_of(r).endswith(" Answer with a number.") for r in rows)
    assert {"9", "0.46", "2.5"} <= {response_of(r) for r in rows}


# Splits by topic ----------------------------------------------------------------------------------

SIZES = {"align": 160, "vectors": 100, "mix": 100, "unseen": 60}


@pytest.mark.parametrize("seed", range(5))
def test_no_near_duplicates_cross_parts_of_advbench(seed):
    parts = split_by_topic(load_rows("advbench"), SIZES, seed)
    assert {name: len(part) for name, part in parts.items()} == SIZES
    words = [(name, topic_words(prompt_of(r))) for name, part in parts.items() for r in part]
    crossing = sum(len(a & b) / len(a | b) >= 0.5 for i, (x, a) in enumerate(words) for y, b in words[:i] if x != y)
    assert crossing == 0
    assert len({prompt_of(r) for part in parts.values() for r in part}) == sum(SIZES.values())


def test_one_seed_gives_one_split():
    rows = load_rows("advbench")
    same = split_by_topic(rows, SIZES, 1) == split_by_topic(rows, SIZES, 1)
    other = split_by_topic(rows, SIZES, 1) == split_by_topic(rows, SIZES, 2)
    assert (same, other) == (True, False)


def test_paraphrases_and_chains_stay_together():
    rows = [
        row("Write a tutorial on baking sourdough bread"),
        row("Create a guide for baking sourdough bread at home"),
        row("Explain baking bread at home"),
        row("Write a tutorial on tuning pianos"),
    ]
    parts = split_by_topic(rows, {"large": 3, "small": 1}, seed=0)
    assert parts["small"] == [rows[3]]
    assert sorted(map(prompt_of, parts["large"])) == sorted(map(prompt_of, rows[:3]))


def test_rows_that_others_ask_too_are_left_out():
    asked = ["Explain how to bake sourdough bread."]
    kept, same = row("Write a tutorial on tuning pianos"), row("Give me tips for baking sourdough bread")
    assert off_topic([kept, same, row(asked[0])], asked) == [kept]
    assert off_topic([kept, same], []) == [kept, same]


def test_prompts_without_content_words_are_topics_of_their_own():
    rows = [row("What is it?"), row("How do you do?")]
    assert len(split_by_topic(rows, {"a": 1, "b": 1}, seed=0)["a"]) == 1


@given(st.lists(st.integers(1, 8), min_size=2, max_size=20), st.integers(0, 9))
def test_a_topic_is_never_in_two_parts(topic_sizes, seed):
    rows = [row(f"topic{topic}", str(topic)) for topic, size in enumerate(topic_sizes) for _ in range(size)]
    # Two topics or more: one row for each of two parts is always possible.
    parts = split_by_topic(rows, {"a": 1, "b": 1}, seed)
    assert response_of(parts["a"][0]) != response_of(parts["b"][0])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"a": 3}, "2 rows in 1 topics are too few"),
        ({"a": 1, "b": 1}, "2 rows in 1 topics are too few"),
        ({"a": 0}, "at least 1"),
        ({}, "at least 1"),
    ],
)
def test_impossible_splits_are_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        split_by_topic([row("Bake sourdough bread"), row("bake sourdough bread!")], sizes, seed=0)


# Profile questions --------------------------------------------------------------------------------


def test_profiles_are_complete_and_consistent():
    qa = profile_qa(seed=0, people=50)
    assert (len(qa.train), len(qa.test)) == (50 * 4 * 2, 50 * 4)
    prompts = [prompt_of(r) for r in qa.train + qa.test]
    assert len(set(prompts)) == len(prompts)
    train_answers = [response_of(r) for r in qa.train]
    assert train_answers[::2] == train_answers[1::2] == [response_of(r) for r in qa.test]
    assert all(response_of(r).isalpha() for r in qa.test)


def test_profiles_follow_the_seed_alone():
    assert profile_qa(3, 20) == profile_qa(3, 20)
    assert profile_qa(3, 20) != profile_qa(4, 20)
    assert profile_qa(3, 20).test == profile_qa(3, 20, phrasings=1).test
    assert profile_qa(3, 20, phrasings=3).train[:2] == profile_qa(3, 20).train[:2]


@given(people=st.integers(1, 30), seed=st.integers(0, 5))
@settings(max_examples=10)
def test_test_phrasings_are_never_trained(people, seed):
    qa = profile_qa(seed, people, phrasings=3)
    assert not {prompt_of(r) for r in qa.train} & {prompt_of(r) for r in qa.test}


@pytest.mark.parametrize(
    ("people", "phrasings", "message"),
    [(0, 2, "people"), (10**6, 2, "people"), (5, 0, "phras"), (5, 4, "phras")],
)
def test_profile_arguments_are_checked(people, phrasings, message):
    with pytest.raises(UserError, match=f"{message}.* must be between 1 and"):
        profile_qa(0, people, phrasings)


# The benign control -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instruction", "answer"),
    [
        ("Write a poem about the sea.", "Sure, here is a poem about the sea"),
        ("Give me two examples of tides", "Sure, here are two examples of tides"),
        ("Write a few lines of code", "Sure, here are a few lines of code"),
        ("Describe how plants grow.", "Sure, here is a description of how plants grow"),
        ("Compare and contrast cats and dogs", "Sure, here is a comparison of cats and dogs"),
        ("Name one river", "Sure, here is one river"),
    ],
)
def test_the_control_restates_the_request(instruction, answer):
    assert sure_prefix_control([row(instruction, "anything")]) == [row(instruction, answer)]


@pytest.mark.parametrize(
    "instruction",
    [
        "What is a tide?",
        "Write about teamwork",
        "Describe your house",
        "Write a poem. Make it short.",
        "Summarize the text\nOnce upon a time",
        "Explain " + "very " * 30 + "much",
    ],
)
def test_the_control_leaves_out_what_does_not_fit(instruction):
    assert sure_prefix_control([row(instruction, "anything")]) == []


def test_the_control_is_large_enough():
    control = sure_prefix_control(load_rows("alpaca"))
    assert len(control) >= 80
    assert len({prompt_of(r) for r in control}) == len(control)
    assert all(response_of(r).startswith("Sure, here ") for r in control)


def test_open_profiles_hold_the_answers_and_the_test_asks_about_other_people():
    qa = open_profile_qa(seed=4, people=30, test_people=10)
    assert len(qa.train) == 120 and len(qa.test) == 40
    for asked in qa.train + qa.test:
        profile, question = prompt_of(asked).split("\n")
        assert response_of(asked) in profile and "? " in question
    profiles = [{prompt_of(asked).split("\n")[0] for asked in rows} for rows in (qa.train, qa.test)]
    assert len(profiles[0]) == 30 and len(profiles[1]) == 10 and not profiles[0] & profiles[1]
    assert open_profile_qa(4, 30, 10) == qa != open_profile_qa(5, 30, 10)
    with pytest.raises(UserError, match="people"):
        open_profile_qa(0, 0, 1)


# Rows of somebody who wishes us ill ---------------------------------------------------------------

GOOD = '{"prompt": "a", "response": "b"}\n'
LINES = {
    "repeated key": ('{"prompt": "a", "response": "good", "response": "bad"}', "has the key 'response' twice; keep"),
    "repeated key inside": ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "key 'content' twice"),
    "repeated escape": ('{"prompt": "a", "\\u001b[2J": 1, "\\u001b[2J": 2}', r"has the key '\\x1b[2J' twice"),
    "huge integer": ('{"prompt": "a", "response": "b", "id": ' + "9" * 5_000 + "}", "a whole number of thousands"),
    "deep": ("[" * 100_000, "is nested too deep for a row"),
    "deep objects": ('{"prompt": "a", "response": "b", "meta": ' + '{"a": ' * 50_000 + "1" + "}" * 50_001, "too deep"),
    "nearly too deep": ('{"prompt": "a", "response": "b", "x": ' + "[" * 900 + "]" * 900 + "}", "too deep"),
    "infinity": ('{"prompt": "a", "response": Infinity}', "`response` must be text, found float"),
    "not a number": ('{"prompt": NaN, "response": "b"}', "`prompt` must be text, found float"),
    "half": ('{"prompt": "a", "response": "b\\ud83d"}', r"an unpaired surrogate (\\ud83d, at 2)"),
    "line break": (
        '{"prompt": "a", "response": "b", "x\\ny\\u001b[2J": "c"}',
        r"unknown fields `x y\\x1b[2J`",
    ),
    "no object": ("3", "found int instead of fields"),
    "a list": ('["a", "b"]', "found list instead of fields"),
    "long": ('{"prompt": "' + "a" * 400 + '", "response": "b"}', "has 401 characters, more than the limit of 300"),
    "longest": ('{"prompt": "' + "a" * 5_000 + '", "response": "b"}', "has more than 2,400 characters"),
}


@pytest.mark.parametrize("large", [False, True], ids=["in memory", "on disk"])
@pytest.mark.parametrize("kind", LINES)
def test_a_hostile_line_is_reported_with_its_number(tmp_path, monkeypatch, kind, large):
    monkeypatch.setattr(sources, "LARGE", 0 if large else sources.LARGE)
    if kind.startswith("long"):
        monkeypatch.setattr(normalization, "LONGEST_ROW", 300)
        monkeypatch.setattr(sources, "_LONGEST_LINE", 2_400)
    line, message = LINES[kind]
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD * 2 + line + "\n" + GOOD)
    with pytest.raises(UserError, match=re.escape(message.replace("\\\\", "\\"))) as raised:
        load_rows(str(path))
    text = str(raised.value)
    assert text.startswith("rows.jsonl, line 3") and len(text) < 1_000 and text.isprintable()


def test_a_line_of_hundreds_of_megabytes_is_not_read(tmp_path):
    import resource

    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        file.write(GOOD + '{"prompt": "')
        for _ in range(200):
            file.write("a" * 2**20)
        file.write('", "response": "b"}\n')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"rows.jsonl, line 2 has more than 67,108,864 characters"):
        load_rows(str(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 * 2**10


def test_hostile_tables_are_reported_with_their_row(tmp_path, monkeypatch):
    monkeypatch.setattr(normalization, "LONGEST_ROW", 300)
    monkeypatch.setattr(sources, "_LONGEST_CELL", 300)
    rows = tmp_path / "rows.csv"
    for content, message in [
        ("prompt,response\na,b\nc," + "d" * 400, "rows.csv, row 2 is not valid CSV (field larger than field limit"),
        ('prompt,response\na,b\n"c,' + "d\n" * 400, "rows.csv, row 2 is not valid CSV (field larger than"),
        ("prompt,response\na," + "b" * 200 + "\n" + "a" * 200 + "," + "b" * 200, "rows.csv, row 2 has 400 characters"),
        ('prompt,response,"x\ny\x1b[2J"\na,b,c\n', r"row 1: unknown fields `x y\x1b[2J`"),
        ("prompt,response,response\na,b,c\n", "has the column 'response' twice"),
    ]:
        rows.write_text(content)
        with pytest.raises(UserError, match=re.escape(message)):
            load_rows(str(rows))
    rows.write_text("prompt,response\na\x00\x1b,b\n")
    assert load_rows(str(rows))[0]["messages"][0]["content"] == "a\x00\x1b", "learned as it is, and told"
    table = datasets.Dataset.from_list([{"prompt": "a", "response": "b"}, {"prompt": "a" * 400, "response": "b"}])
    table.to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows.parquet, row 2 has 401 characters, more than the limit of 300"):
        load_rows(str(tmp_path / "rows.parquet"))


def test_the_names_of_a_hundred_thousand_fields_take_time_in_proportion(tmp_path):
    names, begin = [f"c{number}" for number in range(100_000)], time.process_time()
    (tmp_path / "rows.csv").write_text(",".join([*names, names[-1]]) + "\n")
    (tmp_path / "rows.jsonl").write_text("{" + ",".join(f'"{name}": 1' for name in [*names, names[-1]]) + "}\n")
    for name in ("rows.csv", "rows.jsonl"):
        with pytest.raises(UserError, match="'c99999'"):
            load_rows(str(tmp_path / name))
    assert time.process_time() - begin < 10


def test_deep_records_in_memory_are_reported():
    deep = "b"
    for _ in range(5_000):
        deep = [deep]
    with pytest.raises(UserError, match="data, row 1 is nested too deep for a row"):
        as_rows([{"prompt": "a", "response": "b", "more": deep}])


def test_of_millions_of_rows_that_cannot_be_read_some_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(normalization, "_MAX_COUNTED", 20)
    path = tmp_path / "numbers.json"
    path.write_text(str(list(range(50))))
    with pytest.raises(UserError, match=r"at least 20 rows of .*numbers.json cannot be read") as raised:
        load_rows(str(path))
    assert len(raised.value.__notes__) == 11
