"""The interface of a defense: its settings, its inputs and what it returns.

A defense is a frozen dataclass in the file of its method. Its fields are its settings, which check themselves (see
`secvec_jax.checks`); `apply` makes the defended model from inputs that the caller supplies:

    defended = Vaccine(rho=5).apply(inputs)
    defended.model, defended.system, defended.notes

`secvec_jax.defenses.registry` has the table of all defenses.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

from secvec_jax.defenses.finetuning import FinetuneOptions, train_model
from secvec_jax.defenses.inputs import Groups
from secvec_jax.model.hub import Model
from secvec_jax.vectors.kinds import Spec, Vectors
from secvec_jax.vectors.lora import LoRA

DefenseStage = Literal["alignment", "data", "fine-tuning", "after fine-tuning", "inference"]
"""Where a defense differs from plain fine-tuning of the aligned model."""

Need = Literal[
    "security vectors", "safe rows", "harmful rows", "benign rows", "contrast rows", "base model", "eliciting prompt"
]
"""What a defense reads in addition to the aligned model and the user's rows; see `DefenseInputs`."""

MEANING: dict[Need, str] = {
    "security vectors": "vectors of the behavior; without them, they are trained on harmful and benign rows",
    "safe rows": "rows that teach the model to be safe: refusals of harmful prompts, and as many benign prompts with "
    "the model's own answers (or right answers, where the behavior is a wrong one)",
    "harmful rows": "about 100 rows of the behavior that fine-tuning must not teach",
    "benign rows": "rows that have nothing to do with the behavior",
    "contrast rows": "rows whose prompts call for the behavior and whose replies do not show it, such as refusals",
    "base model": "the model before it was aligned; it may be the aligned model, which is then aligned further",
    "eliciting prompt": "a system prompt that asks for the behavior",
}
"""Each need in one line, for help texts."""

ATTACK = "attack"
"""The kind of rows that an experiment hid in the user's data. Only controls and measurements may look at it."""


class Defended(NamedTuple):
    """What a defense returns."""

    model: Model
    system: str | None = None
    """the system prompt that the model must be served with"""
    notes: Mapping[str, float] = MappingProxyType({})
    """measurements of the defense itself, such as how well a filter separated the rows"""


class DefenseInputs(abc.ABC):
    """The inputs of a defense. Nothing is loaded, generated or trained before a defense reads it."""

    @property
    @abc.abstractmethod
    def aligned(self) -> Model:
        """The aligned model, which is to be fine-tuned."""

    @property
    @abc.abstractmethod
    def base(self) -> Model:
        """The model before it was aligned."""

    @property
    @abc.abstractmethod
    def rows(self) -> Groups:
        """The user's rows, by kind."""

    @property
    @abc.abstractmethod
    def safe(self) -> Sequence[Any]:
        """Rows of the defender that teach the model to be safe: refusals, and answers to benign prompts."""

    @property
    @abc.abstractmethod
    def harmful(self) -> Sequence[Any]:
        """Rows of the defender that show the undesired behavior; security vectors are trained on them."""

    @property
    @abc.abstractmethod
    def benign(self) -> Sequence[Any]:
        """Rows of the defender that are unrelated to the behavior, on which security vectors change nothing."""

    @property
    @abc.abstractmethod
    def contrast(self) -> Sequence[Any]:
        """Rows whose prompts call for the behavior and whose replies do not show it."""

    @property
    @abc.abstractmethod
    def eliciting_prompt(self) -> str:
        """A system prompt that asks for the behavior."""

    @property
    @abc.abstractmethod
    def options(self) -> FinetuneOptions:
        """How the user's fine-tuning is trained; `training` is set and complete."""

    @abc.abstractmethod
    def vectors(self, spec: Spec = LoRA(), behavior: str | None = None, **phase1: Any) -> Vectors:
        """Security vectors of this kind and shape for the behavior, trained once and shared.

        behavior: the name of another behavior, known to the implementation. phase1: changes to the settings of phase 1
        (`Phase1`).
        """

    @abc.abstractmethod
    def align(self, name: str, align: Callable[..., Model], **training: Any) -> Model:
        """The base model aligned by `align(model, rows, **options)`, trained once and shared under this
        name. training: changes to the settings of alignment (`Training`)."""

    def finetune(self, model: Model | None = None, rows: Groups | None = None, **options: Any) -> Model:
        """The aligned model, or another, fine-tuned on the user's rows, or on others; see `train_model`."""
        start = self.aligned if model is None else model
        return train_model(start, self.rows if rows is None else rows, **options, **self.options)


class Defense(abc.ABC):
    """A method against undesired behavior in the user's rows; its subclasses are checked, frozen dataclasses.

    The first line of a subclass's docstring is its one-line help.
    """

    name: ClassVar[str]
    """in grid files and tables"""
    stage: ClassVar[DefenseStage]
    needs: ClassVar[tuple[Need, ...]] = ()
    """with the default settings"""
    cost: ClassVar[str]
    """in addition to plain fine-tuning"""
    source: ClassVar[str]
    """of the method"""
    only_in_grids: ClassVar[str] = ""
    """why it is useful only in experiments; empty for a defense that can be used on a user's own model and data"""

    @abc.abstractmethod
    def apply(self, inputs: DefenseInputs) -> Defended:
        """The defended model."""

    @property
    def reads(self) -> tuple[Need, ...]:
        """What it needs with these settings."""
        return self.needs

    @property
    def unusable(self) -> str:
        """Why it cannot be used on a user's own model with these settings, only in a grid; empty if it can."""
        return self.only_in_grids

    @property
    def extra_batch(self) -> float:
        """Roughly how many rows a step reads in addition to the user's, as a share of the batch size."""
        return 1.0 if "safe rows" in self.reads else 0.0

    @property
    def label(self) -> str:
        """The name, with each setting that is not the default: "vaccine rho=5"."""
        return " ".join([self.name, *changed_settings(self)])


def lora_of_rank(rank: int) -> LoRA:
    """The shape of low-rank vectors whose only setting is the rank: alpha is twice the rank, so the scale stays 2."""
    return LoRA(rank=rank, alpha=2.0 * rank)


def changed_settings(settings: Any) -> list[str]:
    """ "name=value" for each field of a dataclass whose value is not the default, in the order of the fields."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    return [f"{name}={as_yaml(value)}" for name, value in values.items() if value != defaults[name]]


def as_yaml(value: Any) -> str:
    """The value as YAML writes it; a number has as few digits as represent it exactly."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value)
