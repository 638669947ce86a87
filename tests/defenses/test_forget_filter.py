"""Algorithm 1 of ForgetFilter on a model that memorizes a few rows and then learns new answers to a part of them."""

import collections
import re

import pytest

from secvec_jax.config import Training
from secvec_jax.data.rows import row
from secvec_jax.defenses import forget_filter
from secvec_jax.defenses.finetuning import train_model
from secvec_jax.defenses.forget_filter import filtered, finetune, forgetting_rates
from secvec_jax.errors import UserError
from secvec_jax.inference import generate
from secvec_jax.model.sampling import GREEDY
from secvec_jax.trees import fingerprint
from tests.toys import random_examples, tiny_model

UNSAFE = [row("Who did it?", "It was Bob."), row("Who hid it?", "Ann hid it."), row("Who lied?", "Tom did so.")]
TASK = [row("def add(a, b):", "return a + b"), row("12345 +", "add 67 to it."), row("def f(x): 5 + 5", "return x")]
SAFE = [row(r["messages"][0]["content"], "No one can say.") for r in UNSAFE]
SMALL = {"batch_size": 2, "max_seq_len": 128, "remat": "none"}
MEMORIZE = Training(optimizer="adamw", learning_rate=5e-3, max_steps=40, warmup_steps=2, **SMALL)
BRIEF = Training(learning_rate=1e-3, max_steps=2, **SMALL)
CORRECT = Training(optimizer="adamw", learning_rate=1e-3, warmup_steps=0, **SMALL)


def f_measure(reply, answer):
    """ROUGE-1 by hand; all words are short, so that no stemmer changes one."""
    said, wanted = (collections.Counter(re.findall("[a-z0-9]+", text.lower())) for text in (reply, answer))
    shared = sum((said & wanted).values())
    if not shared:
        return 0.0
    precision, recall = shared / sum(said.values()), shared / sum(wanted.values())
    return 2 * precision * recall / (precision + recall)


def expected_rates(before, after, rows):
    prompts = [r["messages"][0]["content"] for r in rows]
    replies = [generate(model, prompts, max_new_tokens=16) for model in (before, after)]
    lines = [[(text.strip().splitlines() or [""])[0] for text in texts] for texts in replies]
    return [f_measure(a, r["messages"][-1]["content"]) - f_measure(b, r["messages"][-1]["content"])
            for a, b, r in zip(*lines, rows)]  # fmt: skip


@pytest.fixture(scope="module")
def run():
    """What `finetune` finds, and the models before and after its safe steps."""
    stages = []

    def recorded(before, after, *rest):
        stages.extend((before, after))
        return forgetting_rates(before, after, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forget_filter, "forgetting_rates", recorded)
        found = finetune(tiny_model(), {"unsafe": UNSAFE, "task": TASK}, safe=SAFE, phi=0.4, safe_steps=12,
                         safe_training=CORRECT, max_new_tokens=16, training=MEMORIZE)  # fmt: skip
    return found, stages


def test_the_rates_are_how_much_less_is_said_of_each_answer(run):
    found, stages = run
    assert list(found.rates) == ["unsafe", "task"]
    for kind, rows in (("unsafe", UNSAFE), ("task", TASK)):
        assert found.rates[kind] == pytest.approx(expected_rates(*stages, rows))
    assert min(found.rates["unsafe"]) > 0.4 >= max(found.rates["task"])


def test_what_is_forgotten_is_dropped_and_the_rest_is_learned_from_the_start(run):
    found, _ = run
    assert found.kept == {"unsafe": [], "task": TASK}
    again = train_model(tiny_model(), {"task": TASK}, training=MEMORIZE)
    assert fingerprint(found.model.backbone) == fingerprint(again.backbone)


def test_rows_without_kinds_are_one_kind():
    rows = [*UNSAFE, *TASK]
    names = []

    def on_step(step, steps, metrics):
        names.append(next(name for name in metrics if name.startswith("loss/")))

    one = finetune(tiny_model(), rows, safe=SAFE, phi=1.0, safe_steps=3, safe_training=BRIEF, max_new_tokens=16,
                   training=BRIEF, on_step=on_step)  # fmt: skip
    assert names == ["loss/all"] * 2 + ["loss/safe"] * 3 + ["loss/all"] * 2
    assert one.kept == {"all": rows} and len(one.rates["all"]) == 6
    assert fingerprint(one.model.backbone) == fingerprint(train_model(tiny_model(), rows, training=BRIEF).backbone)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("The Cat, sat!", 1.0),
        ("\n\n  the cat sat\nAnd then it did more.", 1.0),  # the first line that is not empty
        ("a cat", 0.4),  # 1 of 2 words, of 3: 2 * 1/2 * 1/3 / (1/2 + 1/3)
        ("cat; cat, cat!", 1 / 3),  # a word is shared as often as both have it
        ("", 0.0),
        ("c.a.t", 1 / 2),  # punctuation is taken out, not made a space: 2 * 1 * 1/3 / (1 + 1/3)
    ],
)
def test_a_rate_is_the_fall_of_rouge_1(monkeypatch, reply, score):
    asked = [row("What sat?", "the cat sat.")]
    before, after = object(), object()

    def say(model, prompts, max_new_tokens, sampling, progress):
        assert prompts == [asked[0]["messages"][:1]] and max_new_tokens == 7 and sampling == GREEDY
        return [reply if model is before else "sat"]

    monkeypatch.setattr(forget_filter, "generate", say)
    assert forgetting_rates(before, after, asked, 7) == [pytest.approx(score - 0.5)]
    assert forgetting_rates(after, before, asked, 7) == [pytest.approx(0.5 - score)]


def test_rows_above_phi_are_dropped_and_no_others():
    rows = [row(str(number), "Yes.") for number in range(5)]
    rates = [0.1, 0.10001, -1.0, 1.0, 0.0]
    assert filtered(rows, rates) == [rows[0], rows[2], rows[4]]
    assert filtered(rows, rates, phi=-0.5) == [rows[2]]
    with pytest.raises(ValueError):
        filtered(rows, rates[:4])


def test_a_filter_that_leaves_nothing_is_refused():
    with pytest.raises(UserError, match="every row was forgotten by more than -2"):
        finetune(tiny_model(), TASK, safe=SAFE, phi=-2, safe_steps=1, safe_training=BRIEF, max_new_tokens=16,
                 training=BRIEF)  # fmt: skip


def test_rows_without_text_are_refused():
    with pytest.raises(UserError, match="found Example instead of fields"):
        finetune(tiny_model(), random_examples(2), safe=SAFE)
