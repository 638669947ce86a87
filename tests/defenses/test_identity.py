"""Checkpoints belong to one training, identified by the content of all its inputs."""

import dataclasses
from functools import partial

import numpy as np
import pytest

from secvec_jax.config import Training
from secvec_jax.data.encoded import encode_rows
from secvec_jax.data.rows import row
from secvec_jax.defenses import identity
from secvec_jax.defenses.finetuning import stream_of
from secvec_jax.defenses.identity import content_of, of_rows, of_tokenizer, with_inputs
from secvec_jax.defenses.lisa import lisa
from secvec_jax.defenses.security_vectors import Phase1, finetune, train_vectors
from secvec_jax.defenses.vaccine import vaccine
from secvec_jax.errors import UserError
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.training.objective import LEARN
from secvec_jax.vectors.lora import LoRA
from tests.toys import build_tokenizer, example, random_decoder, tiny_model

TRAINING = Training(max_steps=6, batch_size=2, max_seq_len=64, remat="none").over(Training.base)
ROWS = [row(f"q{i}", f"a {i}") for i in range(6)]


def inputs(tmp_path, *, rows=ROWS, model=None, training=TRAINING, steps=6, **more) -> dict:
    model = model or tiny_model()
    streams = {"learn": stream_of(model, {"all": rows}, training)}
    found = with_inputs(Checkpoints(tmp_path), model, training, steps, streams, **more)
    return dict(found.inputs)


def test_everything_that_goes_in_is_known_by_content(tmp_path, random_vectors):
    model = tiny_model()
    vectors = random_vectors(model)
    whole = inputs(tmp_path, the_vectors=(vectors,), the_defense=vaccine(rho=2.0))
    same = inputs(tmp_path, rows=[dict(r) for r in ROWS], the_vectors=(vectors,), the_defense=vaccine(rho=2.0))
    assert same == whole
    other_template = build_tokenizer()
    other_template.chat_template += "\n"
    changed = {
        "rows 'all'": {"rows": [*ROWS[:5], row("q5", "another answer")]},
        "the model": {"model": model.with_backbone(random_decoder(1))},
        "the tokenizer or its chat template": {"model": dataclasses.replace(model, tokenizer=other_template)},
        "training.learning_rate": {"training": dataclasses.replace(TRAINING, learning_rate=0.5)},
        "training.seed": {"training": dataclasses.replace(TRAINING, seed=3)},
        "the number of steps": {"steps": 7},
        "the vectors": {"the_vectors": (random_vectors(model, seed=1),)},
        "the defense": {"the_defense": vaccine(rho=3.0)},
    }
    for label, change in changed.items():
        now = inputs(tmp_path, **{"the_vectors": (vectors,), "the_defense": vaccine(rho=2.0)} | change)
        assert {name for name in whole | now if whole.get(name) != now.get(name)} == {label}


def test_each_stream_is_known_by_its_rows_and_its_batch(tmp_path):
    """Also where the user's rows are of a kind that is named like a stream of the defense."""
    model = tiny_model()

    def inputs_with(user, safe, batch_size=2) -> dict:
        safe_training = dataclasses.replace(TRAINING, batch_size=batch_size)
        streams = {
            LEARN: stream_of(model, {"safe": user}, TRAINING),
            "safe": stream_of(model, {"safe": safe}, safe_training),
        }
        return dict(with_inputs(Checkpoints(tmp_path), model, TRAINING, 6, streams).inputs)

    whole = inputs_with(ROWS, ROWS[:4])
    changed = {
        "rows 'safe'": (ROWS[1:], ROWS[:4]),
        "safe rows 'safe'": (ROWS, ROWS[:3]),
        "safe batch": (ROWS, ROWS[:4], 1),
    }
    for label, change in changed.items():
        now = inputs_with(*change)
        assert {name for name in whole | now if whole.get(name) != now.get(name)} == {label}


def test_what_no_step_depends_on_does_not_count(tmp_path):
    free = dataclasses.replace(TRAINING, save_every_seconds=1.0, max_checkpoints=9, epochs=7)
    assert inputs(tmp_path, training=free) == inputs(tmp_path)
    tokenizer = build_tokenizer()
    before = of_tokenizer(tokenizer)
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=9)
    assert of_tokenizer(tokenizer) == before, "how it was last asked to pad"


def test_a_special_token_that_the_template_writes_counts():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    digests = []
    for tokenizer.bos_token in ("<|im_start|>", "<|endoftext|>"):
        digests.append(of_tokenizer(tokenizer))
    assert digests[0] != digests[1]


def test_only_a_constant_schedule_can_be_extended(tmp_path):
    constant = dataclasses.replace(TRAINING, schedule="constant")
    assert inputs(tmp_path, training=constant, steps=9) == inputs(tmp_path, training=constant)
    assert inputs(tmp_path, training=constant, steps=2) != inputs(tmp_path, training=constant), "a shorter warm-up"
    streams = {"learn": stream_of(tiny_model(), {"all": ROWS}, constant)}
    for training, kept in ((constant, True), (TRAINING, False)):
        assert with_inputs(Checkpoints(tmp_path), tiny_model(), training, 6, streams).keep_end is kept


def test_rows_are_distinguished_in_any_form():
    examples = [example([5, 6], [7]), example([5], [6, 7])]
    assert of_rows(examples) == of_rows([example([5, 6], [7]), example([5], [6, 7])])
    assert of_rows(examples) != of_rows(examples[::-1]) and of_rows(examples) != of_rows([example([5], [6, 7])] * 2)
    assert of_rows(encode_rows(build_tokenizer(), ROWS, 64)) == of_rows(ROWS) != of_rows(ROWS[1:])


def test_functions_are_distinguished_by_what_they_hold():
    assert content_of(lisa(2, 3)) == content_of(lisa(2, 3)) != content_of(lisa(2, 4))
    assert content_of(partial(max, 3)) != content_of(partial(max, 4))
    assert content_of({"a": np.ones(3)}) == content_of({"a": np.ones(3)}) != content_of({"a": np.zeros(3)})

    def of_itself():
        return of_itself

    assert content_of(of_itself) == content_of(of_itself)


def test_a_resume_on_other_rows_or_settings_is_refused_by_both_phases(tmp_path):
    """The checkpoint is saved by the step's own callback."""
    model = tiny_model()

    class Stopped(Exception):
        pass

    def on_step(step, steps, metrics):
        if step == 3:
            raise Stopped

    def train_model(rows=ROWS, **changes):
        checkpoints = Checkpoints(tmp_path / "tune", 0.0)
        return finetune(model, rows, training=dataclasses.replace(TRAINING, **changes), checkpoints=checkpoints,
                        on_step=on_step)  # fmt: skip

    def train(rows=ROWS, spec=LoRA(rank=2)):
        checkpoints = Checkpoints(tmp_path / "vectors", 0.0)
        options = {"training": TRAINING, "checkpoints": checkpoints, "on_step": on_step}
        return train_vectors(model, rows, spec, phase1=Phase1("cross_entropy"), **options)

    for work in (train_model, train):
        with pytest.raises(Stopped):
            work()
        with pytest.raises(UserError, match=r"rows '\w+' has changed since the training in"):
            work(rows=ROWS[:4])
    with pytest.raises(UserError, match=r"training.learning_rate was 0.001, is now 0.1"):
        train_model(learning_rate=0.1)
    with pytest.raises(UserError, match=r"training.max_seq_len was 64, is now 'unset'"):
        train_model(max_seq_len=None)
    for rows in ({"all": ROWS, "more": ROWS[:2]}, {"others": ROWS[:2]}):
        with pytest.raises(UserError, match=r"rows '\w+' has changed since the training in"):
            train_model(rows=rows)
    with pytest.raises(UserError, match="the shape of the vectors has changed"):
        train(spec=LoRA(rank=2, alpha=3.0))


def test_the_format_counts(tmp_path, monkeypatch):
    before = inputs(tmp_path)
    monkeypatch.setattr(identity, "FORMAT", identity.FORMAT + 1)
    assert inputs(tmp_path) != before
