"""How many safe rows are mixed in, which ones, and under which name; and further training of a model on safe rows."""

import datasets
import numpy as np
import pytest

from secvec_jax.config import Training
from secvec_jax.defenses.finetuning import train_model
from secvec_jax.defenses.mixing import sequential, successive, with_safe_rows
from secvec_jax.errors import UserError
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.trees import fingerprint
from secvec_jax.vectors.lora import LoRA, merge
from tests.toys import random_examples, tiny_model

ROWS, SAFE = random_examples(6, seed=1), random_examples(8, seed=2)
BRIEF = Training(learning_rate=1e-2, max_steps=3, batch_size=1, max_seq_len=64)
GENTLE = Training(optimizer="adamw", learning_rate=1e-3, max_steps=2, batch_size=1, max_seq_len=64)


@pytest.mark.parametrize(("share", "count"), [(0.5, 3), (1.0, 6), (0.2, 1), (4 / 3, 8)])
def test_the_mix_takes_the_first_so_many_safe_rows(share, count):
    found = with_safe_rows(ROWS, SAFE, share)
    assert list(found) == ["all", "safe"]
    assert found["all"] is ROWS and found["safe"] == SAFE[:count]


def test_shares_are_of_all_kinds_together():
    groups = {"harmful": ROWS[:2], "benign": ROWS[2:]}
    assert with_safe_rows(groups, SAFE, 0.5) == groups | {"safe": SAFE[:3]}
    assert with_safe_rows(groups, SAFE, 1.0) == groups | {"safe": SAFE[:6]}
    assert set(groups) == {"harmful", "benign"}


def test_data_sets_are_mixed_too():
    safe = [{"prompt": str(number), "response": "No."} for number in range(4)]
    found = with_safe_rows(datasets.Dataset.from_list(safe[:3]), datasets.Dataset.from_list(safe), 1.0)
    assert found["safe"] == safe[:3]


def test_the_losses_of_the_kinds_are_reported_separately():
    seen = set()
    training = Training(learning_rate=1e-2, epochs=1, batch_size=1, max_seq_len=64)
    train_model(
        tiny_model(), with_safe_rows(ROWS, SAFE, 0.5), training=training, on_step=lambda s, n, m: seen.update(m)
    )
    assert {"loss/all", "loss/safe"} <= seen


def test_mixes_that_cannot_be_made_are_refused():
    with pytest.raises(UserError, match="takes 9 safe rows, of which there are 8"):
        with_safe_rows(ROWS, SAFE, share=1.5)
    with pytest.raises(UserError, match="takes 0 safe rows"):
        with_safe_rows(ROWS, SAFE, share=0.0)
    with pytest.raises(UserError, match='a kind named "safe"'):
        with_safe_rows({"safe": ROWS}, SAFE, share=1.0)


def test_the_sequence_is_one_fine_tuning_after_the_other():
    model = tiny_model()
    names = []

    def on_step(step, steps, metrics):
        names.append((step, steps, next(name for name in metrics if name.startswith("loss/"))))

    found = sequential(model, {"user": ROWS}, SAFE, safe_training=GENTLE, training=BRIEF, on_step=on_step)
    noisy = train_model(model, ROWS, training=BRIEF)
    assert fingerprint(found.backbone) == fingerprint(train_model(noisy, SAFE, training=GENTLE).backbone)
    assert names == [(1, 3, "loss/user"), (2, 3, "loss/user"), (3, 3, "loss/user"),
                     (1, 2, "loss/safe"), (2, 2, "loss/safe")]  # fmt: skip


def test_one_task_adapter_goes_on():
    """Two adapters of rank 2 would leave an update of rank 4."""
    model = tiny_model()
    quick = Training(optimizer="adamw", learning_rate=5e-2, max_steps=4, batch_size=1, max_seq_len=64, warmup_steps=0)
    task = LoRA(rank=2, targets=("up_proj",))
    noisy, found = successive(model, ROWS, SAFE, safe_training=quick, training=quick, task=task)
    kernels = [np.asarray(m.backbone.layers.mlp.up_proj.kernel[0]) for m in (model, noisy, found)]
    size = np.abs(kernels[1] - kernels[0]).max()
    assert size > 1e-2 and np.abs(kernels[2] - kernels[1]).max() > 1e-2
    for kernel in kernels[1:]:
        assert np.linalg.matrix_rank(kernel - kernels[0], tol=1e-3) == 2
    first = train_model(model, ROWS, training=quick, task=task)
    assert noisy.fingerprint == first.fingerprint == fingerprint(merge(model.backbone, first.adapter))
    on = train_model(model, SAFE, training=quick, task=first.adapter)
    assert fingerprint(found.backbone) == fingerprint(on.backbone)


def test_each_training_has_its_own_checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path, save_every_seconds=0.0, best="loss/all")
    found = sequential(tiny_model(), ROWS, SAFE, safe_training=GENTLE, training=BRIEF, checkpoints=checkpoints)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["noisy", "safe"]
    best = Checkpoints(tmp_path / "again", save_every_seconds=0.0, best="loss/all")
    noisy = train_model(tiny_model(), ROWS, training=BRIEF, checkpoints=best)
    assert fingerprint(found.backbone) == fingerprint(train_model(noisy, SAFE, training=GENTLE).backbone)
