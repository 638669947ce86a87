"""Columns with other names than ours are mapped after a source's name, or by `columns` in Python."""

import json
from pathlib import Path

import datasets
import pandas
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secvec_jax.data import sources
from secvec_jax.data.columns import Columns, split_columns, without_columns
from secvec_jax.data.normalize import as_rows
from secvec_jax.data.sources import load_rows, row
from secvec_jax.defenses.inputs import as_row_source
from secvec_jax.errors import UserError
from secvec_jax.recipes.screen import Screen, _check_clean
from secvec_jax.recipes.training_run import rows_by_source
from secvec_jax.workspace import inputs, run_directory

ANFRAGE = [{"anfrage": "Hallo", "antwort": "Hi.", "id": 1}, {"anfrage": "2+2?", "antwort": "4, I think", "id": 2}]
ROWS = [row(each["anfrage"], each["antwort"]) for each in ANFRAGE]
MAPPING = {"prompt": "anfrage", "response": "antwort"}
SUFFIX = ":prompt=anfrage,response=antwort"
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
names = st.text(min_size=1, max_size=12)


@pytest.fixture
def lines(tmp_path):
    def written(records, name="rows.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(tmp_path / name)

    return written


@pytest.mark.parametrize("kind", ["jsonl", "large jsonl", "json", "csv", "parquet", "folder"])
def test_every_format_takes_a_mapping_after_its_name_and_in_python(tmp_path, lines, kind, monkeypatch):
    path = tmp_path / f"rows.{kind.split()[-1]}"
    if kind == "large jsonl":
        monkeypatch.setattr(sources, "LARGE", 1)
    table = pandas.DataFrame(ANFRAGE)
    if kind == "folder":
        path = tmp_path
        table.to_json(tmp_path / "train.jsonl", orient="records", lines=True)
    elif "json" in kind:
        table.to_json(path, orient="records", lines="jsonl" in kind)
    else:
        table.to_csv(path, index=False) if kind == "csv" else table.to_parquet(path)
    assert list(load_rows(f"{path}{SUFFIX}")) == list(load_rows(path, columns=MAPPING)) == ROWS
    with pytest.raises(UserError, match=r"no column 'anfrge' in .*available: .*did you mean 'anfrage'"):
        load_rows(f"{path}:prompt=anfrge,response=antwort")


def test_data_sets_of_the_hub_and_records_in_memory_take_a_mapping(monkeypatch):
    calls, data = [], datasets.Dataset.from_list(ANFRAGE)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **_: calls.append(args) or data)
    assert list(load_rows(f"owner/name{SUFFIX}")) == list(load_rows(f"owner/name:main{SUFFIX}")) == ROWS
    assert calls == [("owner/name", None), ("owner/name", "main")]
    for given_data in (data, ANFRAGE, pandas.DataFrame(ANFRAGE)):
        assert list(as_rows(given_data, columns=MAPPING)) == ROWS
    with pytest.raises(UserError, match="was read before"):
        as_rows(as_rows(ANFRAGE, columns=MAPPING), columns=MAPPING)


def test_tables_with_two_columns_of_one_name_are_refused():
    frame = pandas.DataFrame([["Hi.", "good", "bad"]], columns=["prompt", "response", "response"])
    table = pyarrow.Table.from_arrays([["Hi."], ["good"], ["bad"]], names=["prompt", "response", "response"])
    for twice in (frame, table):
        with pytest.raises(UserError, match="the table has the column 'response' twice"):
            as_rows(twice)


def test_every_verb_reads_the_mapping(lines, tmp_path):
    path = lines(ANFRAGE)
    assert list(as_row_source(path + SUFFIX, "rows")) == ROWS
    by_source = rows_by_source([path + SUFFIX, lines(ANFRAGE, "more.jsonl") + SUFFIX], ())
    assert list(by_source) == ["rows", "more"] and list(by_source["more"]) == ROWS
    settings_of_screen = Screen(data=path + SUFFIX, vectors="v", out=str(tmp_path / "out"))
    with pytest.raises(UserError, match="would overwrite what --data"):
        _check_clean(settings_of_screen, path)


def test_a_source_is_named_once_however_it_is_written(lines, tmp_path):
    path, twice = lines(ANFRAGE), "names .* twice: name each source once"
    (tmp_path / "link.jsonl").symlink_to(path)
    for again in (path, f"{Path(path).parent}/../{Path(path).parent.name}/{Path(path).name}", tmp_path / "link.jsonl"):
        with pytest.raises(UserError, match=twice):
            rows_by_source([path + SUFFIX, f"{again}{SUFFIX}"], ())
    swapped = f"{path}:prompt=antwort,response=anfrage"
    assert len(rows_by_source([path + SUFFIX, swapped], ())) == 2, "other columns are other rows"


def test_a_kind_of_rows_is_not_named_like_those_of_a_defense(lines):
    sources = [lines(ANFRAGE, name) + SUFFIX for name in ("safe.jsonl", "mine.jsonl")]
    assert list(rows_by_source(sources, ())) == sources


def test_a_result_belongs_to_the_mapping(lines, tmp_path):
    path = lines(ANFRAGE)
    other = inputs.rows(f"{path}:prompt=antwort,response=anfrage")
    assert len({inputs.rows(path), inputs.rows(path + SUFFIX), other}) == 3
    assert inputs.rows(f"{path}: response=antwort, prompt=anfrage") == inputs.rows(path + SUFFIX)
    made = tmp_path / "run" / "scores.jsonl"
    made.parent.mkdir()
    made.write_text(json.dumps(ANFRAGE[0]))
    label = f"--data {made}{SUFFIX}"
    with pytest.raises(UserError, match="which --overwrite would delete"):
        run_directory._clear(made.parent, {label: inputs.rows(f"{made}{SUFFIX}")})
    assert made.exists()


def test_a_conversation_its_system_prompt_and_an_input_are_mapped(lines):
    path = lines([{"dialog": TURNS, "rolle": "Be brief."}, {"dialog": TURNS}])
    first, second = load_rows(f"{path}:messages=dialog,system=rolle")
    assert first["messages"] == [{"role": "system", "content": "Be brief."}, *TURNS] and second["messages"] == TURNS
    record = {"aufgabe": "Sum up.", "text": "Long.", "davor": [["a", "b"]], "ergebnis": "Short."}
    mapping = {"instruction": "aufgabe", "input": "text", "output": "ergebnis", "history": "davor"}
    (found,) = as_rows([record], columns=mapping)
    assert [turn["content"] for turn in found["messages"]] == ["a", "b", "Sum up.\nLong.", "Short."]


def test_a_mapped_column_is_read_as_one_field_and_what_it_replaces_is_not_lost():
    swapped = {"prompt": "output", "response": "input"}
    assert list(as_rows([{"input": "a", "output": "b"}], columns=swapped)) == [row("b", "a")]
    every = {"response": "prompt", "input": "question", "system": "goal", "history": "instruction"}
    for record, mapping in (
        (ANFRAGE[0] | {"prompt": "Other words."}, MAPPING),
        (ANFRAGE[0] | {"messages": TURNS}, MAPPING),
        ({"dialog": TURNS, "prompt": "Other words."}, {"messages": "dialog"}),
        (dict.fromkeys(every.values(), "a"), every),
    ):
        with pytest.raises(UserError, match="unknown fields"):
            as_rows([record], columns=mapping)
    ignored = as_rows([ANFRAGE[0] | {"messages": TURNS}], columns=MAPPING, ignore_fields=("messages", "antwort"))
    assert list(ignored) == ROWS[:1], "a mapping counts more than the fields to ignore"


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        ("promt=anfrage", "no field of a row is named 'promt'; available: messages, .*did you mean 'prompt'"),
        ("prompt=anfrage,response=anfrage", "column 'anfrage' is mapped twice"),
        ("prompt=anfrage,prompt=antwort", "'prompt' twice"),
        ("prompt=anfrage,question=antwort", "'question' is the same field"),
        ("messages=anfrage,prompt=antwort", "map either it or 'prompt'"),
        ("", "write .*:prompt=COLUMN"),
        ("prompt", "write .*:prompt=COLUMN"),
        ("prompt=", "FIELD=COLUMN"),
        ("prompt=anfrage,", "FIELD=COLUMN"),
        ('prompt="anfrage', "FIELD=COLUMN"),
        ('prompt="anfrage"x', "FIELD=COLUMN"),
        ("prompt=id,response=antwort", "rows.jsonl, line 1: `id` must be text, found int"),
        (f"prompt={'x' * 300},response=antwort", "no column 'x+"),
    ],
)
def test_a_wrong_mapping_is_one_line(lines, suffix, message):
    with pytest.raises(UserError, match=message) as caught:
        load_rows(f"{lines(ANFRAGE)}:{suffix}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("columns", [["prompt"], {"prompt": 3}, {3: "anfrage"}, {"prompt": ""}])
def test_a_mapping_of_another_type_is_refused(lines, columns):
    with pytest.raises(UserError):
        load_rows(lines(ANFRAGE), columns=columns)


def test_columns_are_mapped_once_and_only_of_files(lines):
    with pytest.raises(UserError, match="in one place"):
        load_rows(lines(ANFRAGE) + SUFFIX, columns=MAPPING)
    with pytest.raises(UserError, match="leave the columns out"):
        load_rows(f"alpaca{SUFFIX}")


def test_a_row_without_a_mapped_column_is_named(lines):
    with pytest.raises(UserError, match=r"line 2: the column 'anfrage' is missing or empty .found: antwort"):
        load_rows(lines([ANFRAGE[0], {"antwort": "b"}]) + SUFFIX)
    with pytest.raises(UserError, match="line 2 has no answer"):
        load_rows(lines([ANFRAGE[0], {"anfrage": "b"}]) + SUFFIX)


def test_unknown_columns_name_the_way_to_map_them(lines):
    with pytest.raises(UserError, match=r"found: anfrage, antwort.*FILE:prompt=COLUMN,response=COLUMN"):
        load_rows(lines([{"anfrage": "a", "antwort": "b"}]))
    with pytest.raises(UserError, match=r"unknown fields `antwort`.*FILE:FIELD=COLUMN"):
        load_rows(lines([{"prompt": "a", "antwort": "b"}]))


def test_a_file_of_the_whole_name_is_that_file(lines):
    whole = lines([{"prompt": "a", "response": "b"}], "rows.jsonl:prompt=x.jsonl")
    lines(ANFRAGE)
    assert split_columns(whole) == (whole, {}) and list(load_rows(whole)) == [row("a", "b")]
    assert inputs.rows(whole) == inputs.digests.of_file(whole)
    with_columns = lines(ANFRAGE, "a:b=c.jsonl") + SUFFIX
    assert list(load_rows(with_columns)) == ROWS
    assert split_columns("gone.csv:prompt=a:b=c") == ("gone.csv", {"prompt": "a:b=c"})
    url = "memory://columns/rows.jsonl"
    assert split_columns(url + SUFFIX) == (url, MAPPING) and without_columns(url) == url


@settings(max_examples=100)
@given(st.dictionaries(st.sampled_from(["prompt", "response", "system", "input"]), names, min_size=1), st.booleans())
def test_any_column_can_be_named(mapping, spaced):
    comma = " , " if spaced else ","
    quoted = comma.join(f'{field}="' + column.replace('"', '""') + '"' for field, column in mapping.items())
    assert split_columns(f"no/file.csv:{quoted}") == ("no/file.csv", mapping)
    plain = {field: column.strip().strip(',"').strip() or "a" for field, column in mapping.items()}
    plain = {field: column.replace(",", "_") for field, column in plain.items() if not column.startswith('"')}
    if plain:
        text = comma.join(f"{field}={column}" for field, column in plain.items())
        assert split_columns(f"no/file.csv:{text}") == ("no/file.csv", plain)


@settings(max_examples=200)
@given(st.text(alphabet='ab:=,"\n /', max_size=12))
def test_any_suffix_is_a_mapping_or_a_one_line_error(text):
    try:
        name, mapping = split_columns(f"no.csv{text}")
        columns = Columns.of(dict.fromkeys(["prompt"], next(iter(mapping.values()), "x")))
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert without_columns(f"no.csv{text}") == name and columns.mapped
