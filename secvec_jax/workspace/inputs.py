"""The content of what a verb's settings name: rows, models, adapters (see `digests.difference`)."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from secvec_jax import assets, digests
from secvec_jax.data.sources import PACKAGED, load_rows
from secvec_jax.errors import UserError
from secvec_jax.model import hub
from secvec_jax.run_folders import find_model, find_vectors

Inputs = dict[str, Any]


def inputs_of(settings: Any) -> Inputs:
    """The content of everything that a verb's settings name: rows, models, adapters."""
    found: Inputs = {}
    for field in dataclasses.fields(settings):
        read, value = _READERS.get(field.name), getattr(settings, field.name)
        if read is None:
            continue
        for name in [value] if isinstance(value, str) else value or ():
            if name and (field.name, name.strip().lower()) != ("vectors", "none"):
                found[f"--{field.name.replace('_', '-')} {name}"] = known(read, name)
    return found


def known(read: Callable[[Any], str], name: Any) -> str | None:
    """What `read` finds, or None where it cannot: whoever uses the input says why."""
    try:
        return read(name)
    except (UserError, OSError):
        return None


def of_path(path: Path) -> str:
    """The content of a file, or of a model folder."""
    return digests.of_file(path) if path.is_file() else model(str(path))


def rows(source: str) -> str:
    """The content of what `load_rows` takes: of a file its bytes, of all else its rows."""
    path = Path(source).expanduser()
    if source not in PACKAGED and path.is_file():
        return digests.of_file(path)
    if source not in PACKAGED and path.is_dir():
        return digests.of_files(path, _visible(path))
    return digests.of_values(load_rows(source, needs_answer=False))


def packaged(sources: Iterable[str]) -> Inputs:
    """The content of some packaged benchmarks."""
    return {f"the rows of {source}": known(rows, source) for source in sources}


def model(source: str) -> str:
    """The content of what `load` takes: weights, configuration, tokenizer and chat template."""
    if source in hub.EMBEDDED:
        package, member = hub.EMBEDDED[source]
        return digests.of_values([assets.ASSETS[package].sha256, member])
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        return digests.of_files(path.parent, _parts(path))
    folder = find_model(path) if path.is_dir() else hub._snapshot(source)
    files = {file for pattern in _MODEL_FILES for file in folder.glob(pattern) if file.is_file()}
    if not files:
        raise UserError(f"{folder} holds no model: give a folder with config.json")
    return digests.of_files(folder, files)


_MODEL_FILES = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "additional_chat_templates/*",
)  # fmt: skip
"""What a model folder is read for; cards, licenses and what a trainer leaves behind are not its content."""


def _parts(path: Path) -> list[Path]:
    """A GGUF file, or all of one that is split: NAME-00001-of-00003.gguf."""
    name, of, count = path.stem.rpartition("-of-")
    if of and count.isdigit() and name[-6:-5] == "-" and name[-5:].isdigit():
        return sorted(path.parent.glob(f"{name[:-5]}[0-9][0-9][0-9][0-9][0-9]-of-{count}.gguf"))
    return [path]


def adapter(source: str) -> str:
    """The content of security vectors or a PEFT adapter: a file, an adapter folder, or the run directory of one."""
    path = find_vectors(source)
    if path.is_file():
        return digests.of_file(path)
    files = [file for file in path.glob("adapter_*") if file.is_file()]
    if not files:
        raise UserError(f"{path} holds no adapter: give a file of vectors or a PEFT folder")
    return digests.of_files(path, files)


def folder(source: str) -> str:
    """The content of all files in a folder, hidden ones aside."""
    path = Path(source).expanduser()
    return digests.of_files(path, _visible(path))


def _visible(path: Path) -> list[Path]:
    files = (file for file in path.rglob("*") if file.is_file())
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]


_READERS: dict[str, Callable[[str], str]] = {
    "data": rows,
    "benign": rows,
    "eval_data": rows,
    "harmful": rows,
    "questions": rows,
    "model": model,
    "classifier": model,
    "vectors": adapter,
    "adapters": adapter,
    "include": folder,
}
"""Setting of a verb -> what it names."""
