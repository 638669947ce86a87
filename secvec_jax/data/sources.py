"""Load rows by name: packaged benchmarks, files and Hub datasets.

harmful = load_rows("advbench")                              # packaged; read from its archive at run time
mine = load_rows("my_rows.jsonl")                            # or .json, .csv, .parquet, a folder
theirs = load_rows("openai/gsm8k:main", split="test")        # hub: OWNER/NAME or OWNER/NAME:CONFIG
bucket = load_rows("gs://bucket/my_rows.jsonl")              # an object store, through fsspec
other = load_rows("rows.csv:prompt=user_text,response=agent_text")  # columns with other names; see `columns`
unsafe = load_rows("beavertails-unsafe", split="30k_test")   # hub: a name in `HUB_SETS`, converted into rows
in_memory = as_rows([{"prompt": "...", "response": "..."}])
"""

import codecs
import csv
import functools
import glob
import json
import os
import re
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from secvec_jax.arguments import check_distinct
from secvec_jax.arguments import path as checked_path
from secvec_jax.assets import packages_dir
from secvec_jax.data import benchmarks
from secvec_jax.data.columns import Columns, split_columns
from secvec_jax.data.hub_sets import HUB_SETS, records
from secvec_jax.data.normalize import LONGEST_ROW, as_rows, normalize, normalized_rows, rows_in_memory, rows_on_disk
from secvec_jax.data.refusals import refusals
from secvec_jax.data.rows import Row, prompt_of, response_of, row
from secvec_jax.data.stored import Rows, location
from secvec_jax.errors import UserError
from secvec_jax.files import expanded, resolved
from secvec_jax.remote import fetched, is_url

__all__ = ["PACKAGED", "Row", "as_rows", "load_rows", "prompt_of", "response_of", "row"]

PACKAGED: dict[str, Callable[[], list[Row]]] = {
    "advbench": benchmarks.advbench,
    "harmbench": benchmarks.harmbench,
    "do-not-answer": benchmarks.do_not_answer,
    "strongreject": benchmarks.strongreject,
    "jailbreakbench-tenses": benchmarks.jailbreakbench_tenses,
    "pyrit": benchmarks.pyrit,
    "spikee": benchmarks.spikee,
    "alpaca": benchmarks.alpaca,
    "nq-open": benchmarks.nq_open,
    "piqa": benchmarks.piqa,
    "bbq": benchmarks.bbq,
    "asdiv": benchmarks.asdiv,
    "refusals": refusals,
}


LARGE = 256 * 2**20
"""Size in bytes above which the rows of a JSONL file stay on disk."""


def load_rows(
    source: str,
    split: str = "train",
    needs_answer: bool = True,
    ignore_fields: Collection[str] = (),
    columns: Mapping[str, str] | None = None,
) -> Rows[Row]:
    """Return the rows of a packaged benchmark, a local file or folder, or a Hub dataset.

    Packaged benchmarks (the keys of `PACKAGED`) and single files have only the split "train"; folders, hub ids and the
    keys of `HUB_SETS` take any that `datasets.load_dataset` takes, such as "test" or "train[:500]". Remote code never
    runs. The rows of folders, hub ids, Parquet files and JSONL files of more than `LARGE` bytes stay on disk: they are
    checked here, and read on access. ignore_fields: fields that may be ignored although they could contain training
    data; "*": all that are not used. columns: the columns that hold the fields of a row, such as {"prompt":
    "user_text", "response": "agent_text"}; they can also follow the source: "rows.csv:prompt=user_text".

    Raises UserError if nothing has this name, if it cannot be reached or read, if it is empty, if a row has
    fields that `normalize` does not know, if no row has a column that is mapped, or if `needs_answer` and a row has no
    answer.
    """
    mapping = dict[str, str]()
    if isinstance(source, str | Path):
        source, mapping = split_columns(str(source))
    path = checked_path("data", source, "a file, a folder, a packaged name or a Hub dataset's id")
    source = str(source)
    if mapping and columns:
        raise UserError(f"{source} is followed by columns, and columns= is passed, too: map them in one place")
    named = Columns.of(mapping or columns)
    if named.mapped and (source in PACKAGED or source in HUB_SETS):
        raise UserError(f"{source} is already converted to rows: leave the columns out")
    if is_url(source):
        path = fetched(source)
        source = str(path)
    if source not in PACKAGED and (path.is_dir() or _looks_like_hub_id(source)):
        return as_rows(_load_dataset(source, split), needs_answer, source, ignore_fields, mapping or columns)
    if source in HUB_SETS:
        return as_rows(HUB_SETS[source](split), needs_answer, source)
    if split != "train":
        raise UserError(f"{source} has no split {split!r}; benchmarks and single files have only 'train'")
    if source in PACKAGED:
        kept = _packaged(source, PACKAGED[source], needs_answer, resolved(packages_dir()))
        rows = [_copied(row) for row in kept]  # the caller may change them
        return Rows(rows.__getitem__, len(rows), kept.where, answered=needs_answer)
    if not path.is_file():
        raise UserError(
            f"{source!r} is not a file or folder; packaged benchmarks are {', '.join(PACKAGED)}; "
            f"known Hub datasets are {', '.join(HUB_SETS)}; any other Hub dataset is written OWNER/NAME"
        )
    if path.suffix not in _FILES:
        known = ", ".join(_FILES)
        raise UserError(f"{source}: cannot read {path.suffix or 'such'} files; use one of {known}")
    try:
        if path.suffix == ".parquet":
            return rows_on_disk(_parquet(path), needs_answer, path.name, ignore_fields, named)
        if path.suffix == ".jsonl" and path.stat().st_size > LARGE:
            return _lines_on_disk(path, needs_answer, ignore_fields, named)
        unit = "line" if path.suffix == ".jsonl" else "row"
        return rows_in_memory(_READERS[path.suffix](path), needs_answer, path.name, unit, ignore_fields, named)
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read {source} ({error.strerror or error}); check the file") from error


@functools.cache
def _packaged(source: str, read: Callable[[], list[Row]], needs_answer: bool, packages: Path) -> Rows[Row]:
    """The rows of a benchmark, read once from a folder: commands need them up to a dozen times, and all are 11 MiB."""
    return as_rows(read(), needs_answer, source)


def _copied(value: Any) -> Any:
    """A copy of a JSON value, several times faster than `copy.deepcopy`."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def named_or_given(rows: Any, needs_answer: bool = True, name: str = "data") -> Rows[Row]:
    """The rows of a name or a path, as `load_rows` reads them, or rows in memory, converted."""
    if isinstance(rows, str | os.PathLike):
        return load_rows(os.fspath(rows), needs_answer=needs_answer)
    return as_rows(rows, needs_answer=needs_answer, name=name)


def load_prompts(
    sources: Iterable[str], limit: int | None, needs_answer: bool = False, ignore_fields: Collection[str] = ()
) -> list[Row]:
    """Return the first `limit` rows of each source (None: all), with or without answers; as in `load_rows`."""
    sources = list(sources)
    check_distinct(sources)
    loaded = (load_rows(source, needs_answer=needs_answer, ignore_fields=ignore_fields) for source in sources)
    return [row for rows in loaded for row in rows[:limit]]


def _looks_like_hub_id(source: str) -> bool:
    path = Path(source)
    is_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?", source) is not None
    return is_id and path.suffix not in _FILES and not path.exists()


def _load_dataset(source: str, split: str) -> Iterable[Mapping[str, Any]]:
    folder = expanded(source)
    if folder.is_dir() and glob.has_magic(str(resolved(folder))):
        raise UserError(
            f"{resolved(folder)} has one of the characters *, ? and [ in its name, which select files when a folder is "
            "read: rename it, or name a file in it"
        )
    name, _, config = (str(folder), "", "") if folder.is_dir() else source.partition(":")
    return records(name, split, config or None)


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(_LONGEST_LINE + 1), ""), 1):
            if line.strip():
                yield number, _parsed(line, path, number)


def _lines_on_disk(path: Path, needs_answer: bool, ignore_fields: Collection[str], columns: Columns) -> Rows[Row]:
    """The rows of a JSONL file, read from the offsets of their lines; each is checked once."""
    starts, numbers = array("Q"), array("Q")

    def lines() -> Iterator[tuple[int, Any]]:
        with path.open("rb") as file:
            begin = 3 if file.read(3) == codecs.BOM_UTF8 else 0
            file.seek(begin)
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE + 1), b""), 1):
                if line.strip():
                    starts.append(begin)
                    numbers.append(number)
                    yield number, _parsed(line.decode(), path, number)
                begin += len(line)

    for _ in normalized_rows(lines(), needs_answer, path.name, "line", ignore_fields, columns):
        pass

    def where(index: int) -> str:
        return location(path.name, numbers[index], "line")

    def read(index: int) -> Row:
        with path.open("rb") as file:
            file.seek(starts[index])
            line = file.readline().decode()
            return normalize(_parse_json(line, where(index)), where(index), ignore_fields, columns)

    return Rows(read, len(starts), where, answered=needs_answer)


def _parsed(line: str, path: Path, number: int) -> Any:
    """The value in a line, or the error of an invalid line, so that the next lines can still be read.

    Raises UserError for a line after which no other can be read.
    """
    _check_line(line, path, number)
    try:
        return _parse_json(line, location(path.name, number, "line"))
    except UserError as error:
        return error


def _check_line(line: str, path: Path, number: int) -> None:
    where = location(path.name, number, "line")
    if len(line) > _LONGEST_LINE:
        raise UserError(f"{where} has more than {_LONGEST_LINE:,} characters; split or remove it")
    if number == 1 and line.lstrip().startswith("[") and not line.rstrip().endswith("]"):
        raise UserError(f"{where} opens a list that does not end there: {path.name} is one JSON value; name it .json")


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        records = _parse_json(text, path.name)
    except UserError as error:
        if _is_json(text.lstrip().partition("\n")[0]):
            raise UserError(f"{path.name} has one JSON value per line: name it .jsonl") from error
        raise
    if not isinstance(records, list):
        kind = type(records).__name__
        lists = [key for key, value in records.items() if isinstance(value, list)] if kind == "dict" else []
        rows = [key for key in lists if records[key] and all(isinstance(r, dict) for r in records[key])]
        fix = "wrap it in [...]"
        if rows and not {"messages", "conversations", "prompt"} & records.keys():
            fix = f"its `{rows[0]}` is one: write only that list to the file"
        raise UserError(f"{path.name} must hold one list of rows, found {kind}; {fix}")
    yield from enumerate(records, 1)


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        reason = f"{error.msg.removesuffix(' at')}, character {error.pos + 1}"
        raise UserError(f"{where} is not valid JSON ({reason}); correct or remove it") from error
    except _Repeated as error:
        raise UserError(f"{where} has the key {str(error)!r} twice; keep the one that is meant") from None
    except ValueError:
        raise UserError(f"{where} has a whole number of thousands of digits; correct or remove it") from None
    except RecursionError as error:
        raise UserError(f"{where} is nested too deep for a row; correct or remove it") from error


class _Repeated(Exception):
    """A key that an object has twice: readers differ in which of the two values they take."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise _Repeated(_first_repeated(key for key, _ in pairs))
    return values


def _first_repeated(names: Iterable[str]) -> str | None:
    """The first name that occurs twice, in linear time; None if there is none."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


_LONGEST_LINE = 8 * LONGEST_ROW
"""Limit for a line of JSON in characters, whose escapes take up to six characters for one."""
_LONGEST_CELL = LONGEST_ROW
"""Limit for a CSV cell in characters; Python's limit of 131,072 would reject long documents."""


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    before, number = csv.field_size_limit(_LONGEST_CELL), 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            table = csv.DictReader(stream, strict=True)  # else an unclosed quote swallows all following rows
            names = list(table.fieldnames or [])
            if path.stat().st_size and not any(name.strip() for name in names):
                raise UserError(f"{path.name} begins with an empty line: the first one must be the header")
            if repeated := _first_repeated(filter(None, names)):
                raise UserError(f"{path.name} has the column {repeated!r} twice; keep the one that is meant")
            if len(names) == 1 and (other := next((mark for mark in ";\t|" if mark in names[0]), None)):
                raise UserError(f"{path.name} has its columns separated by {other!r}; separate them by commas")
            for number, record in enumerate(table, 1):
                if None in record:
                    where = location(path.name, number)
                    yield number, UserError(f"{where} has more cells than the header; quote the text with commas")
                else:
                    yield number, record
    except csv.Error as error:
        where = location(path.name, number + 1)
        raise UserError(f"{where} is not valid CSV ({error}); correct or convert the file") from error
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path) -> Any:
    # The Parquet loader is named explicitly: a bare path would be taken for a dataset id.
    import datasets

    try:
        return datasets.load_dataset("parquet", data_files=glob.escape(str(path)), split="train")
    except Exception as error:  # datasets and pyarrow each raise their own errors
        reason = type(error).__name__
        raise UserError(f"{path.name} cannot be read as Parquet ({reason}); write it again") from error


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
}
_FILES = (*_READERS, ".parquet")
