"""Content digests of the rows, models and adapters that a command's settings name (see `digests.difference`)."""

import dataclasses
import glob
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from secvec_jax import assets, digests
from secvec_jax.data.columns import split_columns
from secvec_jax.data.sources import PACKAGED, load_rows
from secvec_jax.errors import UserError
from secvec_jax.files import expanded
from secvec_jax.model.embedded import EMBEDDED
from secvec_jax.model.hub_files import CONTENT_FILES, snapshot
from secvec_jax.remote import local
from secvec_jax.run_folders import find_model, find_vectors

Inputs = dict[str, Any]
"""Label, such as "--data rows.jsonl" -> content digest; None if unknown."""


def inputs_of(settings: Any) -> Inputs:
    """Return the digests of all rows, models and adapters that a command's settings name."""
    inputs: Inputs = {}
    for field in dataclasses.fields(settings):
        read, value = _READERS.get(field.name), getattr(settings, field.name)
        if read is None:
            continue
        for name in [value] if isinstance(value, str) else value or ():
            if name and (field.name, name.strip().lower()) != ("vectors", "none"):
                inputs[f"--{field.name.replace('_', '-')} {name}"] = known(read, name)
    return inputs


def check_there(named: Mapping[str, Any]) -> None:
    """Raise UserError if a model or adapter is missing, minutes before it is read. named: {setting: value}.

    Values that are not names are left to the code that uses them.
    """
    for setting, name in named.items():
        if _READERS.get(setting) in (model, adapter) and name and isinstance(name, str | os.PathLike):
            _READERS[setting](str(name))


def known(read: Callable[[Any], str], name: Any) -> str | None:
    """Return the digest from `read`, or None if it fails: the code that uses the input reports the error."""
    try:
        return read(name)
    except (UserError, OSError):
        return None


def of_path(path: Path) -> str:
    """Return the digest of a file or a model folder."""
    return digests.of_file(path) if path.is_file() else model(str(path))


def rows(source: str) -> str:
    """Return the digest of a source for `load_rows`: of a file's or folder's bytes and of the columns that follow its
    name, otherwise of the rows."""
    name, columns = split_columns(source)
    path = local(name)
    if name in PACKAGED or not (path.is_file() or path.is_dir()):
        return digests.of_values(load_rows(source, needs_answer=False))
    content = digests.of_file(path) if path.is_file() else digests.of_files(path, _visible(path))
    return digests.of_values([content, columns]) if columns else content


def packaged(sources: Iterable[str]) -> Inputs:
    """Return the digests of packaged benchmarks."""
    return {f"the rows of {source}": known(rows, source) for source in sources}


def model(source: str) -> str:
    """Return the digest of a source for `load`: weights, configuration, tokenizer and chat template.

    Raises UserError if a folder contains no model.
    """
    if source in EMBEDDED:
        embedded = EMBEDDED[source]
        parts = [value for package, member in embedded.parts for value in (assets.ASSETS[package].sha256, member)]
        parts += [embedded.chat_template] if embedded.chat_template else []
        parts += [embedded.adapter.sha256] if embedded.adapter else []
        return digests.of_values(parts)
    path = local(source)
    if path.suffix == ".gguf":
        return digests.of_files(path.parent, _parts(path))
    folder = find_model(path) if path.is_dir() else snapshot(source)
    files = {file for pattern in CONTENT_FILES for file in folder.glob(pattern) if file.is_file()}
    if not files:
        raise UserError(f"{folder} contains no model: use a folder with a config.json")
    return digests.of_files(folder, files)


def _parts(path: Path) -> list[Path]:
    """Return a GGUF file, or all parts of a split one: NAME-00001-of-00003.gguf."""
    name, of, count = path.stem.rpartition("-of-")
    if of and count.isdigit() and name[-6:-5] == "-" and name[-5:].isdigit():
        return sorted(path.parent.glob(f"{glob.escape(name[:-5])}[0-9][0-9][0-9][0-9][0-9]-of-{count}.gguf"))
    return [path]


def adapter(source: str) -> str:
    """Return the digest of security vectors or a PEFT adapter, given a file, an adapter folder or a run directory.

    Raises UserError if there is no adapter.
    """
    path = find_vectors(source)
    if path.is_file():
        return digests.of_file(path)
    files = [file for file in path.glob("adapter_*") if file.is_file()]
    if not files:
        raise UserError(f"{path} contains no adapter: use a file of vectors or a PEFT folder")
    return digests.of_files(path, files)


def folder(source: str) -> str:
    """Return the digest of all non-hidden files in a folder."""
    path = expanded(source)
    return digests.of_files(path, _visible(path))


def _visible(path: Path) -> list[Path]:
    files = (file for file in path.rglob("*") if file.is_file())
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]


_READERS: dict[str, Callable[[str], str]] = {
    "data": rows,
    "benign": rows,
    "eval_data": rows,
    "safe": rows,
    "harmful": rows,
    "contrast": rows,
    "questions": rows,
    "model": model,
    "base": model,
    "before": model,
    "after": model,
    "reference": model,
    "unaligned": model,
    "classifier": model,
    "vectors": adapter,
    "adapters": adapter,
    "include": folder,
}
"""Setting of a command -> the function that digests what the setting names."""
