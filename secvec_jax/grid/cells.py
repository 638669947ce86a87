"""The cells of a grid: which defense meets which attack, and how the model is fine-tuned."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, Literal

from secvec_jax.checks import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Seed, checked
from secvec_jax.defenses.base import Defense
from secvec_jax.defenses.registry import read_defense
from secvec_jax.errors import UserError
from secvec_jax.evaluation.tables import show
from secvec_jax.grid.attacks import check_attack
from secvec_jax.grid.tasks import check_task
from secvec_jax.workspace.stages import file_name

Optimizer = Literal["sgd", "adamw"]


@checked
@dataclasses.dataclass(frozen=True)
class Cell:
    """One fine-tuning: the defense, the attack, and how the model is trained."""

    defense: Defense
    attack: str = "harmful"
    """a name of `attacks.ATTACKS`, or a file or hub id of rows"""
    task: str = "profiles"
    """a name of `tasks.TASKS` or `tasks.HUB_TASKS`: what the other rows teach"""
    poison: Fraction = 0.1
    """the share of rows that are the attack's; 1: no task"""
    samples: PositiveInt = 100
    """rows in an epoch; an attack that has fewer repeats them"""
    learning_rate: PositiveFloat = 3.6e-4
    optimizer: Optimizer = "sgd"
    epochs: PositiveInt = 2
    lora_rank: NonNegativeInt = 0
    """the rank of a task LoRA, with alpha twice the rank; 0: all weights are trained"""
    seed: Seed = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What a record and a table show: every setting by name, the defense by its label."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {"defense": self.defense.label}

    @property
    def name(self) -> str:
        """The name of its files, made of all settings."""
        return cell_name(self.settings)


def cell_name(settings: dict[str, Any]) -> str:
    """The name of the cell with these settings (`Cell.settings`)."""
    return file_name("_".join(map(show, settings.values())))


@checked
@dataclasses.dataclass(frozen=True)
class Block:
    """Lists of settings, whose product is a block of cells."""

    table: str = ""
    """the table of the report that the cells are for"""
    defense: tuple[str | dict[str, Any], ...] = ("none",)
    """each a name, or a mapping of name and settings: {name: vaccine, rho: 5}"""
    attack: tuple[str, ...] = ("harmful",)
    task: tuple[str, ...] = ("profiles",)
    poison: tuple[Fraction, ...] = (0.1,)
    samples: tuple[PositiveInt, ...] = (100,)
    learning_rate: tuple[PositiveFloat, ...] = (3.6e-4,)
    optimizer: tuple[Optimizer, ...] = ("sgd",)
    epochs: tuple[PositiveInt, ...] = (2,)
    lora_rank: tuple[NonNegativeInt, ...] = (0,)
    seed: tuple[Seed, ...] = (0,)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(Cell):
            if not getattr(self, field.name):
                raise UserError(f"a block of table {self.table!r} has no {field.name}: list at least one")
        for value in self.defense:
            read_defense(value)
        for attack in self.attack:
            check_attack(attack)
        for task in self.task:
            check_task(task)

    def cells(self) -> Iterator[Cell]:
        """The product, with the seed varying slowest and the defense fastest."""
        lists = {field.name: getattr(self, field.name) for field in dataclasses.fields(Cell)}
        lists["defense"] = [read_defense(value) for value in self.defense]
        slowest_first = list(reversed(lists))
        for values in itertools.product(*(lists[name] for name in slowest_first)):
            yield Cell(**dict(zip(slowest_first, values)))
