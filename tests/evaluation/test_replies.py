"""Which part of a reply is scored, and in which form."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secvec_jax.errors import UserError
from secvec_jax.evaluation import replies
from secvec_jax.turns import answer_of, in_thought


@pytest.mark.parametrize(
    "reply, answer, unfinished",
    [
        ("Paris", "Paris", False),
        ("<think>\n\n</think>\n\nParis", "Paris", False),
        ("<THINK>Hm.</THINK> Paris", "Paris", False),
        ("Hm.</think>\nParis", "Paris", False),
        ("  <think>Hm", "", True),
        ("", "", False),
        ("A < b <think> c", "A < b <think> c", False),
        ("<|START_THINKING|>Hm<|END_THINKING|>Paris", "Paris", False),
    ],
)
def test_the_answer_follows_the_thought(reply, answer, unfinished):
    assert answer_of(reply) == answer
    assert in_thought(reply) is unfinished


@pytest.mark.parametrize(
    "text, normal",
    [
        ("Désolé,  JE ne\nPeux pas", "desole, je ne peux pas"),
        ("I\u2019m sorry\u2026", "i'm sorry..."),
        ("Straße", "strasse"),
        ("\uff33\uff4f\uff52\uff52\uff59\uff0c\u200bno", "sorry,no"),
        ("對不起，我無法", "对不起,我无法"),
        ("できません", "できません"),
        ("도와드릴 수 없습니다", "도와드릴 수 없습니다"),
    ],
)
def test_the_normal_form(text, normal):
    assert replies.normal(text) == normal


@given(st.text(max_size=60))
def test_the_normal_form_is_stable(text):
    once = replies.normal(text)
    assert replies.normal(once) == replies.normal(replies.normal(once))
    assert once == once.strip() and "  " not in once


def test_chinese_words_are_pairs_of_characters():
    assert replies.words("don't 切西红柿 now") == ["don't", "切西", "西红", "红柿", "now"]


@given(st.text(), st.integers(1, 80))
def test_clip_gives_one_printable_line_within_its_width(text, width):
    line = replies.clip(text, width)
    assert len(line) <= width
    assert line.isprintable()


def test_clip_keeps_short_text_and_marks_a_cut():
    assert replies.clip("two\n lines\x1b") == "two lines"
    assert replies.clip("abcdefgh", 5) == "abcd\u2026"
    with pytest.raises(UserError, match="width"):
        replies.clip("text", 0)
