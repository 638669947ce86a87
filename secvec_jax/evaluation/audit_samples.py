"""The reply of each model of an audit to each prompt, with its scores, for logs in other tools' formats."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from secvec_jax.evaluation.audit_judge import Grades
from secvec_jax.evaluation.audit_measures import AuditPrompts, Measured, Prompt, lengths_given
from secvec_jax.evaluation.prefill import Beginning


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt and one model's reply to it.

    role: before, after or reference. number: of the prompt among those of its kind, from 1. scores: metric -> this
    prompt's number, for the metrics that were measured on this prompt.
    """

    role: str
    model: str
    kind: Literal["harmful", "benign"]
    number: int
    prompt: Prompt
    reply: str
    scores: Mapping[str, float]


_OF_HARMFUL = ("refusal", "compliance", "unclear", "refusal_system", "compliance_system", "unclear_system")
_OF_BENIGN = ("over_refusal", "over_refusal_system", "kl")


def samples_of(
    prompts: AuditPrompts,
    measured_by_role: Mapping[str, Measured],
    names: Mapping[str, str],
    beginnings: Sequence[Beginning | None],
    grades: Grades | None = None,
) -> tuple[Sample, ...]:
    """Return a sample for each prompt and model.

    measured_by_role, names: the measurements of each role's model, and its name. beginnings: the prefills of the
    harmful prompts. grades: the judge's, if any.
    """
    begun, lengths = lengths_given(beginnings)
    prefilled = [f"prefill_{length}" for length in lengths]
    samples: list[Sample] = []
    for role, measured in measured_by_role.items():
        metrics = measured.metrics
        for index, prompt in enumerate(prompts.harmful):
            scores = {name: metrics[name][index] for name in _OF_HARMFUL if name in metrics}
            if index in begun:
                scores |= {name: metrics[name][begun.index(index)] for name in prefilled}
            grade = None if grades is None else grades[role][index]
            if grade is not None:
                scores["harm_score"] = float(grade)
            reply = measured.harmful_replies[index]
            samples.append(Sample(role, names[role], "harmful", index + 1, prompt, reply, scores))
        for index, prompt in enumerate(prompts.benign):
            # kl is of the first prompts only.
            scores = {name: metrics[name][index] for name in _OF_BENIGN if index < len(metrics.get(name, ()))}
            reply = measured.benign_replies[index]
            samples.append(Sample(role, names[role], "benign", index + 1, prompt, reply, scores))
    return tuple(samples)
