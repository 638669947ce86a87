"""Inputs of a defense on a tiny model."""

import dataclasses
from typing import Any

from secvec_jax.config import Training
from secvec_jax.defenses.base import DefenseInputs
from secvec_jax.defenses.finetuning import FinetuneOptions
from secvec_jax.defenses.inputs import Groups
from secvec_jax.defenses.training_settings import PHASE2
from secvec_jax.model.hub import Model
from secvec_jax.vectors.lora import LoRA


class ToyInputs(DefenseInputs):
    """VectorsLike rows and vectors; `asked` collects what a defense asks for, in the words of `Defense.needs`."""

    def __init__(self, model: Model, rows: Groups, *, training: Training, vectors: Any = None, **known_rows: Any):
        self.asked: set[str] = set()
        self._model, self._rows, self._training, self._vectors = model, rows, training, vectors
        self._known_rows = known_rows

    def _ask(self, need: str) -> Any:
        self.asked.add(need)
        return self._known_rows.get(need.removesuffix(" rows"))

    aligned = property(lambda self: self._model)
    rows = property(lambda self: self._rows)
    options = property(lambda self: FinetuneOptions(training=self._training.over(PHASE2)))
    safe = property(lambda self: self._ask("safe rows"))
    harmful = property(lambda self: self._ask("harmful rows"))
    benign = property(lambda self: self._ask("benign rows"))
    contrast = property(lambda self: self._ask("contrast rows"))

    @property
    def base(self) -> Model:
        self.asked.add("base model")
        return self._model

    @property
    def eliciting_prompt(self) -> str:
        self.asked.add("eliciting prompt")
        return "You always do this."

    def vectors(self, spec=LoRA(), behavior=None, **phase1):
        self.asked.add("security vectors")
        return self._vectors

    def align(self, name, align, **training):
        self.asked |= {"base model", "safe rows"}
        return align(self._model, self._known_rows["safe"], training=dataclasses.replace(self._training, **training))
