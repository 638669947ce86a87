"""What a mesh may not change, read from runs; and properties of its programs, read from what XLA compiled."""

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from secvec_jax.config import Training
from secvec_jax.data.pipeline import Stream
from secvec_jax.defenses.min_min import min_min
from secvec_jax.defenses.security_vectors import Phase1
from secvec_jax.inference import generate
from secvec_jax.model.architecture import Architecture
from secvec_jax.model.hub import Model
from secvec_jax.sharding import constrain, logical_axes, make_mesh, named_sharding, parse_mesh, shard
from secvec_jax.training.objective import LEARN, Backbone, Objective, Params
from secvec_jax.training.optimizers import make_optimizer
from secvec_jax.training.phase import Phase
from secvec_jax.training.step import TrainStep, make_train_step
from secvec_jax.training.trainer import fit
from secvec_jax.vectors.lora import LoRA, random_like
from tests.processes import cluster, outputs
from tests.sharded_run import PROMPTS, STEPS, everything
from tests.toys import random_decoder, random_examples, tiny_model

MESHES = ["fsdp=8", "data=2,fsdp=2,tensor=2"]
OTHERS = ["fsdp=4,tensor=2", "slice=2,fsdp=2,tensor=2"]


# Numbers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_one_device() -> dict[str, Any]:
    return everything()


def check(told: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same losses, rates, scores and replies; prints the largest relative difference."""
    assert told.keys() == expected.keys()
    largest = 0.0
    for name, values in expected.items():
        if name.startswith("replies") or name.split()[-1] in ("refusal", "compliance", "unclear", "exact_match"):
            assert told[name] == values, name
        else:
            np.testing.assert_allclose(told[name], values, rtol=1e-5, err_msg=name)
            largest = max(largest, *np.abs(np.divide(told[name], values) - 1))
    print(f"largest relative difference: {largest:.1e}")


@pytest.mark.slow
def test_the_run_tells_enough_to_compare(on_one_device):
    for part in ("kl", "min-min", "finetune"):
        losses = on_one_device[f"losses of {part}"]
        assert len(losses) == STEPS and losses[-1] < 0.99 * losses[0]  # a thousand times the tolerance
    assert len(on_one_device["losses of task"]) == 3
    assert len(set(on_one_device["replies"])) > 2
    assert on_one_device["replies"] != on_one_device["replies with vectors"]
    for rate in ("refusal", "exact_match"):
        assert 0 < np.mean(on_one_device[f"tuned {rate}"]) < 1
    assert on_one_device["tuned harmful_loss"] != on_one_device["task harmful_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [MESHES[1], *(pytest.param(shape, marks=pytest.mark.release) for shape in OTHERS)])
def test_eight_devices_compute_what_one_does(on_one_device, shape):
    with jax.set_mesh(make_mesh(**parse_mesh(shape))):
        check(everything(), on_one_device)


@pytest.mark.release  # by default, two processes have the losses of one in tests/training/test_cluster.py
@pytest.mark.parametrize(("shape", "devices"), [("fsdp=2", 1)])
def test_two_processes_compute_what_one_does(on_one_device, tmp_path, shape, devices):
    out = tmp_path / "told.json"
    with cluster("-m", "tests.sharded_run", out, shape, "--devices", devices) as running:
        for process, (_, err) in zip(running, outputs(running, 400), strict=True):
            assert process.returncode == 0, err
    check(json.loads(out.read_text()), on_one_device)


@pytest.mark.parametrize("shape", [MESHES[1], pytest.param(MESHES[0], marks=pytest.mark.release)])
def test_replies_on_a_mesh_are_those_on_one_device(shape):
    """Five prompts, which no mesh divides, and vectors with an effect."""
    model = tiny_model()
    vectors = random_like(fresh_vectors(model.architecture), jax.random.key(3))
    expected = {on: generate(model, PROMPTS, vectors if on else None, max_new_tokens=8) for on in (False, True)}
    assert expected[False] != expected[True]
    with jax.set_mesh(make_mesh(**parse_mesh(shape))):
        spread = Model(shard(model.backbone), model.tokenizer, "tiny")
        for on, replies in expected.items():
            assert generate(spread, PROMPTS, shard(vectors) if on else None, max_new_tokens=8) == replies
        assert generate(spread, PROMPTS, max_new_tokens=8, batch_size=2) == expected[False]


def fresh_vectors(architecture: Architecture):
    """Vectors whose B is not zero."""
    vectors = LoRA(rank=4).init(architecture, jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf + 0.05, vectors)


# Compilations -------------------------------------------------------------------------------------


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The programs that are compiled inside."""
    names: list[str] = []

    def note(event: str, seconds: float, **about: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(about.get("fun_name", "?")))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


class Setting(NamedTuple):
    """A phase on the ambient mesh, as the verbs set it up."""

    params: Any
    phase: Phase
    train_step: TrainStep
    streams: dict[str, Stream]


def setting(name: str, architecture: Architecture | None = None, optimizer: Any = None) -> Setting:
    decoder = tiny_model().backbone if architecture is None else random_decoder(architecture=architecture)
    params = shard(Params(Backbone(decoder), fresh_vectors(decoder.architecture)))
    streams = {LEARN: Stream({"harmful": random_examples(40)}, 8, 48, epochs=None)}
    loss = Objective(("harmful",))
    optimizer = optimizer or make_optimizer(Training("adamw"), STEPS)
    if name == "min-min":
        phase, train_step = min_min(params, loss, optimizer, Phase1("min_min", inner_steps=1))
    else:
        moves = {"phase 1": ("freeze", "train"), "phase 2": ("train", "freeze")}[name]
        phase = Phase(dict(zip(("backbone", "vectors"), moves, strict=True)))
        train_step = make_train_step(loss, phase.optimizer(optimizer, params))
    return Setting(params, phase, train_step, streams)


def compiled_after(name: str, first: int, change: Callable[[Any], Any] = lambda trained: trained) -> list[str]:
    """The programs that a training of four steps compiles after the `first` of them were begun.

    change: what happens to the trained part between two steps.
    """
    fresh = optax.chain(make_optimizer(Training("adamw"), STEPS))  # or the step would be that of an earlier test
    params, phase, train_step, streams = setting(name, optimizer=fresh)
    since: list[int] = []

    def step(trained, state, frozen, batch):
        trained, *others = train_step.step(change(trained), state, frozen, batch)
        since.append(len(names))
        return trained, *others

    with compilations() as names:
        fit(params, phase, TrainStep(train_step.init, step), streams, steps=4)
    assert len(since) == 4 and since[0] > 0, "nothing was heard of any compilation"
    return names[since[first - 1] :]


@pytest.mark.parametrize(
    ("name", "first", "shape"),
    [
        ("phase 2", 1, MESHES[1]),
        ("min-min", 2, MESHES[1]),
        pytest.param("phase 1", 1, MESHES[1], marks=pytest.mark.release),
        pytest.param("phase 2", 1, MESHES[0], marks=pytest.mark.release),
    ],
)
def test_nothing_is_compiled_after_the_first_step(name, first, shape):
    """Of the min-min form the first two steps are programs of their own: the copy's and the vectors'."""
    with jax.set_mesh(make_mesh(**parse_mesh(shape))):
        assert compiled_after(name, first) == []


@pytest.mark.release  # a test of the test above
def test_a_second_compilation_would_be_heard():
    calls = []

    def whole_from_the_second_step_on(trained):
        calls.append(None)
        return trained if len(calls) < 2 else jax.device_put(trained, named_sharding())

    with jax.set_mesh(make_mesh(**parse_mesh(MESHES[1]))):
        assert any("step" in name for name in compiled_after("phase 2", 1, whole_from_the_second_step_on))


# Programs -----------------------------------------------------------------------------------------

# Sizes such that no activation has the shape of a weight.
LARGER = Architecture("llama", 512, 96, 320, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=24)


@functools.cache
def compiled(name: str, shape: str, donate: bool = True) -> tuple[Any, Any, Any]:
    """(the compiled step, the trained part and the state that it takes) on a mesh."""
    with jax.set_mesh(make_mesh(**parse_mesh(shape))):
        params, phase, train_step, streams = setting(name, LARGER)
        trained, frozen = phase.split(params)
        state = train_step.init(trained)
        batch = {stream: own.local_batches().take(1) for stream, own in streams.items()}
        step = train_step.step if donate else jax.jit(train_step.step.__wrapped__)
        return step.lower(trained, state, frozen, batch).compile(), trained, state


def bytes_per_device(tree: Any) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def aliases(program: Any) -> set[int]:
    """The numbers of the arguments whose memory the outputs take over."""
    header = program.as_text().splitlines()[0]
    found = re.search(r"input_output_alias=\{(.*?)\}, entry", header)
    return set() if found is None else {int(number) for number in re.findall(r": \((\d+), \{\}", found[1])}


@pytest.mark.parametrize("shape", [MESHES[0], pytest.param(MESHES[1], marks=pytest.mark.release)])
@pytest.mark.parametrize("name", ["phase 1", pytest.param("phase 2", marks=pytest.mark.release)])
def test_every_trained_and_state_buffer_is_given_to_the_step(name, shape):
    program, trained, state = compiled(name, shape)
    count = len(jax.tree.leaves((trained, state)))
    assert aliases(program) == set(range(count))
    assert program.memory_analysis().alias_size_in_bytes == bytes_per_device((trained, state))


@pytest.mark.release  # a test of the test above
def test_a_step_that_takes_no_buffers_is_distinguished():
    program, *_ = compiled("phase 1", "fsdp=8", donate=False)
    assert not aliases(program) and program.memory_analysis().alias_size_in_bytes == 0


def last_gradient() -> optax.GradientTransformation:
    """Its state is the gradient as the optimizer gets it; nothing moves."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda gradients, state, params=None: (jax.tree.map(jnp.zeros_like, gradients), gradients),
    )


@pytest.mark.parametrize("shape", [MESHES[1], pytest.param(MESHES[0], marks=pytest.mark.release)])
@pytest.mark.parametrize("name", ["phase 1", "phase 2"])
def test_gradients_are_sharded_as_their_parameters(name, shape):
    with jax.set_mesh(make_mesh(**parse_mesh(shape))):
        params, phase, train_step, streams = setting(name, optimizer=last_gradient())
        trained, frozen = phase.split(params)
        batch = {stream: own.local_batches().take(1) for stream, own in streams.items()}
        places = [leaf.sharding for leaf in jax.tree.leaves(trained)]
        _, state, _ = train_step.step(trained, train_step.init(trained), frozen, batch)
        gradients = jax.tree.leaves(state)
        assert len(gradients) == len(places) and all(np.any(gradient) for gradient in gradients)
        for gradient, place in zip(gradients, places, strict=True):
            assert gradient.sharding == place
        assert any(not place.is_fully_replicated for place in places) or (name, shape) == ("phase 1", "fsdp=8")


@pytest.mark.parametrize("shape", [MESHES[0], pytest.param(MESHES[1], marks=pytest.mark.release)])
def test_phase_1_costs_one_gradient_on_a_mesh_too(shape):
    first, second = (compiled(name, shape)[0].cost_analysis()["flops"] for name in ("phase 1", "phase 2"))
    assert 0.3 * second < first <= 0.75 * second


# FSDP ---------------------------------------------------------------------------------------------


def gathered(program: Any) -> set[tuple[int, ...]]:
    """The shapes of all arrays that all-gathers make."""
    found = re.findall(r"= \(?(.*?)\)? all-gather(?:-start)?\(", program.as_text())
    return {tuple(map(int, dims.split(","))) for result in found for dims in re.findall(r"\w+\[([\d,]+)\]", result)}


def test_fsdp_gathers_one_layer_at_a_time():
    program, trained, _ = compiled("phase 2", "fsdp=8")
    shapes = gathered(program)
    stacked = [leaf.shape for leaf in jax.tree.leaves(trained.backbone.decoder.layers)]
    kernels = [shape for shape in stacked if len(shape) == 3]
    assert len(kernels) == 7 and not shapes & set(stacked)
    for layers, *kernel in kernels:
        assert any(shape in shapes for shape in [tuple(kernel), (1, *kernel), tuple(kernel[::-1])]), kernel
        assert layers == 4


def test_a_stacked_weight_that_is_gathered_whole_is_seen():
    with jax.set_mesh(make_mesh(fsdp=8)):
        kernel = setting("phase 2", LARGER).params.backbone.decoder.layers.attention.q_proj.kernel[...]
        whole = jax.jit(lambda x: constrain(x, "layers", "hidden", "heads") * 2)
        assert gathered(whole.lower(kernel).compile()) == {kernel.shape}


def test_fsdp_holds_an_eighth_of_everything_that_is_spread():
    program, trained, state = compiled("phase 2", "fsdp=8")
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves((trained, state)))
    share = program.memory_analysis().argument_size_in_bytes / whole
    assert 1 / 8 <= share < 0.15
    for leaf, axes in zip(jax.tree.leaves((trained, state)), logical_axes((trained, state)), strict=True):
        if "embed" in axes:
            assert leaf.addressable_shards[0].data.size * 8 == leaf.size
