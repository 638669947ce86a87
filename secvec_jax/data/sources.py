"""A name becomes rows.

harmful = load_rows("advbench")                              # packaged; read from its archive at run time
mine = load_rows("my_rows.jsonl")                            # or .json, .csv, .parquet, a folder
theirs = load_rows("openai/gsm8k:main", split="test")        # hub: OWNER/NAME or OWNER/NAME:CONFIG
unsafe = load_rows("beavertails-unsafe", split="30k_test")   # hub: by a name of `HUB_SETS`, made into rows
given = as_rows([{"prompt": "...", "response": "..."}])      # in memory
"""

import codecs
import csv
import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from secvec_jax.data import benchmarks
from secvec_jax.data.hub_sets import HUB_SETS, records
from secvec_jax.data.rows import (
    Row,
    Rows,
    as_rows,
    checked,
    collect,
    normalize,
    numbered,
    on_disk,
    prompt_of,
    response_of,
    row,
)
from secvec_jax.errors import UserError

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
}


LARGE = 256 * 2**20
"""Bytes of a JSONL file from which on its rows stay on disk."""


def load_rows(source: str, split: str = "train", needs_answer: bool = True) -> Sequence[Row]:
    """Return the rows of a packaged benchmark, a local file or folder, or a data set of the hub.

    Packaged benchmarks (the keys of `PACKAGED`) and single files have only the split "train"; folders, hub ids and the
    keys of `HUB_SETS` take any that `datasets.load_dataset` takes, such as "test" or "train[:500]". Remote code never
    runs. Of folders, hub ids, Parquet files and JSONL files of more than `LARGE` bytes the rows stay on disk: they are
    checked here, and read when they are asked for.

    Raises UserError if nothing has this name, if it cannot be reached or read, if it is empty, if a row has
    fields that `normalize` does not know, or if `needs_answer` and a row has no answer.
    """
    path = Path(source).expanduser()
    if source not in PACKAGED and (path.is_dir() or _looks_like_hub_id(source)):
        return as_rows(_load_dataset(source, split), needs_answer, source)
    if source in HUB_SETS:
        return as_rows(HUB_SETS[source](split), needs_answer, source)
    if split != "train":
        raise UserError(f"{source} has no split {split!r}; benchmarks and single files have only 'train'")
    if source in PACKAGED:
        return as_rows(PACKAGED[source](), needs_answer, source)
    if not path.is_file():
        raise UserError(
            f"{source!r} is no file or folder; packaged benchmarks are {', '.join(PACKAGED)}; "
            f"sets of the hub are {', '.join(HUB_SETS)}; another data set of the hub is written OWNER/NAME"
        )
    if path.suffix not in _FILES:
        known = ", ".join(_FILES)
        raise UserError(f"{source}: cannot read {path.suffix or 'such'} files; use one of {known}")
    try:
        if path.suffix == ".parquet":
            return on_disk(_parquet(path), needs_answer, path.name)
        if path.suffix == ".jsonl" and path.stat().st_size > LARGE:
            return _lines_on_disk(path, needs_answer)
        return collect(_READERS[path.suffix](path), needs_answer, path.name)
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read {source} ({error.strerror or error}); check the file") from error


def load_prompts(sources: Iterable[str], limit: int, needs_answer: bool = False) -> list[Row]:
    """Return at most `limit` rows of each source, with or without answers; as in `load_rows`."""
    return [row for source in sources for row in load_rows(source, needs_answer=needs_answer)[:limit]]


def _looks_like_hub_id(source: str) -> bool:
    path = Path(source)
    is_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?", source) is not None
    return is_id and path.suffix not in _FILES and not path.exists()


def _load_dataset(source: str, split: str) -> Iterable[Mapping[str, Any]]:
    folder = Path(source).expanduser()
    name, _, config = (str(folder), "", "") if folder.is_dir() else source.partition(":")
    return records(name, split, config or None)


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{path.name}, line {number}"
                yield where, _parse_json(line, where)


def _lines_on_disk(path: Path, needs_answer: bool) -> Rows:
    """The rows of a JSONL file by where their lines begin, each checked once."""
    starts = array("Q")

    def lines() -> Iterator[tuple[str, Any]]:
        with path.open("rb") as file:
            begin = 3 if file.read(3) == codecs.BOM_UTF8 else 0
            file.seek(begin)
            for number, line in enumerate(file, 1):
                if line.strip():
                    starts.append(begin)
                    where = f"{path.name}, line {number}"
                    yield where, _parse_json(line.decode(), where)
                begin += len(line)

    for _ in checked(lines(), needs_answer, path.name):
        pass

    def read(index: int) -> Row:
        with path.open("rb") as file:
            file.seek(starts[index])
            return normalize(_parse_json(file.readline().decode(), path.name), path.name)

    return Rows(read, len(starts))


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    records = _parse_json(path.read_text(encoding="utf-8-sig"), path.name)
    if not isinstance(records, list):
        found = type(records).__name__
        raise UserError(f"{path.name} must hold one list of rows, found {found}; wrap it in [...]")
    yield from numbered(records, path.name)


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"{error.msg}, character {error.pos + 1}"
        raise UserError(f"{where} is not valid JSON ({reason}); correct or remove it") from error
    except RecursionError as error:
        raise UserError(f"{where} is nested too deep for a row; correct or remove it") from error


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        try:
            for where, record in numbered(csv.DictReader(stream), path.name):
                if None in record:
                    raise UserError(f"{where} has more cells than the header; quote the text with commas")
                yield where, record
        except csv.Error as error:
            raise UserError(f"{path.name} is not valid CSV ({error}); correct or convert it") from error


def _parquet(path: Path) -> Any:
    # The packaged Parquet loader, named outright: a bare path would be taken for a data set's id.
    import datasets

    try:
        return datasets.load_dataset("parquet", data_files=str(path), split="train")
    except Exception as error:  # datasets and pyarrow each raise their own
        reason = type(error).__name__
        raise UserError(f"{path.name} cannot be read as Parquet ({reason}); write it again") from error


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
}
_FILES = (*_READERS, ".parquet")
