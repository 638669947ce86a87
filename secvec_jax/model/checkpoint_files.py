"""The weight files of a Hugging Face folder: their tensors, read in full or in part, and writing them.

Errors say what to do about the files.
"""

import collections
import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from secvec_jax.errors import UserError
from secvec_jax.files import check_regular

_FILE_BYTES = 2**30
_JSON_BYTES = 2**26
_HEADER_BYTES = 2**25
"""Limit for a safetensors header, enough for a few hundred thousand tensors; parsing it takes up to 100 MB."""
_FLOATS = ("F32", "BF16", "F16", "F64")
REDUNDANT = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")
"""Suffixes of the names of tensors that some checkpoints have besides weights."""

DTYPES: Mapping[str, np.dtype] = {name: np.dtype(name) for name in ("float32", "bfloat16", "float16")}
"""What weights can be saved in."""

SINGLE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError if the file is missing, cannot be read, or holds anything else."""
    check_regular(path, max_bytes=_JSON_BYTES)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: --model needs a whole Hugging Face folder") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): fetch the model again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: fetch the model again")
    return value


def files_of(index: Path) -> list[str]:
    """The weights' files that an index names. Raises UserError for one that would be outside its folder."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index} has no weight_map: fetch the model again")
    for name in names.values():
        plain = isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set("\\:\0")
        if not plain or name.startswith("/") or ".." in name.split("/"):
            raise UserError(f"{index} names {str(name)[:80]!r}, which is not a .safetensors file in its folder")
    return sorted(set(names.values()))


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, of which any part can be read.

    state: of the file when the model was loaded. A model in lower precision reads its full weights much later, when
    another model may have been saved in their place: that is an error.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: str
    """as safetensors names dtypes"""
    state: tuple[int, int]

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        from safetensors import SafetensorError, safe_open

        try:
            # Opened again for each part: the pages of an open file count as this process's memory.
            with safe_open(self.file, framework="numpy") as opened:
                part: np.ndarray = opened.get_slice(self.name)[index]
            if _state(self.file) != self.state:
                raise UserError(f"{self.file} has changed since the model was loaded: load the model again")
            return part
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.file} changed while it was read ({error}): load the model again") from error


def _state(file: Path) -> tuple[int, int]:
    """The size of a file and when it was changed, which tell another version of it."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def open_safetensors(folder: Path) -> dict[str, StoredTensor]:
    """The folder's weights by name: those of model.safetensors, or, if it is missing, those that the index names.

    Raises UserError for files that are missing, damaged, or hold anything but floating-point weights.
    """
    from safetensors import safe_open

    has_single_file = (folder / SINGLE_FILE).exists() or not (folder / INDEX).exists()
    files = [SINGLE_FILE] if has_single_file else files_of(folder / INDEX)
    weights: dict[str, StoredTensor] = {}
    for file in files:
        path = folder / file
        check_safetensors(path)
        try:
            state = _state(path)
            with safe_open(path, framework="numpy") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}
                shapes = {name: tuple(stored.get_shape()) for name, stored in slices.items()}
                kinds = {name: stored.get_dtype() for name, stored in slices.items()}
        except FileNotFoundError as error:
            pickled = next(iter(sorted(folder.glob("pytorch_model*.bin"))), None)
            other = f"{pickled.name} is a pickle, convert it" if pickled else "fetch the model again"
            raise UserError(f"{path} is missing: the model's weights must be safetensors, {other}") from error
        except Exception as error:  # a damaged header raises errors of many kinds
            raise UserError(f"{path} is truncated or corrupt ({str(error)[:200]}): fetch it again") from error
        for name, kind in kinds.items():
            if kind not in _FLOATS and not name.endswith(REDUNDANT):
                raise UserError(
                    f"{path}: {name[:80]} is of type {kind}, as in quantized models: give the original model, with "
                    f"weights of {', '.join(_FLOATS)}"
                )
        weights |= {name: StoredTensor(path, name, shape, kinds[name], state) for name, shape in shapes.items()}
    return weights


def check_safetensors(path: Path) -> None:
    """Raise UserError if a safetensors file is not a regular file, or says that its header has an absurd size.

    All else is checked by the parser, whose memory grows with the header. A file that is missing passes.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): check its permissions") from error
    if _HEADER_BYTES < size <= path.stat().st_size:
        raise UserError(f"{path} has a header of {size:,} bytes, and no model has more than {_HEADER_BYTES:,}")


def stored_dtype(weights: Mapping[str, StoredTensor]) -> str:
    """The dtype of most of the weights, a key of `DTYPES`."""
    sizes: collections.Counter[str] = collections.Counter()
    for weight in weights.values():
        sizes[weight.kind] += math.prod(weight.shape)
    return {"BF16": "bfloat16", "F16": "float16"}.get(max(sizes, key=sizes.__getitem__, default="F32"), "float32")


def write_weights(sizes: dict[str, int], weights: Iterable[tuple[str, np.ndarray]], folder: Path) -> None:
    """Files of at most 1 GiB with an index, as transformers writes them; a single file needs no index."""
    from safetensors.numpy import save_file

    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if filled and filled + size > _FILE_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    files = ["model.safetensors"]
    if len(groups) > 1:
        files = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
        weight_map = {name: file for file, group in zip(files, groups) for name in group}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    weights = iter(weights)
    for file, group in zip(files, groups):
        save_file(dict(itertools.islice(weights, len(group))), folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # save_file makes it readable by its owner only
