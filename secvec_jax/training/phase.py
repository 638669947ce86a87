"""A phase says what is trained: a label, `train` or `freeze`, for every leaf of the parameters.

The train step differentiates and donates the trained part alone. The optimizer is `optax.multi_transform` over the same
labels, so its state exists for the trained part alone. Nothing else in the program knows which phase it is in.
"""

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import optax

from secvec_jax.trees import Tree

TRAIN, FREEZE = "train", "freeze"


@dataclasses.dataclass(frozen=True)
class Phase:
    """Labels for the parameters (see `objective.Params`): nested dicts by part, with "train" or "freeze" at the ends.

    Phase({"backbone": "freeze", "vectors": "train"})     # phase 1: security vectors
    Phase({"backbone": "train", "vectors": "freeze"})     # phase 2: fine-tuning under them
    """

    labels: Any

    def __post_init__(self) -> None:
        unknown = [label for label in jax.tree.leaves(self.labels) if label not in (TRAIN, FREEZE)]
        if unknown:
            raise ValueError(f"the label {unknown[0]!r} is unknown: use {TRAIN!r} or {FREEZE!r}")

    def expand(self, params: Tree) -> Tree:
        """The label of every leaf. Raises ValueError if a part has no label or a label matches no part."""
        return _expanded(self.labels, params)

    def split(self, params: Tree) -> tuple[Tree, Tree]:
        """(trained, frozen): the parameters twice, each with None in place of the other's leaves.

        Raises ValueError as `expand` does.
        """
        labels = self.expand(params)
        trained = jax.tree.map(lambda label, leaf: leaf if label == TRAIN else None, labels, params)
        frozen = jax.tree.map(lambda label, leaf: leaf if label == FREEZE else None, labels, params)
        return trained, frozen

    def optimizer(self, transform: optax.GradientTransformation, params: Tree) -> optax.GradientTransformation:
        """`transform` for the trained leaves, nothing for the frozen ones.

        The same object for the same transform and labels, and the same `update` for the same `update` and labels, so
        that training runs can share a step (`step.make_train_step`). Raises ValueError as `expand` does.
        """
        labels, structure = jax.tree.flatten(self.expand(params))
        return _by_label(transform, tuple(labels), structure)


def _expanded(labels: Any, params: Tree) -> Tree:
    if isinstance(labels, dict) and dataclasses.is_dataclass(params) and not isinstance(params, type):
        parts = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
        present = {name for name, part in parts.items() if part is not None}
        if not present <= labels.keys() <= parts.keys():
            raise ValueError(f"labels for {sorted(labels)}, but the parameters have {sorted(present)}")
        return dataclasses.replace(params, **{name: _expanded(labels.get(name), part) for name, part in parts.items()})
    return jax.tree.map(lambda label, part: jax.tree.map(lambda _: label, part), labels, params)


@lru_cache(maxsize=32)
def _by_label(
    transform: optax.GradientTransformation, labels: tuple[str, ...], structure: jax.tree_util.PyTreeDef
) -> optax.GradientTransformation:
    by_label = {TRAIN: transform, FREEZE: optax.set_to_zero()}
    init = optax.multi_transform(by_label, jax.tree.unflatten(structure, labels)).init
    return optax.GradientTransformation(init, _update_by_label(transform.update, labels, structure))


@lru_cache(maxsize=32)
def _update_by_label(
    update: Callable[..., tuple[Tree, Tree]],
    labels: tuple[str, ...],
    structure: jax.tree_util.PyTreeDef,
) -> Callable[..., tuple[Tree, Tree]]:
    by_label = {TRAIN: optax.GradientTransformation(_no_init, update), FREEZE: optax.set_to_zero()}
    return optax.multi_transform(by_label, jax.tree.unflatten(structure, labels)).update


def _no_init(params: Tree) -> Tree:
    raise NotImplementedError


def combine(trained: Tree, frozen: Tree) -> Tree:
    """The parameters again, from the two parts of `Phase.split`."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda leaf: leaf is None)
