"""What the fork server of `tests.processes` imports: the slow imports of our programs.

The classes of transformers are named one by one: it imports a class, and torch with it, when the name is first used.
"""

import signal

import datasets
import grain
import jax
import orbax.checkpoint
import tensorboardX
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import eval
import train
from secvec_jax import cli
from secvec_jax.data.pipeline import Stream
from secvec_jax.evaluation import card, plots
from secvec_jax.training import trainer
from tests import quick_libraries, quick_shuffle, shared_programs

signal.signal(signal.SIGINT, signal.default_int_handler)  # see tests/conftest.py

for verb in (cli.TRAIN | cli.EVAL).values():
    verb.load()

__all__ = [
    "AutoConfig",
    "AutoTokenizer",
    "GenerationConfig",
    "PreTrainedTokenizerFast",
    "Stream",
    "card",
    "cli",
    "datasets",
    "eval",
    "grain",
    "jax",
    "orbax",
    "plots",
    "quick_libraries",
    "quick_shuffle",
    "shared_programs",
    "tensorboardX",
    "torch",
    "train",
    "trainer",
]
