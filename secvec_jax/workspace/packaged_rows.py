"""The default rows of the defender: those of the quickstart and the grid, for a user's own model."""

import random
from collections.abc import Callable, Collection
from functools import cached_property
from pathlib import Path
from typing import Any

from secvec_jax.config import Training
from secvec_jax.data.chat import Example
from secvec_jax.defenses.base import Need
from secvec_jax.defenses.prompting import ELICITING
from secvec_jax.model.hub import Model
from secvec_jax.workspace.own_replies import OPENING, as_json, from_json, greedy_openings, stored_examples
from secvec_jax.workspace.result_cache import cached_result, inputs_of
from secvec_jax.workspace.splits import PACKAGED_SEED, Sizes, Splits, make_splits

CONTENTS: dict[Need, str] = {
    "safe rows": "refusals of AdvBench, StrongREJECT and JailbreakBench prompts, and the model's own replies to as "
    "many benign prompts",
    "harmful rows": "AdvBench",
    "benign rows": "instructions, some with the harmful rows' opening, and questions",
    "contrast rows": "refusals of AdvBench, StrongREJECT and JailbreakBench prompts",
    "eliciting prompt": ELICITING["compliance"],
}
"""The needs with packaged rows, and what these are."""


class PackagedRows:
    """The packaged rows for a model, made on first use.

    They are drawn with one seed, so that vectors and defenses get neither rows that `train.py align` trains on nor
    prompts of audits. training: how they are encoded, and the seed by which safe rows are shuffled. The model's own
    replies are kept in the cache folder, and in `file`, if there is one. show: called with the number of replies,
    returns their progress callback. tell: called with what is wrong in the cache. without: prompts to leave out, since
    the model is evaluated on them.
    """

    def __init__(
        self,
        model: Model,
        training: Training,
        file: Path | None = None,
        show: Callable[[int], Callable[[int], None]] = lambda count: lambda done: None,
        without: Collection[str] = (),
        tell: Callable[[str], None] = lambda text: None,
    ):
        self._model, self._training, self._file, self._show, self._tell = model, training, file, show, tell
        self._without = frozenset(without)

    def sources(self) -> dict[Need, Callable[[], Any]]:
        """{need: function that returns its packaged rows}."""
        return {
            "safe rows": self._safe,
            "harmful rows": lambda: self._splits.vectors,
            "benign rows": lambda: self._splits.keep,
            "contrast rows": lambda: self._splits.refusals[: Sizes().vectors],
            "eliciting prompt": lambda: CONTENTS["eliciting prompt"],
        }

    def alignment(self) -> dict[str, list[Example]]:
        """The rows of the quickstart's alignment: "harmful" prompts with refusals, and "benign" ones with the model's
        own replies."""
        return {"harmful": self._splits.refusals, "benign": self._base_replies()}

    def held_out(self) -> dict[str, list[Example]]:
        """Rows, "harmful" and "benign", that none of the others has; half of the benign rows open like the harmful
        ones."""
        suite = self._splits.suite
        return {
            "harmful": list(suite.harmful_targets),
            "benign": [*suite.benign_targets, *suite.opening_targets],
        }

    @cached_property
    def _splits(self) -> Splits:
        return make_splits(self._model, Sizes(), self._training, PACKAGED_SEED)

    def _safe(self) -> list[Example]:
        """Refusals and the model's own replies, shuffled so that the first few are of both."""
        rows = [row for group in self.alignment().values() for row in group]
        return random.Random(self._training.seed).sample(rows, len(rows))

    def _base_replies(self) -> list[Example]:
        prompts = [prompt for prompt in self._splits.align_benign if prompt not in self._without]

        refusals = self._splits.suite.refusals

        def generate() -> list[list[Any]]:
            show = self._show(len(prompts))
            return as_json(greedy_openings(self._model, prompts, refusals, show))

        def made_once() -> list[Example]:
            inputs = [*inputs_of(self._model), prompts, list(refusals), OPENING]
            return from_json(cached_result("own replies", inputs, generate, self._tell))

        return made_once() if self._file is None else stored_examples(self._file, made_once)
