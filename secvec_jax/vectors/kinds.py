"""The kinds of vectors. Each has a spec (the user's settings) and vectors (the adapter made from it)."""

from typing import Any, NamedTuple

from secvec_jax.vectors.lora import LoRA, LoRAVectors
from secvec_jax.vectors.prompt import SoftPrompt, SoftPromptVectors
from secvec_jax.vectors.steering import Steering, SteeringVectors

Spec = LoRA | Steering | SoftPrompt
Vectors = LoRAVectors | SteeringVectors | SoftPromptVectors
"""Adapters with `factors` (the arrays), the `spec` that they were made from, `axes()` and `check(architecture)`."""


class Kind(NamedTuple):
    """The classes of a kind's spec and of its vectors."""

    spec: type[Any]
    vectors: type[Any]


KINDS = {
    "lora": Kind(LoRA, LoRAVectors),
    "steering": Kind(Steering, SteeringVectors),
    "prompt": Kind(SoftPrompt, SoftPromptVectors),
}
"""By the kind's name in files and settings."""


def kind_of(vectors: Vectors) -> str:
    """The name of the vectors' kind."""
    return next(name for name, kind in KINDS.items() if isinstance(vectors, kind.vectors))
