"""Batches: nothing is lost, duplicated or mixed up, and a saved state resumes exactly."""

import hashlib
import json
import os
from collections import Counter

import chex
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secvec_jax.batch import KEYS, SHARED
from secvec_jax.data.pipeline import Stream
from secvec_jax.data.shared_prefix import PromptIndex, agreement
from secvec_jax.errors import UserError
from secvec_jax.sharding import make_mesh
from tests.toys import example, random_examples

few = settings(max_examples=25)


@st.composite
def streams(draw):
    """Streams of one or two groups, with or without a common beginning, of every shape that holds the rows."""
    head = draw(st.lists(st.integers(100, 105), max_size=4))
    token = st.integers(1, 9)
    row = st.builds(
        lambda prompt, reply: example([*head, *prompt], reply),
        st.lists(token, min_size=1, max_size=4),
        st.lists(token, min_size=1, max_size=4),
    )
    groups = {"a": draw(st.lists(row, min_size=1, max_size=7))}
    if draw(st.booleans()):
        groups["b"] = draw(st.lists(row, max_size=5))
    longest = max(len(e.tokens) for group in groups.values() for e in group)
    return Stream(
        groups,
        batch_size=draw(st.integers(1, 3)),
        seq_len=longest - 1 + draw(st.integers(0, 12)),
        seed=draw(st.integers(0, 99)),
        epochs=draw(st.integers(1, 3)),
    )


def rows_of(batch):
    """(group, tokens, supervised) of every row of a batch, its shared head put before it again."""
    for line in range(len(batch["tokens"])):
        part = {key: batch[key][line] for key in KEYS}
        head = part["segments"] == SHARED
        for segment in sorted(set(part["segments"]) - {0, SHARED}):
            own = part["segments"] == segment
            tokens = (*part["tokens"][head], *part["tokens"][own], part["targets"][own][-1])
            (group,) = set(part["groups"][own])
            supervised = (*[False] * (head.sum() + 1), *(part["weights"][own] > 0))
            yield int(group), tuple(map(int, tokens)), tuple(map(bool, supervised))


def expected(stream):
    return Counter(
        (index, tuple(map(int, e.tokens)), tuple(map(bool, e.supervised)))
        for index, group in enumerate(stream.examples.values())
        for e in group
        for _ in range(stream.epochs)
    )


def assert_same(a, b):
    a, b = list(a), list(b)
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        chex.assert_trees_all_equal(one, other)


@few
@given(streams())
def test_every_example_appears_exactly_as_often_as_there_are_epochs(stream):
    found = Counter(row for batch in stream.batches() for row in rows_of(batch))
    assert found == expected(stream)


@few
@given(streams())
def test_the_contract_of_a_batch(stream):
    for batch in stream.batches():
        assert set(batch) == set(KEYS)
        for key in KEYS:
            chex.assert_shape(batch[key], (stream.batch_size, stream.seq_len))
            assert batch[key].dtype == (np.float32 if key == "weights" else np.int32)
        for line in range(stream.batch_size):
            part = {key: batch[key][line] for key in KEYS}
            head = part["segments"] == SHARED
            assert not part["weights"][(part["segments"] <= 0)].any()
            np.testing.assert_array_equal(part["positions"][head], np.arange(head.sum()))
            for segment in set(part["segments"]) - {0, SHARED}:
                own = np.flatnonzero(part["segments"] == segment)
                np.testing.assert_array_equal(own, np.arange(own[0], own[-1] + 1))
                np.testing.assert_array_equal(part["targets"][own[:-1]], part["tokens"][own[1:]])
                np.testing.assert_array_equal(part["positions"][own], head.sum() + np.arange(len(own)))
                assert part["weights"][own].any()


def test_a_shared_prefix_is_stored_once_at_the_head_of_every_sequence():
    rows = [example([7, 8, 9, 1], [2, 3]), example([7, 8, 9, 4], [5, 3]), example([7, 8, 9, 6], [2, 3])]
    (batch,) = Stream({"a": rows}, batch_size=2, seq_len=9).batches()
    heads = batch["segments"] == SHARED
    np.testing.assert_array_equal(batch["tokens"][heads].reshape(2, 3), [[7, 8, 9]] * 2)
    assert len(list(rows_of(batch))) == 3
    assert (batch["tokens"] == 7).sum() == 2


def test_the_shared_prefix_leaves_the_token_that_predicts_the_first_word_of_every_reply():
    rows = [example([7, 8, 9], [2, 3]), example([7, 8, 9], [5, 3])]
    (batch,) = Stream({"a": rows}, batch_size=1, seq_len=8).batches()
    assert (batch["segments"] == SHARED).sum() == 2
    assert batch["weights"].sum() == 4


def test_one_row_alone_has_no_shared_prefix():
    (batch,) = Stream({"a": [example([1, 2, 3], [4])]}, batch_size=1, seq_len=4).batches()
    assert not (batch["segments"] == SHARED).any()


@few
@given(stream=streams(), data=st.data())
def test_a_saved_state_goes_on_exactly(stream, data):
    everything = list(stream.batches())
    seen = data.draw(st.integers(0, len(everything)))
    batches = iter(stream.batches())
    for _ in range(seen):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    list(batches)
    resumed = iter(stream.batches())
    resumed.set_state(state)
    assert_same(resumed, everything[seen:])


@few
@given(streams())
def test_one_seed_gives_one_order_and_count_is_right(stream):
    assert_same(stream.batches(), stream.batches())
    assert stream.count() == len(list(stream.batches()))


def test_other_seeds_and_other_epochs_give_other_orders():
    rows = {"a": random_examples(20)}

    def order(**settings):
        return [row for batch in Stream(rows, batch_size=1, seq_len=12, **settings).batches() for row in rows_of(batch)]

    assert order(seed=1) != order(seed=2)
    assert order(seed=1, epochs=2)[:20] != order(seed=1, epochs=2)[20:]


def test_packing_wastes_little():
    rows = random_examples(200)
    stream = Stream({"a": rows}, batch_size=2, seq_len=64)
    batches = list(stream.batches())
    filled = sum((batch["segments"] != 0).sum() for batch in batches) / (len(batches) * 128)
    assert filled > 0.85


def test_groups_are_distinguished_by_number_and_name():
    stream = Stream({"x": [example([1, 2], [3])], "y": [example([4, 5], [6])]}, batch_size=1, seq_len=8)
    assert stream.groups == ("x", "y")
    (batch,) = stream.batches()
    assert {batch["groups"][0][batch["tokens"][0] == first].item() for first in (1,)} == {0}
    assert {batch["groups"][0][batch["tokens"][0] == first].item() for first in (4,)} == {1}


def test_an_endless_stream_goes_on_and_has_no_count():
    stream = Stream({"a": [example([1], [2])]}, batch_size=1, seq_len=4, epochs=None)
    batches = iter(stream.batches())
    assert sum(len(list(rows_of(next(batches)))) for _ in range(20)) > 20
    with pytest.raises(ValueError, match="endless"):
        stream.count()


@pytest.mark.parametrize("groups", [{}, {"a": []}, {"a": [], "b": []}])
def test_no_rows_are_refused(groups):
    with pytest.raises(UserError, match=r"no rows to train on.*check --data"):
        Stream(groups, batch_size=1, seq_len=8)


def test_a_row_longer_than_a_sequence_is_refused():
    row = example([1] * 6, [2] * 4)
    with pytest.raises(UserError, match="a row has 10 tokens, a packed sequence only 8: raise --max-seq-len"):
        Stream({"a": [row]}, batch_size=1, seq_len=8).count()
    assert Stream({"a": [row]}, batch_size=1, seq_len=9).count() == 1


ORDERS = {
    (1, True): "efa5aba4a2715aed", (1, False): "09926defc8b80e37", (2, True): "691baac4e9269acc",
    (2, False): "e718e21946752e0c", (4, True): "092265d508e8d0b7", (4, False): "59daf2c5254af992",
    (8, True): "05f3d54a4370ec35", (8, False): "85090f498e556e3b",
}  # fmt: skip
"""What version 0.1 read, by batch size and whether the prefix is shared."""


@pytest.mark.parametrize(("batch_size", "share_prefix"), ORDERS)
def test_a_seed_gives_the_same_batches_in_every_version(batch_size, share_prefix):
    rows = random_examples(55, head=5)
    digest = hashlib.sha256()
    for batch in Stream({"a": rows[:40], "b": rows[40:]}, batch_size, 48, 7, 2, share_prefix).batches():
        for key in ("tokens", "targets", "weights", "groups", "segments", "positions"):
            digest.update(np.ascontiguousarray(batch[key]).tobytes())
    assert digest.hexdigest()[:16] == ORDERS[batch_size, share_prefix]


prompts = st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=5), min_size=1, max_size=8)


@few
@given(prompts, st.integers(1, 3), st.data())
def test_a_prompt_index_knows_common_prefixes_as_if_it_read_all_prompts(found, stride, data):
    rows = [example(prompt, [3]) for prompt in found]
    start = data.draw(st.integers(0, len(rows) - 1))
    chosen = range(start, len(rows), stride)
    first = rows[0].tokens[:-1]
    agreements = [agreement(first, row.tokens[:-1]) for row in rows]
    lengths = np.asarray([len(prompt) for prompt in found])
    index = PromptIndex(first, lengths, *np.asarray(agreements).T)
    expected = os.path.commonprefix([found[number] for number in chosen])
    assert index.common_prefix(chosen, rows).tolist() == expected


# Substreams and hosts -----------------------------------------------------------------------------------


class Asked(list):
    """Rows that note which of them were asked for."""

    def __init__(self, rows):
        super().__init__(rows)
        self.asked = set()

    def __getitem__(self, index):
        self.asked.add(index)
        return super().__getitem__(index)


@pytest.mark.parametrize("lines", [1, 2, 3, 4, 8, 12])
def test_lanes_read_separately_make_the_same_batches(lines):
    stream = Stream({"a": random_examples(50, head=3)}, batch_size=lines, seq_len=40)
    everything = list(stream.batches())
    substreams = [list(stream.batches([index])) for index in range(stream.num_substreams)]
    height = lines // stream.num_substreams
    for index, batch in enumerate(everything):
        for number, own in enumerate(substreams):
            rows = slice(number * height, (number + 1) * height)
            for key in KEYS:
                expected = own[index][key] if index < len(own) else np.zeros((height, 40))
                np.testing.assert_array_equal(batch[key][rows], expected)


def test_a_lane_reads_its_own_share_of_the_rows_only():
    rows = Asked(random_examples(40))
    stream = Stream({"a": rows}, batch_size=8, seq_len=40)
    assert stream.num_substreams == 4
    list(stream.batches([1]))
    assert rows.asked == set(range(1, 40, 4))


def test_a_process_reads_the_lanes_of_its_devices_and_any_mesh_goes_on_from_its_state():
    stream = Stream({"a": random_examples(60)}, batch_size=8, seq_len=40, epochs=None)
    alone = stream.local_batches()
    first, second = alone.take(2), alone.take(2)
    with jax.set_mesh(make_mesh(fsdp=4, tensor=2)):
        assert stream.local_substreams() == [0, 1, 2, 3]
        spread = stream.local_batches()
        chex.assert_trees_all_equal(jax.device_get(spread.take(2)), first)
        state = json.loads(json.dumps(spread.get_state()))
        assert set(state) == {"0", "1", "2", "3"}
        batch = spread.take(2)
        assert batch["tokens"].sharding.spec == jax.P(None, "fsdp")
        chex.assert_trees_all_equal(jax.device_get(batch), second)
    resumed = stream.local_batches()
    resumed.set_state(state)
    chex.assert_trees_all_equal(resumed.take(2), second)


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    stream = Stream({"a": random_examples(60)}, batch_size=6, seq_len=40)
    with jax.set_mesh(make_mesh(fsdp=4, tensor=2)):
        with pytest.raises(UserError, match="a batch of 6 sequences cannot be sharded over 4 devices"):
            stream.local_batches()


def test_beginnings_are_shared_only_where_they_may_be():
    rows = {"a": random_examples(8, head=5)}
    shared, apart = (
        next(iter(Stream(rows, 1, 60, share_prefix=share).batches()))["segments"] for share in (True, False)
    )
    assert (shared == SHARED).any() and not (apart == SHARED).any()
