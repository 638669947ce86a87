"""Reading safetensors files of factors; each error is one line that says what to do."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from secvec_jax.arguments import instance
from secvec_jax.errors import UserError
from secvec_jax.model.checkpoint_files import check_safetensors
from secvec_jax.model.hub import Model
from secvec_jax.trees import first_not_finite
from secvec_jax.vectors.origin import check_origin

_FLOATS = ("F32", "BF16", "F16", "F64")
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""The first bytes of files of torch.save: a zip archive since PyTorch 1.6, a bare pickle before."""


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The metadata and the arrays of a file.

    Raises UserError if it is missing, not a safetensors file, damaged, or has numbers that are not finite floats.
    """
    tensors: dict[str, np.ndarray] = {}
    with _opened(path) as file:
        metadata = file.metadata() or {}
        kinds = {key: file.get_slice(key).get_dtype() for key in file.keys()}
        unsupported = next((key for key, kind in kinds.items() if kind not in _FLOATS), None)
        if unsupported is None:
            tensors = {key: np.asarray(file.get_tensor(key)) for key in kinds}
    if unsupported is not None:
        raise UserError(
            f"{path}: {unsupported[:80]} is of type {kinds[unsupported]}: factors must be of {', '.join(_FLOATS)}"
        )
    if wrong := next((key for key, array in tensors.items() if not np.isfinite(array).all()), None):
        raise UserError(f"{path}: {wrong[:80]} has NaN or infinite numbers: its training went wrong, train it again")
    return metadata, tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a file. Raises UserError if it is missing, not a safetensors file, or damaged."""
    with _opened(path) as file:
        return file.metadata() or {}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, whose errors are raised as UserError."""
    from safetensors import safe_open

    check_safetensors(path)
    try:
        with safe_open(path, framework="flax") as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"no vectors at {path}: check the path") from error
    except Exception as error:  # safetensors raises errors of many kinds
        raise UserError(_unreadable(path, error)) from error


def _unreadable(path: Path, error: Exception) -> str:
    start = b""
    if path.is_file():
        try:
            with path.open("rb") as file:
                start = file.read(64)
        except OSError:
            pass
    if start.startswith(_PICKLES):
        return pickled(path)
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is only a Git LFS pointer: run `git lfs pull` in its folder"
    return (
        f"{path} is truncated or corrupt ({' '.join(str(error).split())[:200]}): fetch it again, or train the vectors "
        "again"
    )


def pickled(path: Path) -> str:
    """The error message for a file of torch.save: why it is not read, and how to convert it."""
    target = path.with_suffix(".safetensors")
    return (
        f"{path} is a PyTorch pickle, which can run any code when it is opened, so it is not read: convert it with "
        'python -c "import torch; from safetensors.torch import save_file; '
        f"save_file(torch.load(open({str(path)!r}, 'rb'), map_location='cpu', weights_only=True), {str(target)!r})\""
    )


def precision_entry(vectors: Any, model: Model) -> dict[str, str]:
    """The metadata of vectors that were trained over weights in another precision than float32; where the vectors do
    not know it, it is the model's."""
    precision = model.precision if vectors.origin is None else vectors.origin.precision
    return {} if precision == "float32" else {"precision": precision}


def check_saved(vectors: Any, model: Any, kinds: tuple[type, ...]) -> None:
    """Raises UserError if `vectors` are not of one of these classes or not finite, or if `model` is not a Model or not
    the one that they were trained on."""
    names = " or ".join(kind.__name__ for kind in kinds)
    instance("vectors", vectors, kinds, f"pass {names}, as sv.train_vectors returns them")
    instance("model", model, Model, "pass the model that the vectors were made for, as sv.load returned it")
    check_origin(vectors, model)
    if (wrong := first_not_finite(vectors)) is not None:
        raise UserError(
            f"the vectors are not saved: {wrong} has NaN or infinite numbers, so their training went wrong; train "
            "again with a lower learning rate"
        )
