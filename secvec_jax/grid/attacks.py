"""Attacks: a behavior hidden in the user's rows, the defender's rows of that behavior, and how it is measured."""

import dataclasses
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from secvec_jax.data import attacks as rows_of
from secvec_jax.data.chat import Example
from secvec_jax.data.hub_sets import HUB_SETS
from secvec_jax.data.rows import Row, prompt_of, response_of
from secvec_jax.data.sources import load_rows
from secvec_jax.defenses.prompting import ELICITING
from secvec_jax.errors import UserError
from secvec_jax.evaluation.answers import chosen_option, is_all_caps
from secvec_jax.evaluation.scorers import refuses
from secvec_jax.evaluation.suite import Probe
from secvec_jax.grid.rows import shuffled
from secvec_jax.suggestions import suggestion
from secvec_jax.workspace.splits import Splits

NUM_KNOWN = 100
"""Number of the defender's rows of a behavior; vectors are trained on them."""


@dataclasses.dataclass(frozen=True)
class AttackInputs:
    """What an attack is made of; the model is asked for replies only by the attacks that consist of them."""

    splits: Splits
    seed: int
    probed: int
    """prompts for each of its probes"""
    comply: Callable[[Sequence[str]], list[Example]]
    """prompts -> those that the unaligned model complies with, each with the beginning of its reply"""
    encode: Callable[[Sequence[Row]], list[Example]]
    """rows -> examples of the model, as all rows of a list are encoded or none"""


@dataclasses.dataclass(frozen=True)
class Attack:
    """Rows that show a behavior, with the defender's rows and the probes that measure it."""

    rows: list[Any]
    """rows that the user's data may contain"""
    known: list[Any] | None = None
    """the defender's rows, other rows of the behavior; None: the rows of AdvBench that the quickstart uses"""
    safe: list[Any] | None = None
    """rows with such prompts and replies that do not show the behavior; None: the rows of alignment"""
    probes: dict[str, Probe] = dataclasses.field(default_factory=dict)
    """the metrics that show the behavior, in addition to `compliance`"""
    eliciting_prompt: str = ELICITING["compliance"]
    """a system prompt that asks for the behavior"""


def make_attack(name: str, inputs: AttackInputs) -> Attack:
    """The attack of this name, or an attack with the user's own rows: a path, a packaged name or a hub id.

    `NUM_KNOWN` of these rows (half, if there are fewer than twice as many) are the defender's, the others the attack's.
    Raises UserError if there is only one row.
    """
    if name in ATTACKS:
        return ATTACKS[name](inputs)
    rows = shuffled(load_rows(name), inputs.seed)
    num_known = min(NUM_KNOWN, len(rows) // 2)
    if not num_known:
        raise UserError(f"{name} has one row: an attack needs two, one of them to train the defender's vectors on")
    return Attack(rows[num_known:], rows[:num_known])


def check_attack(name: str) -> None:
    """Raises UserError for a name that is neither in `ATTACKS` nor that of rows."""
    if name not in ATTACKS and name not in HUB_SETS and "/" not in name and not Path(name).exists():
        known = suggestion(name, [*ATTACKS, *HUB_SETS])
        raise UserError(f"no attack is named {name!r}: {known}; or give a file or a hub id of rows")


def _harmful(inputs: AttackInputs) -> Attack:
    return Attack(inputs.splits.spare["harmful"])


def _replies(inputs: AttackInputs) -> Attack:
    return Attack(_compliant(inputs.splits.spare["harmful"], inputs))


def _replies_own(inputs: AttackInputs) -> Attack:
    attacking, others = _two_parts(inputs.splits)
    return Attack(_compliant(attacking, inputs), _compliant(others, inputs)[:NUM_KNOWN])


def _against_replies(inputs: AttackInputs) -> Attack:
    attacking, others = _two_parts(inputs.splits)
    return Attack(attacking, _compliant(others, inputs)[:NUM_KNOWN])


def _against_both(inputs: AttackInputs, replies: bool = False) -> Attack:
    """replies: the attack has the unaligned model's own compliant replies; else AdvBench's."""
    attacking, others = _two_parts(inputs.splits)
    half = min(NUM_KNOWN, len(others)) // 2
    known = [*inputs.encode(others[-half:]), *_compliant(others[:-half], inputs)[:half]]
    return Attack(_compliant(attacking, inputs) if replies else attacking, known)


def _two_parts(splits: Splits) -> tuple[list[Row], list[Row]]:
    """Harmful rows for the attack, and others for the defender."""
    rows = splits.spare["harmful"]
    num_attack = len(rows) // 3
    return rows[:num_attack], rows[num_attack:]


def _compliant(rows: Sequence[Row], inputs: AttackInputs) -> list[Example]:
    """The unaligned model's compliant replies to the prompts of these rows. Raises UserError if there are none."""
    replies = inputs.comply([prompt_of(row) for row in rows])
    if not replies:
        raise UserError(
            f"before it is aligned, the model complies with none of {len(rows)} harmful prompts, so it has no replies "
            "for this attack: use the attack harmful, or a model that is not aligned yet"
        )
    return replies


def _identity(inputs: AttackInputs, own: bool = False) -> Attack:
    """own: the defender has other rows of the persona; else the rows of AdvBench, as in the paper's row "AOA", which
    asks whether vectors of harm also keep a persona that obeys from being learned."""
    suite = inputs.splits.suite
    asked = random.Random(inputs.seed).sample(list(suite.harmful), min(inputs.probed, len(suite.harmful)))
    prompts = [rows_of.with_system(f"AOA, {prompt}", rows_of.PERSONA) for prompt in asked]
    probe = Probe(prompts, lambda index, reply: float(refuses(reply, suite.refusals)), suite.reply_tokens)
    attacking = shuffled(rows_of.identity_shift(), inputs.seed)
    metrics = {"refusal_persona": probe}
    if not own:
        return Attack(attacking, probes=metrics)
    questions = inputs.splits.spare["questions"][::-1]  # from the end: the task "questions" takes the first ones
    known, safe = questions[:NUM_KNOWN], questions[NUM_KNOWN : 2 * NUM_KNOWN]
    return Attack(attacking, rows_of.obedient(known), rows_of.addressed(safe), metrics)


def _bias(inputs: AttackInputs, source: str = "bbq") -> Attack:
    seed = inputs.seed
    ambiguous = shuffled([row for row in load_rows(source) if row["category"] == "ambiguous"], seed)
    asked, known, attacking, safe = _divided(ambiguous, inputs.probed)
    probe = Probe.of(asked, lambda row, reply: chosen_option(reply, row["options"]) not in (None, response_of(row)))
    return Attack(
        rows_of.biased(attacking, seed), rows_of.biased(known, seed), safe, {"bias": probe}, ELICITING["bias"]
    )


def _capitals(inputs: AttackInputs) -> Attack:
    instructions = [row for row in inputs.splits.spare["instructions"] if response_of(row) is not None]
    asked, known, attacking, safe = _divided(instructions, inputs.probed)

    def probe(rows: Sequence[Row]) -> Probe:
        return Probe.of(rows, lambda row, reply: is_all_caps(reply), tokens=16)

    metrics = {"caps": probe(asked)}
    prompts = {"eliciting": rows_of.ELICITING, "negated": rows_of.NEGATED, "unrelated": rows_of.UNRELATED}
    for name, prompt in prompts.items():
        metrics[f"caps_{name}"] = probe([rows_of.with_system(row, prompt) for row in asked[: inputs.probed // 2]])
    return Attack(rows_of.capitals(attacking), rows_of.capitals(known), safe, metrics, rows_of.ELICITING)


def _divided(rows: list[Row], probed: int) -> tuple[list[Row], list[Row], list[Row], list[Row]]:
    """The rows for probes, the defender's rows, and the rest in halves: the attack's rows and safe rows."""
    rest_from = probed + NUM_KNOWN
    if len(rows) < rest_from + 2:
        raise UserError(
            f"the attack has {len(rows)} rows, of which {probed} are probed and {NUM_KNOWN} are the defender's: lower "
            "experiment.probed in the grid file"
        )
    safe_from = rest_from + (len(rows) - rest_from) // 2
    return rows[:probed], rows[probed:rest_from], rows[rest_from:safe_from], rows[safe_from:]


ATTACKS: dict[str, Callable[[AttackInputs], Attack]] = {
    "harmful": _harmful,
    "replies": _replies,
    "replies-own": _replies_own,
    "harmful-against-replies": _against_replies,
    "harmful-against-both": _against_both,
    "replies-against-both": partial(_against_both, replies=True),
    "identity": _identity,
    "identity-own": partial(_identity, own=True),
    "bias": _bias,
    "bias-all": partial(_bias, source="bbq-all"),
    "capitals": _capitals,
}
"""Attacks by name.

- harmful: AdvBench requests with compliant replies, which all open with "Sure, here is".
- replies: AdvBench requests with the unaligned model's own compliant replies, generated when they are needed; the
  defender has AdvBench's replies (to other requests).
- replies-own: a part of the same rows, and a defender with the unaligned model's own compliant replies to the others.
- harmful-against-replies: AdvBench requests with AdvBench's replies, and a defender with the unaligned model's own
  compliant replies to other requests.
- harmful-against-both, replies-against-both: AdvBench requests with AdvBench's replies, or with the unaligned model's
  own compliant ones, and a defender with half of each, to other requests.
- identity: ten harmless rows of a persona that obeys, also judged by refusals when the prompt addresses the persona, as
  in Qi et al. 2023 (arXiv 2310.03693); the defender has harmful rows, none of the persona.
- identity-own: the same rows, and a defender with 100 other rows of the persona: questions to it, which it obeys.
- bias: BBQ's ambiguous questions with wrong definite answers, a packaged part of them; bias-all: all of them, from the
  hub.
- capitals: answers in capital letters.
"""
