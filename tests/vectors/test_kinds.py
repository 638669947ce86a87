"""Every kind of vectors: off is off, on is the formula, files, phase 1, several at once."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import secvec_jax as sv
from secvec_jax.config import Training
from secvec_jax.data.chat import prompt_tokens
from secvec_jax.defenses.advice import Advice
from secvec_jax.defenses.identity import content_of
from secvec_jax.defenses.security_vectors import Phase1, finetune, train_vectors
from secvec_jax.errors import UserError
from secvec_jax.evaluation.likelihood import mean_losses
from secvec_jax.evaluation.suite import Suite, outcomes
from secvec_jax.inference import generate
from secvec_jax.model import hub
from secvec_jax.model.decoder import ForwardOptions
from secvec_jax.sharding import make_mesh
from secvec_jax.training.loss import token_cross_entropy
from secvec_jax.trees import fingerprint
from secvec_jax.vectors.kinds import KINDS, kind_of
from secvec_jax.vectors.lora import LoRA
from secvec_jax.vectors.origin import Origin
from secvec_jax.vectors.prompt import SoftPrompt
from secvec_jax.vectors.steering import Steering
from secvec_jax.vectors.store import load_vectors, save_vectors
from tests.toys import random_decoder, random_examples
from tests.toys import tiny_model as toy_model

ONE_STEP = Training(max_steps=1, batch_size=1, max_seq_len=64)
"""One for all tests, which share its programs."""

SPECS = {"lora": LoRA(rank=3), "steering": Steering(scale=2.0), "prompt": SoftPrompt(virtual_tokens=5, scale=2.0)}


def filled(spec, model, seed=0):
    """Vectors of random numbers, so that they matter."""
    vectors = spec.init(model.architecture, jax.random.key(seed))
    leaves, structure = jax.tree.flatten(vectors)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return structure.unflatten([0.5 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)])


@pytest.mark.parametrize("kind", SPECS)
def test_the_table_of_kinds_is_whole(tiny_model, kind):
    model = tiny_model("llama").model
    vectors = SPECS[kind].init(model.architecture, jax.random.key(0))
    assert kind_of(vectors) == kind and isinstance(SPECS[kind], KINDS[kind].spec)
    assert jax.tree.structure(vectors.axes(), is_leaf=lambda axes: type(axes) is tuple) == jax.tree.structure(vectors)
    vectors.check(model.architecture)
    with pytest.raises(UserError, match="wrong backbone"):
        vectors.check(dataclasses.replace(model.architecture, num_layers=3))


def test_a_direction_is_added_after_its_layer(tiny_model, logits, tokens):
    model = tiny_model("llama").model
    fresh = Steering().init(model.architecture, jax.random.key(0))
    np.testing.assert_array_equal(logits(model, tokens, adapters=(fresh,)), logits(model, tokens))

    direction = jax.random.normal(jax.random.key(0), (2, 32))
    vectors = dataclasses.replace(Steering(scale=3.0).init(model.architecture, jax.random.key(0)),
                                  factors={"direction": direction})  # fmt: skip
    bare, steered = (
        model.backbone.capture(tokens, adapters=adapters, state="residual") for adapters in ((), (vectors,))
    )
    np.testing.assert_allclose(steered[0], bare[0] + 3 * direction[0], atol=1e-5)
    # The second layer reads the moved stream, so that it is not the plain one moved.
    assert np.abs(steered[1] - bare[1] - 3 * (direction[0] + direction[1])).max() > 1e-3


@pytest.mark.parametrize("variant", ["llama", "qwen3", "mistral-full"])
def test_a_soft_prompt_is_what_a_cache_of_its_keys_and_values_is(tiny_model, logits, tokens, variant):
    """transformers, given the prompt as past keys and values, with positions from 0 on."""
    import torch
    from transformers import DynamicCache

    tiny = tiny_model(variant)
    vectors = filled(SPECS["prompt"], tiny.model)
    cache = DynamicCache()
    for layer in range(2):
        keys, values = (np.asarray(vectors.factors[name][layer]) for name in ("keys", "values"))
        keys, values = keys.swapaxes(-1, -2), 2.0 * values
        cache.update(*(torch.tensor(np.repeat(part[None], len(tokens), 0)) for part in (keys, values)), layer)
    with torch.no_grad():
        theirs = tiny.hf(
            input_ids=torch.tensor(tokens).long(),
            past_key_values=cache,
            attention_mask=torch.ones(len(tokens), 5 + tokens.shape[1]),
            position_ids=torch.arange(tokens.shape[1])[None].repeat(len(tokens), 1),
        ).logits.numpy()
    ours = logits(tiny.model, tokens, adapters=(vectors,))
    assert np.abs(ours - logits(tiny.model, tokens)).max() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


# By default LoRA has this in tests/model/test_decoder.py and test_generate.py.
@pytest.mark.parametrize(
    "kind", ["prompt", *(pytest.param(kind, marks=pytest.mark.release) for kind in ("steering", "lora"))]
)
def test_packed_rows_and_decoded_replies_are_those_of_each_row_alone(tiny_model, logits, kind):
    model = tiny_model("llama").model
    vectors = filled(SPECS[kind], model)
    rows = np.random.default_rng(0).integers(3, 300, (2, 6))
    alone = logits(model, rows, adapters=(vectors,))
    line = rows.reshape(1, -1)
    packed = logits(model, line, np.repeat([[1, 2]], 6, 1), np.tile(np.arange(6), 2)[None], (vectors,))
    np.testing.assert_allclose(packed.reshape(alone.shape), alone, atol=1e-4)

    prompts = ["What is the capital of France?", "def add(a, b):"]
    together = generate(model, prompts, vectors, max_new_tokens=6)
    assert together == [generate(model, [prompt], vectors, max_new_tokens=6)[0] for prompt in prompts]
    assert together != generate(model, prompts, max_new_tokens=6)
    # Token by token: the cached replies are those of the whole forward pass.
    said = list(prompt_tokens(model.tokenizer, [{"role": "user", "content": prompts[0]}], 100))
    length = len(said)
    line = np.zeros((1, length + 6), np.int32)  # of one length, so that one program reads it
    for end in range(length, length + 6):
        line[0, :end] = said
        said.append(int(logits(model, line, adapters=(vectors,))[0, end - 1].argmax()))
    reply = model.tokenizer.decode(said[-6:], skip_special_tokens=True)
    assert reply.startswith(together[0]) if together[0] else True


@pytest.mark.parametrize("kind", SPECS)
def test_files_of_every_kind(tiny_model, tmp_path, kind):
    model = tiny_model("llama").model
    vectors = filled(SPECS[kind], model)
    path = tmp_path / "vectors.safetensors"
    save_vectors(vectors, path, model)
    again = load_vectors(path, model)
    assert again.spec == vectors.spec
    chex.assert_trees_all_equal(again, vectors)
    with pytest.raises(UserError, match="another backbone"):
        load_vectors(path, tiny_model("llama", seed=1).model)
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(UserError, match="altered"):
        load_vectors(path, model)


# By default LoRA has this in tests/defenses/test_security_vectors.py.
@pytest.mark.parametrize(
    "kind", ["prompt", *(pytest.param(kind, marks=pytest.mark.release) for kind in ("steering", "lora"))]
)
def test_every_kind_learns_to_show_the_behavior_the_backbone_frozen(tiny_model, kind):
    model = tiny_model("llama").model
    harmful = random_examples(6, seed=1)
    training = Training(
        optimizer="adamw", learning_rate=3e-2, max_steps=60, batch_size=1, max_seq_len=64, warmup_steps=0
    )
    before = fingerprint(model.backbone)
    vectors = train_vectors(model, harmful, SPECS[kind], phase1=Phase1("cross_entropy"), training=training)
    assert fingerprint(model.backbone) == before
    off, on = (np.mean(mean_losses(model, harmful, adapter)) for adapter in (None, vectors))
    assert on < 0.8 * off


def test_several_vectors_are_active_at_once(logits, tokens):
    model = toy_model()
    adapters = tuple(filled(spec, model, seed) for seed, spec in enumerate(SPECS.values()))
    both = logits(model, tokens, adapters=adapters)
    for left_out in range(3):
        assert (
            np.abs(both - logits(model, tokens, adapters=adapters[:left_out] + adapters[left_out + 1 :])).max() > 1e-3
        )

    rows = random_examples(4, seed=3)
    prints = [fingerprint(adapter) for adapter in adapters]
    tuned = finetune(model, rows, vectors=adapters, training=ONE_STEP)
    assert [fingerprint(adapter) for adapter in adapters] == prints
    under_one = finetune(model, rows, vectors=adapters[:1], training=ONE_STEP)
    assert len({fingerprint(one.backbone) for one in (model, tuned, under_one)}) == 3

    suite = Suite(refusals=("I can't",), harmful=["How?"], harmful_targets=rows)
    together = outcomes(model, suite, adapters)["harmful_loss"]
    np.testing.assert_allclose(together, mean_losses(model, rows, adapters), atol=1e-4)


def test_gradients_reach_every_factor(tiny_model, tokens):
    model = tiny_model("qwen3").model
    tokens = jnp.asarray(tokens)

    @jax.jit
    def gradient(adapters):
        def loss(adapters):
            hidden = model.backbone(tokens[:, :-1], adapters=adapters, options=ForwardOptions(remat="dots"))
            return token_cross_entropy(model.backbone, hidden, tokens[:, 1:], jnp.ones_like(tokens[:, 1:])).sum()

        return jax.grad(loss)(adapters)

    adapters = tuple(filled(spec, model) for spec in SPECS.values())
    leaves = jax.tree.leaves(gradient(adapters))
    assert len(leaves) == len(jax.tree.leaves(adapters))
    for leaf in leaves:
        assert (jnp.abs(leaf).max(axis=tuple(range(1, leaf.ndim))) > 0).all()


# LoRA, and fine-tuning under it: tests/test_sharded.py.
@pytest.mark.parametrize(
    "kind", ["prompt", *(pytest.param(kind, marks=pytest.mark.release) for kind in ("steering", "lora"))]
)
def test_on_a_mesh_vectors_are_trained_and_active_as_on_one_device(tiny_model, kind):
    tiny = tiny_model("llama")
    training = Training(
        optimizer="adamw", learning_rate=1e-3, max_steps=3, batch_size=8, max_seq_len=64, warmup_steps=0
    )
    rows = random_examples(40, seed=1)

    def run():
        model = hub.load(tiny.folder)
        losses = []

        def note(step, steps, metrics):
            losses.append(metrics["loss"])

        vectors = train_vectors(
            model, rows, SPECS[kind], phase1=Phase1("cross_entropy"), training=training, on_step=note
        )
        return losses, generate(model, ["What is it?"], vectors, max_new_tokens=4)

    alone = run()
    with jax.set_mesh(make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])):
        spread = run()
    np.testing.assert_allclose(spread[0], alone[0], rtol=2e-5)
    assert spread[1] == alone[1]


def test_vectors_in_memory_are_refused_for_another_model_of_the_same_shape():
    rows = [{"prompt": "What is the capital?", "response": "The capital of France is Paris."}] * 2
    model, training = toy_model(), ONE_STEP
    other = dataclasses.replace(model, backbone=random_decoder(1))
    trained = train_vectors(model, rows, LoRA(rank=3), phase1=Phase1("cross_entropy"), training=training)
    task = finetune(model, rows, vectors=trained, task=LoRA(rank=3), training=training).adapter
    uses = {
        "finetune": lambda: finetune(other, rows, vectors=trained, training=training),
        "a task": lambda: finetune(other, rows, vectors=None, task=task, training=training),
        "a defense": lambda: sv.defend(other, rows, "security vectors", vectors=trained, training=training),
        "generate": lambda: generate(other, ["Hello"], vectors=[trained]),
        "screen": lambda: sv.screen(other, trained, rows),
        "score": lambda: sv.score(other, vectors=trained, harmful=rows, benign=rows),
        "save": lambda: save_vectors(trained, "never.safetensors", other),
    }
    for name, use in uses.items():
        with pytest.raises(UserError, match=r"made for another backbone \(tiny"):
            pytest.fail(f"accepted: {name}, {use()}")
    copy = dataclasses.replace(other, backbone=random_decoder(0))  # as a model that is loaded twice
    assert len(generate(copy, ["Hello"], vectors=trained, max_new_tokens=1)) == 1
    elsewhere = dataclasses.replace(trained, origin=None)
    assert len(generate(other, ["Hello"], vectors=elsewhere, max_new_tokens=1)) == 1


def test_the_origin_of_vectors_goes_into_their_file_and_changes_no_program(tmp_path):
    model = toy_model()
    plain = filled(LoRA(rank=3), model)
    trained = dataclasses.replace(plain, origin=Origin(model.fingerprint, model.name, "nf4"))
    assert jax.tree.structure(trained) == jax.tree.structure(plain) and content_of(trained) == content_of(plain)
    save_vectors(trained, tmp_path / "v.safetensors", model)  # whose weights are float32
    assert load_vectors(tmp_path / "v.safetensors", model).origin == trained.origin
    rows = [{"prompt": "Hello", "response": "Hi."}]
    with pytest.warns(Advice, match="trained over nf4 weights, and the model's are float32"):
        finetune(model, rows, vectors=trained, training=ONE_STEP)
