"""The prompts of an audit whose replies changed most."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from secvec_jax.data.rows import last_user_text
from secvec_jax.evaluation.audit_measures import AuditPrompts, Measured, Prompt, lengths_given
from secvec_jax.evaluation.prefill import Beginning
from secvec_jax.evaluation.replies import clip
from secvec_jax.evaluation.suite import Outcomes
from secvec_jax.turns import answer_of

_CHANGES = 10
"""Number of prompts to show, those that changed most."""


@dataclasses.dataclass(frozen=True)
class Change:
    """A prompt whose replies changed, each text one clipped line."""

    kind: Literal["harmful", "benign"]
    prompt: str
    what: str
    before: str
    after: str


def changes(
    prompts: AuditPrompts,
    before: Measured,
    after: Measured,
    beginnings: Sequence[Beginning | None],
    kl: Sequence[float] | None,
) -> tuple[Change, ...]:
    """Return the prompts whose replies changed most: those with a different verdict, most changed verdicts first.

    kl: of the first benign prompts' replies; None: it was not measured.
    """
    chosen, lengths = lengths_given(beginnings)
    ranked: list[tuple[float, Change]] = []
    for index, prompt in enumerate(prompts.harmful):
        differences = _verdict_change(before.metrics, after.metrics, index, _REPLY_VERDICTS)
        weight = 2.0 * len(differences)
        if index in chosen:
            at = chosen.index(index)
            for length in lengths:
                words = {f"prefill_{length}": (f"after {length} tokens turns away", f"after {length} tokens goes on")}
                differences += _binary_changes(before.metrics, after.metrics, at, words)
        ranked.append((weight + len(differences), _change("harmful", prompt, differences, before, after, index)))
    for index, prompt in enumerate(prompts.benign):
        differences = _binary_changes(before.metrics, after.metrics, index, {"over_refusal": ("refuses", "answers")})
        distance = 0.0 if kl is None or index >= len(kl) else min(kl[index], 1.0)
        ranked.append((3.0 * len(differences) + distance, _change("benign", prompt, differences, before, after, index)))
    changed = [(weight, change) for weight, change in ranked if change.what]
    return tuple(change for _, change in sorted(changed, key=lambda pair: -pair[0])[:_CHANGES])


_REPLY_VERDICTS = {"refusal": "refuses", "compliance": "complies", "unclear": "is unclear"}


def _verdict_change(before: Outcomes, after: Outcomes, index: int, words: Mapping[str, str]) -> list[str]:
    """The verdict before and after, of several that exclude each other; empty if it is the same."""
    was, now = (next(word for metric, word in words.items() if side[metric][index]) for side in (before, after))
    return [] if was == now else [f"{was} → {now}"]


def _binary_changes(before: Outcomes, after: Outcomes, index: int, words: Mapping[str, tuple[str, str]]) -> list[str]:
    """For each metric that is 0 or 1 and changed, the words for 1 and 0, in the order of the change."""
    changes = []
    for metric, (yes, no) in words.items():
        was, now = before[metric][index], after[metric][index]
        if was != now:
            changes.append(f"{yes if was else no} → {yes if now else no}")
    return changes


def _change(
    kind: Literal["harmful", "benign"],
    prompt: Prompt,
    differences: Sequence[str],
    before: Measured,
    after: Measured,
    index: int,
) -> Change:
    lines = [clip(answer_of(getattr(side, f"{kind}_replies")[index])) for side in (before, after)]
    return Change(kind, clip(last_user_text(prompt), 70), "; ".join(differences), *lines)
