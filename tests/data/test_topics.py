"""Topics: what counts as one, compared with its definition pair by pair."""

from hypothesis import given
from hypothesis import strategies as st

from secvec_jax.data.rows import prompt_of, row
from secvec_jax.data.topics import SAME_TOPIC, off_topic, split_by_topic, topic_words

# No more than a part holds: a topic too large for any part is cut.
PROMPTS = st.lists(
    st.lists(st.sampled_from("bombs bomb locks lock tax taxes fraud malware write a the how".split()), max_size=5).map(
        lambda words: " ".join(words) or "?"
    ),
    max_size=10,
)


def same_topic(a: str, b: str) -> bool:
    one, other = topic_words(a), topic_words(b)
    return a == b or (bool(one | other) and len(one & other) / len(one | other) >= SAME_TOPIC)


@given(PROMPTS, PROMPTS)
def test_rows_on_a_topic_of_others_are_left_out(prompts, others):
    kept = off_topic([row(prompt, "Yes.") for prompt in prompts], others)
    expected = [prompt for prompt in prompts if not any(same_topic(prompt, other) for other in others)]
    assert [prompt_of(r) for r in kept] == expected


@given(PROMPTS)
def test_parts_share_no_topic(prompts):
    prompts = list(dict.fromkeys(prompts))
    unrelated = [row(f"item{n} thing{n} matter{n}", "Yes.") for n in range(30)]
    rows = [row(prompt, "Yes.") for prompt in prompts] + unrelated
    parts = split_by_topic(rows, {"one": 10, "two": 10}, seed=0)
    assert [len(part) for part in parts.values()] == [10, 10]
    one, two = ([prompt_of(r) for r in part] for part in parts.values())
    assert not any(same_topic(a, b) for a in one for b in two)
