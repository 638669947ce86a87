"""A phase trains what it labels, and nothing else exists for the optimizer."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secvec_jax.config import Training
from secvec_jax.data.pipeline import Stream
from secvec_jax.training import step
from secvec_jax.training.objective import LEARN, Backbone, Objective, Params
from secvec_jax.training.optimizers import make_optimizer
from secvec_jax.training.phase import Phase, combine
from secvec_jax.training.step import make_train_step
from secvec_jax.trees import num_parameters
from secvec_jax.vectors.lora import LoRA
from tests.toys import ARCHITECTURE, random_decoder, random_examples

PHASES = {
    "phase 1": Phase({"backbone": "freeze", "vectors": "train"}),
    "phase 2": Phase({"backbone": "train", "vectors": "freeze"}),
    "task LoRA": Phase({"backbone": {"decoder": "freeze", "adapter": "train"}, "vectors": "freeze"}),
}
MOVES = {"phase 1": ["vectors"], "phase 2": ["decoder", "adapter"], "task LoRA": ["adapter"]}

labels = st.sampled_from(["train", "freeze"])


@pytest.fixture(scope="module")
def params():
    def adapter(seed):
        fresh = LoRA(rank=2).init(ARCHITECTURE, jax.random.key(seed))
        return jax.tree.map(lambda leaf: leaf + 0.05, fresh)  # or B = 0 would hide A's gradient

    return Params(Backbone(random_decoder(), adapter(1)), adapter(2))


@pytest.fixture(scope="module")
def batch():
    first = next(iter(Stream({"all": random_examples(8)}, batch_size=2, seq_len=40).batches()))
    return {LEARN: jax.tree.map(lambda x: x[None], first)}


def parts(params):
    return {**vars(params.backbone), "vectors": params.vectors}


@settings(max_examples=40)
@given(st.fixed_dictionaries({"a": labels, "b": labels | st.fixed_dictionaries({"x": labels, "y": labels})}))
def test_the_two_parts_of_a_split_make_the_whole(tree_labels):
    params = {"a": {"p": jnp.ones(2), "q": None}, "b": {"x": jnp.zeros(3), "y": [jnp.ones(1), jnp.zeros(1)]}}
    phase = Phase(tree_labels)
    trained, frozen = phase.split(params)
    chex.assert_trees_all_equal(combine(trained, frozen), params)
    wanted = jax.tree.leaves(phase.expand(params)).count("train")
    assert len(jax.tree.leaves(trained)) == wanted
    assert len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(params)) - wanted


@pytest.mark.parametrize("name", PHASES)
def test_a_split_parts_every_leaf_once(params, name):
    trained, frozen = PHASES[name].split(params)
    chex.assert_trees_all_equal(combine(trained, frozen), params)
    assert num_parameters(trained) == sum(num_parameters(parts(params)[part]) for part in MOVES[name])
    assert num_parameters(trained) + num_parameters(frozen) == num_parameters(params)


def test_absent_parts_are_allowed_and_labels_must_be_a_prefix(params):
    without = Params(Backbone(params.backbone.decoder))
    for phase in PHASES.values():
        chex.assert_trees_all_equal(combine(*phase.split(without)), without)
    with pytest.raises(ValueError):
        Phase({"backbone": "train"}).split(params)
    with pytest.raises(ValueError):
        Phase({"backbone": "train", "vectors": "freeze", "more": "train"}).split(params)
    with pytest.raises(ValueError, match="the label 'frozen' is unknown: use 'train' or 'freeze'"):
        Phase({"backbone": {"decoder": "frozen", "adapter": "train"}, "vectors": "freeze"})
    anchored = Params(params.backbone, params.vectors, anchor=params.backbone.decoder)
    with pytest.raises(ValueError, match="anchor"):
        PHASES["phase 2"].split(anchored)
    held = Phase({"backbone": "train", "vectors": "freeze", "anchor": "freeze"})
    chex.assert_trees_all_equal(held.split(anchored)[1].anchor, anchored.anchor)


@pytest.mark.parametrize("name", PHASES)
def test_a_step_changes_every_leaf_of_what_moves_and_no_bit_of_the_rest(params, batch, name):
    phase = PHASES[name]
    train_step = make_train_step(Objective(), phase.optimizer(optax.sgd(0.1), params))
    # The step donates what it trains; the parameters are the module's.
    trained, frozen = phase.split(jax.tree.map(jnp.copy, params))
    moved, _, metrics = train_step.step(trained, train_step.init(trained), frozen, batch)
    after = combine(moved, frozen)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, params)
    changed = jax.tree.map(lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), params, after)
    mask = jax.tree.map(lambda label: label == "train", phase.expand(params))
    chex.assert_trees_all_equal(changed, mask)
    assert metrics["grad_norm"] > 0


@pytest.mark.parametrize(
    "change",
    [{"optimizer": "sgd"}, {"learning_rate": 2e-3}, {"schedule": "linear"}, {"warmup_steps": 2},
     {"weight_decay": 0.1}, {"max_grad_norm": 2.0}, {"optimizer": "sgd", "momentum": 0.5}, {"steps": 11}],
    ids=str,
)  # fmt: skip
def test_only_trainings_of_equal_settings_share_a_step(params, change):
    def step_of(steps: int = 10, phase: str = "phase 2", objective: Objective = Objective(), **settings: Any):
        training = Training(**{"learning_rate": 1e-3, "optimizer": "adamw", "max_grad_norm": 1.0} | settings)
        return make_train_step(objective, PHASES[phase].optimizer(make_optimizer(training, steps), params))

    assert step_of() is step_of()
    assert step_of(**change) is not step_of() and step_of(**change) is step_of(**change)
    others = [step_of(phase=name) for name in PHASES] + [step_of(objective=Objective(kl_weight=0.5))]
    assert len(set(map(id, others))) == len(others)


def test_steps_for_other_devices_are_steps_of_their_own(params, monkeypatch):
    """A planner compiles one training for several kinds in one process, each with its own compiler options."""
    optimizer = PHASES["phase 2"].optimizer(optax.sgd(0.1), params)
    here = make_train_step(Objective(), optimizer)
    monkeypatch.setattr(step, "device_kind", lambda: "TPU v5 lite")
    assert make_train_step(Objective(), optimizer) is not here


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", PHASES)
def test_the_optimizer_remembers_only_what_it_trains(params, name, optimizer):
    phase = PHASES[name]
    transform = make_optimizer(Training(optimizer=optimizer, max_grad_norm=1.0), 10)
    trained, _ = phase.split(params)
    state = jax.eval_shape(phase.optimizer(transform, params).init, trained)
    counters = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == ()]
    moments = {"sgd": 1, "adamw": 2}[optimizer]
    assert num_parameters(state) - len(counters) == moments * num_parameters(trained)
    assert len(jax.tree.leaves(state)) - len(counters) == moments * len(jax.tree.leaves(trained))


@settings(max_examples=30)
@given(
    steps=st.integers(1, 40),
    warmup=st.integers(0, 50),
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
    optimizer=st.sampled_from(["sgd", "adamw"]),
)
def test_every_step_moves_and_none_further_than_the_peak(steps, warmup, schedule, optimizer):
    settings = Training(optimizer=optimizer, schedule=schedule, warmup_steps=warmup, learning_rate=0.5, momentum=0.0)
    transform = make_optimizer(settings, steps)
    x = jnp.zeros(())
    state = transform.init(x)
    for _ in range(steps):
        update, state = transform.update(jnp.ones(()), state, x)
        assert 0 < -float(update) <= 0.5 + 1e-6
