"""Save and load vectors: our own safetensors format for every kind, and PEFT's for LoRA.

Each of our files has the fingerprint of the backbone that its vectors were trained for, and is refused for another
one: vectors make a behavior present in one set of weights, and mean nothing for any other.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from secvec_jax.arguments import check_distinct, instance
from secvec_jax.arguments import path as checked_path
from secvec_jax.config import from_dict
from secvec_jax.distributed import on_main_process
from secvec_jax.errors import UserError
from secvec_jax.files import atomic_file
from secvec_jax.model.hub import Model
from secvec_jax.output_checks import check_replaceable
from secvec_jax.run_folders import find_vectors
from secvec_jax.sharding import replicate, shard
from secvec_jax.trees import fingerprint
from secvec_jax.vectors.kinds import KINDS, Vectors, kind_of
from secvec_jax.vectors.origin import check_origin, stored_origin
from secvec_jax.vectors.peft import SECURITY_VECTORS, WARNING, WEIGHTS, load_peft
from secvec_jax.vectors.tensor_file import check_saved, precision_entry, read_metadata, read_tensors

_FORMAT = "secvec_jax/1"


def save_vectors(vectors: Vectors, path: str | Path, model: Model) -> None:
    """Write one safetensors file with the vectors, their shape, and the fingerprint of the model's backbone.

    The file is marked as security vectors, and only its owner can read it: with the vectors on, the model complies with
    harmful requests. Raises UserError if the vectors are not finite, or if `path` is a folder.
    """
    from safetensors.numpy import save

    check_saved(vectors, model, tuple(kind.vectors for kind in KINDS.values()))
    check_replaceable(checked_path("path", path, "a file to write the vectors to"))
    arrays = {name: np.asarray(array) for name, array in _flat(replicate(vectors).factors).items()}
    metadata = {
        "format": _FORMAT,
        "kind": kind_of(vectors),
        "spec": json.dumps(dataclasses.asdict(vectors.spec)),
        "backbone": model.fingerprint,
        "backbone_name": model.name,
        "fingerprint": _fingerprint(vectors),
        "warning": WARNING,
        **precision_entry(vectors, model),
    }

    def write() -> None:
        with atomic_file(path, mode=0o600) as staging:
            # `save_file` writes a hidden temporary file next to it, which a killed process would leave.
            staging.write_bytes(save(arrays, metadata=metadata))

    on_main_process(write)


def load_several(paths: Sequence[str | Path], model: Model) -> tuple[Vectors, ...] | None:
    """The vectors in these files, to be active at once; None, not an empty tuple, if there are no files."""
    check_distinct(paths)
    loaded = tuple(load_vectors(path, model) for path in paths)
    check_different(loaded)
    return loaded or None


def check_different(vectors: Sequence[Any]) -> None:
    """Raise UserError if two of several vectors are the same, such as a run directory and the file in it."""
    if len(vectors) > 1 and len({fingerprint(each) for each in vectors}) < len(vectors):
        raise UserError("the same vectors are given twice, and would act twice: give each once")


def load_vectors(path: str | Path, model: Model) -> Vectors:
    """The vectors in `path`, checked against the model.

    path: one of our files of any kind, a run directory of `train.py vectors`, or a PEFT adapter folder.
    Raises UserError if the file is missing, corrupt, altered, or made for another backbone or shape.
    """
    checked_path("path", path, "a file of security vectors, a run directory or a PEFT folder")
    instance("model", model, Model, "pass the model that the vectors were made for, as sv.load returned it")
    path = find_vectors(path)
    if path.is_dir():
        return load_peft(path, model)
    metadata, arrays = read_tensors(path)
    if metadata.get("format") != _FORMAT:
        raise UserError(
            f"{path} is not a file of security vectors: give one that train.py vectors wrote, or a PEFT folder"
        )
    try:
        factors: dict[str, Any] = {}
        for key, array in arrays.items():
            *groups, name = key.split(".")
            group = functools.reduce(lambda tree, group: tree.setdefault(group, {}), groups, factors)
            group[name] = jax.device_put(array)
        kind = KINDS[metadata["kind"]]
        vectors = kind.vectors(factors, from_dict(kind.spec, json.loads(metadata["spec"])))
        intact = "backbone" in metadata and _fingerprint(vectors) == metadata["fingerprint"]
    except Exception:  # altered metadata and names raise errors of many kinds
        intact = False
    if not intact:
        raise UserError(f"{path} was altered after it was written: its fingerprint differs; train the vectors again")
    vectors.check(model.architecture)
    vectors = dataclasses.replace(shard(vectors), origin=stored_origin(metadata))
    check_origin(vectors, model, f"{path} was")
    return vectors


def trained_over(path: str | Path) -> str | None:
    """The precision of the weights that the vectors at a path were trained over, such as "nf4".

    None for an adapter that does not name its backbone. Raises UserError if it cannot be read.
    """
    origin = stored_origin(_metadata(path))
    return None if origin is None else origin.precision


def _metadata(path: str | Path) -> dict[str, str]:
    found = find_vectors(path)
    return read_metadata(found / WEIGHTS if found.is_dir() else found)


def _flat(factors: dict[str, Any], prefix: str = "") -> dict[str, jax.Array]:
    """The factors as one dict: {"projection.name": array}, or {"name": array} for kinds without projections."""
    flat: dict[str, jax.Array] = {}
    for name, part in factors.items():
        flat |= _flat(part, f"{prefix}{name}.") if isinstance(part, dict) else {prefix + name: part}
    return flat


def _fingerprint(vectors: Vectors) -> str:
    """The fingerprint of the factors and of their scale."""
    return fingerprint((vectors, np.float64(vectors.spec.scale)))


def holds_security_vectors(path: str | Path) -> bool:
    """Whether the file at a path says that it holds security vectors. Raises UserError if it cannot be read."""
    metadata = _metadata(path)
    return metadata.get("format") == _FORMAT or metadata.get("holds") == SECURITY_VECTORS
