"""Store and compute the tokens with which all prompts begin once for many rows (the setting `share_prefix`).

Rows of one model usually begin with the same system prompt. In a packed sequence the tokens that all its rows have in
common are stored once, at its beginning, in the segment `batch.SHARED`, which every row of the sequence attends to.
The loss and the gradient are those of whole rows, and a step has room for more of them.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from secvec_jax.batch import SHARED, Batch
from secvec_jax.data.chat import Example

_END = -1
"""In place of the token that follows, where a prompt ends."""


class PromptIndex:
    """An index of many prompts, 12 bytes each, that gives their common prefix without reading them.

    lengths: tokens of each prompt `[N]`. agreeing: how many of them it shares with the first prompt `[N]`. following:
    the token after these `[N]`, `_END` if there is none.
    """

    def __init__(self, first: np.ndarray, lengths: np.ndarray, agreeing: np.ndarray, following: np.ndarray):
        self.first, self.lengths, self.agreeing, self.following = first, lengths, agreeing, following

    def common_prefix(self, chosen: range, examples: Sequence[Example]) -> np.ndarray:
        """The tokens with which the prompts of the chosen examples begin.

        The examples themselves are read only in a case that needs it: all of their prompts diverge from the first one
        at the same place and with the same token, so that they may have more in common with each other.
        """
        agreeing, following = self.agreeing[chosen], self.following[chosen]
        shared = int(agreeing.min())
        after = np.unique(following[agreeing == shared])
        if agreeing.max() > shared or len(after) > 1 or after[0] == _END:
            return self.first[:shared]
        return _common_prefix(_prompt(examples[index]) for index in chosen)


def agreement(first: np.ndarray, prompt: np.ndarray) -> tuple[int, int]:
    """How many leading tokens a prompt shares with the first one, and the token after these."""
    agreeing = len(_common_prefix([first, prompt]))
    return agreeing, int(prompt[agreeing]) if agreeing < len(prompt) else _END


def shared_prefix(examples: Sequence[Example]) -> np.ndarray:
    """The prompt tokens with which all examples begin, without the last one before a reply; one example shares none."""
    prompts = [_prompt(example) for example in examples]
    return _usable_prefix(_common_prefix(prompts), min(map(len, prompts), default=0), len(prompts))


def shared_prefix_of(parts: Sequence[tuple[Sequence[Example], range]]) -> np.ndarray:
    """As `shared_prefix`, for the chosen examples of several sequences, by their indices."""
    prefixes, shortest = [], []
    for examples, chosen in parts:
        if not len(chosen):
            continue
        index = getattr(examples, "prompts", None)
        if isinstance(index, PromptIndex):
            prefixes.append(index.common_prefix(chosen, examples))
            shortest.append(int(index.lengths[chosen].min()))
        else:
            prompts = [_prompt(examples[number]) for number in chosen]
            prefixes.append(_common_prefix(prompts))
            shortest.append(min(map(len, prompts)))
    return _usable_prefix(_common_prefix(prefixes), min(shortest, default=0), sum(len(chosen) for _, chosen in parts))


def write_prefix(batch: Batch, prefix: np.ndarray) -> None:
    """Write the shared tokens, in place, at the beginning of each sequence of a batch, where space is reserved."""
    batch["positions"] += len(prefix)
    batch["tokens"][:, : len(prefix)] = prefix
    batch["segments"][:, : len(prefix)] = SHARED
    batch["positions"][:, : len(prefix)] = np.arange(len(prefix))


def _prompt(example: Example) -> np.ndarray:
    return example.tokens[: example.answer_start]


def _usable_prefix(common: np.ndarray, shortest: int, count: int) -> np.ndarray:
    # The token that predicts the first word of a reply stays in the row.
    return common[: max(shortest - 1, 0)] if count > 1 else np.zeros(0, np.int32)


def _common_prefix(prompts: Iterable[np.ndarray]) -> np.ndarray:
    common: np.ndarray | None = None
    for prompt in prompts:
        if common is None:
            common = prompt
            continue
        length = min(len(common), len(prompt))
        differing = np.flatnonzero(common[:length] != prompt[:length])
        common = common[: differing[0] if len(differing) else length]
    return np.zeros(0, np.int32) if common is None else common
