"""A phase costs one gradient, that of its trained part: read from the compiled program, not from the source.

Each check is also shown to fail on a step that differentiates the frozen part as well.
"""

import dataclasses
import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from secvec_jax.model.architecture import Architecture
from secvec_jax.model.decoder import Decoder
from secvec_jax.training.objective import LEARN, Backbone, Objective, Params
from secvec_jax.training.phase import Phase
from secvec_jax.training.step import make_train_step
from secvec_jax.vectors.lora import LoRA

PHASE_1 = {"backbone": "freeze", "vectors": "train"}
PHASE_2 = {"backbone": "train", "vectors": "freeze"}
BOTH = {"backbone": "train", "vectors": "train"}  # what phase 1 would be if it were written wrongly
LINES, LENGTH = 4, 64

# Sizes such that no activation ([4, 64, ...], [256, ...], [128, 512]) has the shape of a weight.
ARCHITECTURE = Architecture("llama", 512, 96, 320, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=24)
MOVES = {"parameter", "get-tuple-element"}
ARITHMETIC = {"dot", "scatter", "add", "multiply", "subtract", "dynamic-update-slice", "custom-call", "while"}


@dataclasses.dataclass
class Program:
    """A compiled step, and what is asked of it."""

    flops: float
    temporary: int
    output: int
    opcodes: dict[tuple[int, ...], Counter]  # result shape -> how many instructions of each opcode


@functools.cache
def program(labels: tuple, layers: int = 4) -> Program:
    architecture = dataclasses.replace(ARCHITECTURE, num_layers=layers)
    params = abstract(architecture)
    phase = Phase(dict(labels))
    train_step = make_train_step(Objective(), phase.optimizer(optax.sgd(0.1, momentum=0.9), params))
    trained, frozen = phase.split(params)
    ints, floats = (jax.ShapeDtypeStruct((1, LINES, LENGTH), dtype) for dtype in (jnp.int32, jnp.float32))
    batch = dict.fromkeys(("tokens", "targets", "segments", "positions", "groups"), ints) | {"weights": floats}
    lowered = train_step.step.lower(trained, jax.eval_shape(train_step.init, trained), frozen, {LEARN: batch})
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    return Program(
        compiled.cost_analysis()["flops"],
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes,
        opcodes(compiled.as_text()),
    )


def abstract(architecture):
    vectors = LoRA(rank=2)
    return jax.eval_shape(
        lambda: Params(Backbone(Decoder(architecture, nnx.Rngs(0))), vectors.init(architecture, jax.random.key(0)))
    )


def opcodes(text: str) -> dict[tuple[int, ...], Counter]:
    found: dict[tuple[int, ...], Counter] = {}
    for match in re.finditer(r"^\s*(?:ROOT )?%?[\w.\-]+ = f32\[([\d,]+)\]\S* ([\w\-]+)\(", text, re.MULTILINE):
        found.setdefault(tuple(map(int, match[1].split(","))), Counter())[match[2]] += 1
    return found


def backbone_bytes() -> int:
    return sum(4 * leaf.size for leaf in jax.tree.leaves(abstract(ARCHITECTURE).backbone))


def matrices() -> tuple[set, set]:
    """The shapes of the weights that are stacked over layers, and of the embedding and the head."""
    decoder = abstract(ARCHITECTURE).backbone.decoder
    stacked = {leaf.shape for leaf in jax.tree.leaves(decoder.layers)}
    return stacked, {leaf.shape for leaf in jax.tree.leaves((decoder.embed, decoder.head))}


def by_flops(step: Program, full: Program) -> bool:
    # A backward pass without weight gradients is a third less: 2 + 2 products against 2 + 2 + 2.
    return step.flops <= 0.75 * full.flops


def by_shapes(step: Program, full: Program) -> bool:
    """No instruction makes an array in the shape of a weight; weights are only read."""
    stacked, single = matrices()
    only_read = all(set(step.opcodes.get(shape, ())) <= MOVES for shape in stacked)
    # The head may be copied into a branch, but nothing is computed in its shape.
    return only_read and not any(set(step.opcodes.get(shape, ())) & ARITHMETIC for shape in single)


def by_output(step: Program, full: Program) -> bool:
    return step.output < 0.1 * backbone_bytes()


def by_memory(step: Program, full: Program) -> bool:
    return full.temporary - step.temporary >= 0.5 * backbone_bytes()


CHECKS = pytest.mark.parametrize("check", [by_flops, by_shapes, by_output, by_memory])


def items(labels: dict) -> tuple:
    return tuple(labels.items())


@CHECKS
def test_phase_1_computes_no_gradient_of_the_backbone(check):
    assert check(program(items(PHASE_1)), program(items(PHASE_2)))


@CHECKS
def test_the_check_rejects_a_step_that_differentiates_both(check):
    assert not check(program(items(BOTH)), program(items(PHASE_2)))
    assert not check(program(items(PHASE_2)), program(items(PHASE_2)))


def test_phase_2_computes_no_gradient_of_the_vectors():
    shapes = {leaf.shape for leaf in jax.tree.leaves(abstract(ARCHITECTURE).vectors)}

    def computed(labels):
        return {s for s in shapes if set(program(items(labels)).opcodes.get(s, ())) & ARITHMETIC}

    assert not computed(PHASE_2)
    assert computed(PHASE_1) == computed(BOTH) == shapes
    assert program(items(PHASE_2)).flops < program(items(BOTH)).flops


@pytest.mark.release  # a property of XLA, not of ours
def test_one_layer_is_counted_whatever_the_depth():
    """XLA counts the body of a loop once; so the ratio of two programs is that of one layer and the head."""
    for labels in (PHASE_1, PHASE_2):
        shallow, deep = (program(items(labels), layers).flops for layers in (4, 8))
        assert deep == pytest.approx(shallow, rel=0.05)
