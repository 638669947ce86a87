"""Which model vectors were trained on: their values know it as their files do, and are refused for another model.

Vectors make a behavior present in one set of weights, and mean nothing for any other, even one of the same shapes. The
origin is a field of the value and no part of its pytree: no compiled program depends on it, and vectors that a caller
computes from others (`jax.tree.map`) have none. Vectors without an origin are checked by their shapes alone.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax

from secvec_jax.errors import UserError
from secvec_jax.model.hub import Model

Adapter = TypeVar("Adapter")


register_vectors = functools.partial(
    jax.tree_util.register_dataclass, data_fields=("factors",), meta_fields=("spec",), drop_fields=("origin",)
)
"""Decorates a class of vectors: a pytree of its factors, with the static spec and without the origin."""


class Origin(NamedTuple):
    """The model: the fingerprint of its backbone, its name, and the precision of its weights in that training."""

    backbone: str
    name: str
    precision: str


def origin_of(model: Model) -> Origin | None:
    """The origin of vectors that are trained on this model; None if its fingerprint is not known. All processes must
    call this."""
    try:
        return Origin(model.fingerprint, model.name, model.precision)
    except UserError:  # quantized weights whose files are not known
        return None


def stored_origin(metadata: Mapping[str, str]) -> Origin | None:
    """The origin in a file's metadata; None if it names no backbone, as those of PEFT do not."""
    if "backbone" not in metadata:
        return None
    name = metadata.get("backbone_name", "another model")
    return Origin(metadata["backbone"], name, metadata.get("precision", "float32"))


def with_origin(vectors: Adapter, model: Model) -> Adapter:
    """The vectors, with this model as their origin. Without that field, as an adapter of a caller's own, unchanged."""
    return dataclasses.replace(vectors, origin=origin_of(model)) if hasattr(vectors, "origin") else vectors  # type: ignore[type-var]


def check_origin(vectors: Any, model: Model, what: str = "these vectors were") -> None:
    """Raise UserError if the vectors were trained on another model. All processes must call this."""
    origin = getattr(vectors, "origin", None)
    if origin is not None and origin.backbone != model.fingerprint:
        raise UserError(
            f"{what} made for another backbone ({origin.name}, {origin.backbone[:12]}), not for {model.name} "
            f"({model.fingerprint[:12]}): train vectors on this model, or name the model they were made for"
        )
