"""Vaccine's step is that of the published code: two passes, one norm over all layers, the perturbation a constant."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from secvec_jax.config import Training
from secvec_jax.defenses.finetuning import phase2_step
from secvec_jax.defenses.vaccine import Perturbation, perturbed, random_perturbation, vaccine
from secvec_jax.errors import UserError
from secvec_jax.model.architecture import PROJECTIONS
from secvec_jax.training.objective import Backbone, Objective, Params
from secvec_jax.training.phase import combine
from secvec_jax.training.step import make_train_step
from secvec_jax.vectors.lora import LoRA

RHO = 2.0


@pytest.fixture
def batch():
    """Two rows of 12 tokens, the last 5 and 3 learned."""
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(3, 320, (2, 2, 12)).astype(np.int32)
    targets[:, :-1] = tokens[:, 1:]
    weights = np.zeros((2, 12), np.float32)
    weights[0, -5:] = weights[1, -3:] = 1
    ones = np.ones((2, 12), np.int32)
    learn = {"tokens": tokens, "targets": targets, "weights": weights, "groups": 0 * ones, "segments": ones,
             "positions": np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))}  # fmt: skip
    return {"learn": learn}


def totals(batch):
    return {"learn": jnp.float32(batch["learn"]["weights"].sum())}


def theirs(hf, learn):
    """The published trainer's two passes (git-disl/Vaccine): hooks on every attention output."""
    tokens = torch.tensor(np.asarray(learn["tokens"]), dtype=torch.long)
    targets = torch.tensor(np.asarray(learn["targets"]), dtype=torch.long)
    supervised = torch.tensor(np.asarray(learn["weights"])) > 0
    layers = [layer.self_attn for layer in hf.model.layers]

    def loss():
        return torch.nn.functional.cross_entropy(hf(tokens).logits[supervised], targets[supervised])

    outputs = []
    hooks = [a.register_forward_hook(lambda m, i, out: (outputs.append(out[0]), out[0].retain_grad())[:0] or None)
             for a in layers]  # fmt: skip
    hf.zero_grad()
    first = loss()
    first.backward()
    slopes = [out.grad.detach().clone() for out in outputs]
    for hook in hooks:
        hook.remove()
    norm = torch.sqrt(sum((slope**2).sum() for slope in slopes))

    def adding(slope):
        def hook(module, inputs, out):
            out[0].data = out[0] + slope * (RHO / (norm + 1e-7))
            return out

        return hook

    hooks = [a.register_forward_hook(adding(slope)) for a, slope in zip(layers, slopes)]
    hf.zero_grad()
    second = loss()
    second.backward()
    for hook in hooks:
        hook.remove()
    gradient = hf.model.layers[0].mlp.up_proj.weight.grad.T.numpy()
    return float(first), float(second), gradient


@pytest.mark.parametrize(
    ("variant", "remat"),
    [("qwen3", "full"), *(pytest.param(*each, marks=pytest.mark.release)
                          for each in (("qwen3", "none"), ("llama", "none"), ("llama", "full")))],
)  # fmt: skip
def test_loss_and_gradient_are_those_of_the_published_trainer(tiny_model, batch, variant, remat):
    tiny = tiny_model(variant)
    params = Params(Backbone(tiny.model.backbone))
    loss = Objective(remat=remat)
    plain, second, gradient = theirs(tiny.hf, batch["learn"])
    assert second > plain + 0.01, "the perturbation raises the loss"
    both = jax.jit(jax.value_and_grad(perturbed(loss, RHO), has_aux=True))
    (value, _), found = both(params, batch, totals(batch))
    np.testing.assert_allclose(jax.jit(loss)(params, batch, totals(batch))[0], plain, rtol=1e-5)
    np.testing.assert_allclose(value, second, rtol=1e-5)
    ours = found.backbone.decoder.layers.mlp.up_proj.kernel[0]
    np.testing.assert_allclose(ours, gradient, atol=1e-5 * np.abs(gradient).max())


def test_no_radius_is_plain_fine_tuning(tiny_model, batch):
    params = Params(Backbone(tiny_model("llama").model.backbone))
    loss = Objective()
    plain, none = (
        jax.tree.leaves(jax.jit(jax.grad(f, has_aux=True))(params, batch, totals(batch))[0])
        for f in (loss, perturbed(loss, 0.0))
    )
    for one, other in zip(plain, none, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(one).max())


def test_only_attention_outputs_are_moved():
    adapter = Perturbation(jnp.ones((4, 8)))
    y = jnp.zeros((4, 8))
    for projection in PROJECTIONS:
        assert float(adapter.linear(projection, y, y).sum()) == (32 if projection == "o_proj" else 0)


@pytest.mark.parametrize("task", [None, LoRA(rank=4)])
def test_the_step_moves_what_it_should(tiny_model, batch, task):
    model = tiny_model("llama").model
    adapter = task and task.init(model.architecture, jax.random.key(0))
    params = Params(Backbone(model.backbone, adapter))
    training = Training(learning_rate=0.1, warmup_steps=1, share_prefix=False, remat="none")
    phase, train_step = phase2_step(params, ("all",), training, 10, vaccine(RHO))
    trained, frozen = phase.split(params)
    trained = jax.tree.map(jnp.copy, trained)
    state, stacked = train_step.init(trained), jax.tree.map(lambda part: part[None], batch)
    before = None
    for _ in range(3):
        trained, state, metrics = train_step.step(trained, state, frozen, stacked)
        before = before or float(metrics["loss"])
    assert float(metrics["loss"]) < before
    after = combine(trained, frozen)
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, after.backbone.decoder, model.backbone))
    assert (float(moved) > 0) == (task is None)


def run(model, batch, make_step, steps, **settings):
    """The losses of so many steps on one batch."""
    training = Training(
        **{"learning_rate": 0.1, "warmup_steps": 0, "schedule": "constant", "share_prefix": False, "remat": "none"}
        | settings
    )
    params = Params(Backbone(model.backbone))
    phase, train_step = phase2_step(params, ("all",), training, steps, make_step)
    trained, frozen = phase.split(params)
    trained, stacked = jax.tree.map(jnp.copy, trained), jax.tree.map(lambda part: part[None], batch)
    state, losses = train_step.init(trained), []
    for _ in range(steps):
        trained, state, metrics = train_step.step(trained, state, frozen, stacked)
        losses.append(float(metrics["loss"]))
    return losses


def test_the_accelerated_form_perturbs_one_step_in_tau(tiny_model, batch):
    model = tiny_model("llama").model
    loss = Objective()
    params = Params(Backbone(model.backbone))
    plain, worst = (float(jax.jit(f)(params, batch, totals(batch))[0]) for f in (loss, perturbed(loss, RHO)))
    frozen = {"learning_rate": 1e-12}
    np.testing.assert_allclose(run(model, batch, vaccine(RHO), 3, **frozen), [worst] * 3, rtol=1e-5)
    seen = run(model, batch, vaccine(RHO, every=3), 5, **frozen)
    np.testing.assert_allclose(seen, [worst, plain, plain, worst, plain], rtol=1e-5)
    # Momentum goes on through both kinds of steps.
    moving = run(model, batch, vaccine(RHO, every=2), 4)
    assert moving[0] == pytest.approx(worst, rel=1e-5) and moving[-2] < moving[0]


def test_rows_that_share_tokens_are_refused(tiny_model, batch):
    with pytest.raises(UserError, match="share_prefix"):
        run(tiny_model("llama").model, batch, vaccine(RHO), 1, share_prefix=True)


def test_micro_batches_are_refused_since_each_would_have_a_perturbation_of_that_norm(tiny_model, batch):
    halves = {"learn": jax.tree.map(lambda x: x.reshape(2, -1, x.shape[-1]), batch["learn"])}
    params = Params(Backbone(tiny_model("llama").model.backbone))
    training = Training(share_prefix=False, remat="none")
    phase, train_step = phase2_step(params, ("all",), training, 1, vaccine(RHO))
    trained, frozen = phase.split(params)
    with pytest.raises(UserError, match="Vaccine limits the perturbation of a whole batch: set grad_accum_steps to 1"):
        train_step.step(trained, train_step.init(trained), frozen, halves)


def test_the_control_draws_noise_by_what_the_batch_holds(tiny_model, batch):
    model = tiny_model("llama").model
    plain = run(model, batch, make_train_step, 2)
    assert run(model, batch, random_perturbation(0.0), 2) == pytest.approx(plain, rel=1e-6)
    noisy = run(model, batch, random_perturbation(0.25), 2)
    assert noisy != run(model, batch, random_perturbation(0.25, 1), 2)
    assert abs(noisy[0] - plain[0]) > 1e-3
    # By hand: the same key, the standard deviation, and the adapter.
    learn = batch["learn"]
    key = jax.random.fold_in(jax.random.key(0), jnp.sum(learn["tokens"] * learn["positions"]))
    noise = Perturbation(0.5 * jax.random.normal(key, (2, learn["tokens"].size, 32)))
    params = Params(Backbone(model.backbone), noise)
    assert noisy[0] == pytest.approx(float(jax.jit(Objective())(params, batch, totals(batch))[0]), rel=1e-5)
