"""What the fork server of `tests.processes` imports: the slow imports of our programs."""

import datasets
import grain
import jax
import orbax.checkpoint
import tensorboardX
import transformers

import eval
import train
from secvec_jax import cli
from secvec_jax.data.pipeline import Stream
from secvec_jax.training import trainer
from tests import quick_shuffle, shared_programs

for verb in (cli.TRAIN | cli.EVAL).values():
    verb.load()

__all__ = [
    "Stream",
    "cli",
    "datasets",
    "eval",
    "grain",
    "jax",
    "orbax",
    "quick_shuffle",
    "shared_programs",
    "tensorboardX",
    "train",
    "trainer",
    "transformers",
]
