"""The kinds of vectors: what a user shapes (the spec), and the pytree that visits the decoder."""

from typing import Any, NamedTuple

from secvec_jax.vectors.lora import LoRA, LoRAVectors
from secvec_jax.vectors.prompt import SoftPrompt, SoftPromptVectors
from secvec_jax.vectors.steering import Steering, SteeringVectors

Spec = LoRA | Steering | SoftPrompt
Vectors = LoRAVectors | SteeringVectors | SoftPromptVectors
"""An adapter with `factors`, a `spec` that made it, `axes()` and `check(architecture)`."""


class Kind(NamedTuple):
    """The two classes of a kind."""

    spec: type[Any]
    vectors: type[Any]


KINDS = {
    "lora": Kind(LoRA, LoRAVectors),
    "steering": Kind(Steering, SteeringVectors),
    "prompt": Kind(SoftPrompt, SoftPromptVectors),
}
"""The name of each kind in files and settings."""


def kind_of(vectors: Vectors) -> str:
    """The name of the vectors' kind."""
    return next(name for name, kind in KINDS.items() if isinstance(vectors, kind.vectors))
