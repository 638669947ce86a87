"""Plain fine-tuning, and the controls that every defense is compared with.

Plain fine-tuning of the aligned model shows how much harm the user's rows do. Fine-tuning on the benign rows alone is
the best that a filter could achieve. The two other controls ask what makes security vectors work: a random adapter of
the same size, or vectors of a behavior that the rows do not show, should protect nothing (Zhou et al. 2023, arXiv
2311.02105, compare with both). A control costs as much as its defense.
"""

import dataclasses
from typing import Literal, cast

import jax

from secvec_jax.checks import NonNegativeInt, checked
from secvec_jax.defenses.base import ATTACK, Defended, Defense, DefenseInputs
from secvec_jax.defenses.finetuning import FinetuneOptions, stream_and_steps, stream_of, train_model
from secvec_jax.vectors.kinds import Vectors
from secvec_jax.vectors.lora import LoRA, LoRAVectors, random_like

OTHER_BEHAVIOR = "vectors of another behavior protect nothing: they show what security vectors add"


@checked
@dataclasses.dataclass(frozen=True)
class PlainFinetuning(Defense):
    """Plain fine-tuning of the aligned model: no defense."""

    name = "none"
    stage = "fine-tuning"
    cost = "nothing"
    source = "plain fine-tuning of the aligned model"

    def apply(self, inputs: DefenseInputs) -> Defended:
        return Defended(inputs.finetune())


@checked
@dataclasses.dataclass(frozen=True)
class NotAligned(Defense):
    """Plain fine-tuning of the model before it was aligned."""

    name = "not aligned"
    stage = "alignment"
    needs = ("base model",)
    cost = "nothing"
    source = "plain fine-tuning of the model before it was aligned"
    only_in_grids = "it is plain fine-tuning of the base model: give that model, and the defense none"

    def apply(self, inputs: DefenseInputs) -> Defended:
        return Defended(inputs.finetune(inputs.base))


@checked
@dataclasses.dataclass(frozen=True)
class BenignOnly(Defense):
    """Plain fine-tuning without the attack's rows, which only an experiment knows; the best that a filter can do."""

    name = "benign only"
    stage = "data"
    cost = "nothing"
    source = "plain fine-tuning without the attack's rows"
    only_in_grids = "it drops the attack's rows, which only an experiment knows"

    matched: Literal["passes", "steps"] = "passes"
    """whether it has as many passes over the other rows as a fine-tuning on all rows, or as many steps"""
    order: NonNegativeInt = 0
    """each number is another order of the rows, to measure how much models differ by chance"""

    def apply(self, inputs: DefenseInputs) -> Defended:
        rest = {kind: rows for kind, rows in inputs.rows.items() if kind != ATTACK}
        if not rest:
            return Defended(inputs.aligned)  # all rows are the attack's, so nothing is left to learn
        training = inputs.options["training"]
        if self.matched == "steps":
            stream = stream_of(inputs.aligned, inputs.rows, training)
            training = dataclasses.replace(training, max_steps=stream_and_steps(stream, training)[1])
        training = dataclasses.replace(training, seed=training.seed + self.order)
        return Defended(train_model(inputs.aligned, rest, **(inputs.options | FinetuneOptions(training=training))))


@checked
@dataclasses.dataclass(frozen=True)
class RandomControl(Defense):
    """Fine-tuning under a random adapter whose update is as large as the security vectors', layer by layer."""

    name = "random control"
    stage = "fine-tuning"
    needs = ("security vectors",)
    cost = "as security vectors"
    source = "a random adapter of the same size, layer by layer"
    only_in_grids = "a random adapter protects nothing: it shows what security vectors add"

    def apply(self, inputs: DefenseInputs) -> Defended:
        return Defended(inputs.finetune(vectors=random_vectors(inputs)))


@checked
@dataclasses.dataclass(frozen=True)
class IrrelevantControl(Defense):
    """Fine-tuning under security vectors of another behavior: answers in capital letters."""

    name = "irrelevant control"
    stage = "fine-tuning"
    needs = ("security vectors",)
    cost = "as security vectors"
    source = "vectors of another behavior"
    only_in_grids = OTHER_BEHAVIOR

    def apply(self, inputs: DefenseInputs) -> Defended:
        return Defended(inputs.finetune(vectors=irrelevant_vectors(inputs)))


def random_vectors(inputs: DefenseInputs, spec: LoRA = LoRA()) -> LoRAVectors | tuple[LoRAVectors, ...]:
    """A random adapter whose update is as large as that of the behavior's vectors of this shape, layer by layer; where
    the user gives several vectors, as many."""
    key = jax.random.fold_in(jax.random.key(inputs.options["training"].seed), 1)
    vectors = inputs.vectors(spec)
    if not isinstance(vectors, tuple):
        return random_like(cast(LoRAVectors, vectors), key)
    return tuple(random_like(each, jax.random.fold_in(key, number)) for number, each in enumerate(vectors))


def irrelevant_vectors(inputs: DefenseInputs, spec: LoRA = LoRA()) -> Vectors:
    """Vectors of this shape of another behavior: answers in capital letters."""
    return inputs.vectors(spec, behavior="capitals")
