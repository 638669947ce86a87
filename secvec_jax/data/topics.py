"""Split a dataset into parts that share no topic, so that nothing measured on one was trained on in another.

parts = split_by_topic(harmful, {"vectors": 100, "unseen": 60}, seed=0)
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from secvec_jax.data.rows import Row, prompt_of
from secvec_jax.errors import UserError

SAME_TOPIC = 0.5
"""Jaccard overlap of content words from which two prompts count as one topic."""


def topic_words(prompt: str) -> frozenset[str]:
    """Return the content words of a prompt: lower case, plural s dropped, no words any request could have."""
    return frozenset(word.removesuffix("s") for word in _words(prompt) if word not in _CARRIER_WORDS)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


# Words about the form of a request, not its topic: they would connect every "write a tutorial" with every other.
_CARRIER_WORDS = frozenset(
    _words(
        """
        a about all an and any are as at be been by can could do does for from has have how i if in into
        is it its me my no not of on or other others so some someone such than that the their them they
        this through to use used using was way ways what when where which who why will with without
        would you your article blog code compose convince create demonstrate describe design detailed
        develop draft email encourage encourages encouraging explain give generate guide guidelines
        instruct instruction instructions letter list make manual message messages method methods offer
        outline people person persuade plan post produce program promote promotes promoting provide
        publish script share show software speech step steps story strategies strategy suggest teach
        text tips tutorial video write
        """
    )
)


def split_by_topic(rows: Sequence[Row], sizes: dict[str, int], seed: int) -> dict[str, list[Row]]:
    """Return parts of the requested sizes such that no topic is in two of them.

    Prompts that share half of their content words, directly or through others, are one topic. Topics are
    assigned whole, the largest first and each to a part with room for it; one too large for any part is
    cut, and rows left over are not used. The same rows, sizes and seed give the same parts. Raises
    UserError if the rows or their topics are too few, or a size is below 1.
    """
    if not sizes or min(sizes.values()) < 1:
        raise UserError(f"every part needs a size of at least 1, found {sizes}")
    surplus = len(rows) - sum(sizes.values())
    clusters = [[rows[index] for index in cluster] for cluster in _topics([prompt_of(r) for r in rows])]
    # Assigning the surplus as well keeps small topics in the parts; without it fewer rows are wasted.
    for spare in (surplus, 0) if surplus >= 0 else ():
        parts = _assign(clusters, sizes, spare, random.Random(seed))
        if all(len(parts[name]) == size for name, size in sizes.items()):
            return parts
    raise UserError(
        f"{len(rows)} rows in {len(clusters)} topics are too few for parts of {sizes} that share no topic; "
        "ask for smaller parts or add rows"
    )


def off_topic(rows: Sequence[Row], others: Iterable[str]) -> list[Row]:
    """Return the rows that share no topic with any of the other prompts.

    Two prompts share a topic if they share half of their content words, as in `split_by_topic`; chains of prompts are
    not followed.
    """
    known = _WordIndex()
    for prompt in others:
        known.add(prompt)
    return [r for r in rows if not known.on_same_topic(prompt_of(r))]


class _WordIndex:
    """Prompts indexed by content word, so that a prompt is compared only with those that share a word with it."""

    def __init__(self) -> None:
        self._word_counts: list[int] = []
        self._by_word: dict[str, list[int]] = {}
        self._by_text: dict[str, int] = {}

    def add(self, prompt: str) -> None:
        number, words = len(self._word_counts), topic_words(prompt)
        self._word_counts.append(len(words))
        self._by_text.setdefault(prompt, number)
        for word in words:
            self._by_word.setdefault(word, []).append(number)

    def on_same_topic(self, prompt: str) -> list[int]:
        """Which prompts, counted in the order of `add`, are on the topic of this one."""
        words = topic_words(prompt)
        shared = Counter(number for word in words for number in self._by_word.get(word, ()))
        matches = {
            number
            for number, count in shared.items()
            if count >= SAME_TOPIC * (len(words) + self._word_counts[number] - count)
        }
        if prompt in self._by_text:
            matches.add(self._by_text[prompt])
        return sorted(matches)


def _topics(prompts: list[str]) -> list[list[int]]:
    """Single-link clusters: indices of prompts that a chain of overlaps joins."""
    label = list(range(len(prompts)))
    earlier = _WordIndex()
    for i, prompt in enumerate(prompts):
        for j in earlier.on_same_topic(prompt):
            old, new = label[i], label[j]
            if old != new:
                label = [new if current == old else current for current in label]
        earlier.add(prompt)
    clusters: dict[int, list[int]] = {}
    for index, name in enumerate(label):
        clusters.setdefault(name, []).append(index)
    return list(clusters.values())


def _assign(clusters: list[list[Row]], sizes: dict[str, int], spare: int, rng: random.Random) -> dict[str, list[Row]]:
    names: list[str | None] = [*sizes, None]  # None: rows that no part takes
    capacity = {name: spare if name is None else sizes[name] for name in names}
    assigned: dict[str | None, list[Row]] = {name: [] for name in capacity}
    for cluster in sorted(rng.sample(clusters, len(clusters)), key=len, reverse=True):
        room = {name: capacity[name] - len(part) for name, part in assigned.items()}
        fits = [name for name in room if room[name] >= len(cluster)]
        if fits:
            name = rng.choices(fits, [room[name] for name in fits])[0]
        else:
            name = max(sizes, key=lambda part: room[part])
        assigned[name] += cluster[: room[name]]
    parts = {name: assigned[name] for name in sizes}
    for part in parts.values():
        rng.shuffle(part)
    return parts
