"""The state of a training run: everything that a resumed run needs."""

import dataclasses

from secvec_jax.data.pipeline import Batches
from secvec_jax.training.validation import EarlyStopping
from secvec_jax.trees import Tree


@dataclasses.dataclass
class TrainingState:
    """What `fit` changes step by step, and what checkpoints hold."""

    trained: Tree
    opt_state: Tree
    batches: dict[str, Batches]
    """the position in each stream of rows"""
    step: int = 0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    """the last value of each, when the state was saved"""
    stops_after_next_step: bool = False
    """`until` held"""
    finished: bool = False
    """the last step was taken, or validation ended the run"""
    stopping: EarlyStopping = dataclasses.field(default_factory=EarlyStopping)
