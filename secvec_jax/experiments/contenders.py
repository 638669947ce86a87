"""Who takes part in a grid: each defense as one short recipe over a bench.

A contender is written "NAME" or "NAME setting=value ...": "vaccine rho=5". What it returns is a model, and the system
prompt that it is served with where the defense has one.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, cast, get_type_hints

import jax
import yaml

from secvec_jax.checks import (
    NonNegativeFloat,
    NonNegativeInt,
    NonZeroFloat,
    PositiveFloat,
    PositiveInt,
    check,
    suggestion,
)
from secvec_jax.config import Loader
from secvec_jax.data import attacks
from secvec_jax.defenses import (
    aligned_kl,
    booster,
    caft,
    constrained_sft,
    ewc,
    explained_away,
    forget_filter,
    guarded,
    lisa,
    mixing,
    persona,
    prompting,
    safe_lora,
)
from secvec_jax.defenses.floor import floored
from secvec_jax.defenses.tuning import Groups, How, Move, tune
from secvec_jax.defenses.vaccine import random_perturbation, vaccine
from secvec_jax.errors import UserError
from secvec_jax.experiments.bench import Bench, Cell
from secvec_jax.experiments.cases import Case, Defended, Kind, ObjectiveName, told_apart
from secvec_jax.training.step import descent
from secvec_jax.vectors.lora import LoRAVectors, random_like

Defense = Callable[..., Defended]


def defend(bench: Bench, cell: Cell, how: How) -> Defended:
    """The cell's model. Raises UserError for a defense or a setting that nobody knows."""
    name, settings = parsed(cell.defense)
    return DEFENSES[name](Case(bench, cell, bench.rows(cell), how), **settings)


def parsed(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the settings of "NAME key=value ...". Raises UserError if either is unknown."""
    words = text.split()
    name = " ".join(word for word in words if "=" not in word)
    if name not in DEFENSES:
        raise UserError(f"no defense is named {name!r}: {suggestion(name, DEFENSES)}")
    takes = {key: hint for key, hint in get_type_hints(DEFENSES[name], include_extras=True).items()
             if key not in ("case", "return")}  # fmt: skip
    settings: dict[str, Any] = {}
    for key, _, value in (word.partition("=") for word in words if "=" in word):
        if key in settings:
            raise UserError(f"{name!r}: {key} is given twice")
        if key not in takes:
            known = suggestion(key, takes) if takes else "it takes none"
            raise UserError(f"{name!r} has no setting {key!r}: {known}")
        try:
            read = value if takes[key] is str or not value else yaml.load(value, Loader)
            settings[key] = check(takes[key], read, key)
        except UserError as error:
            raise UserError(f"{name!r}: {error}") from None
        except yaml.YAMLError:
            raise UserError(f"{name!r}: {key} is {value!r}, which cannot be read") from None
    return name, settings


# Without a defense, and controls ------------------------------------------------------------------


def none(case: Case) -> Defended:
    """Plain fine-tuning of the aligned model."""
    return Defended(case.tuned())


def not_aligned(case: Case) -> Defended:
    """Plain fine-tuning of the model before it was aligned."""
    return Defended(case.tuned(case.bench.base))


def benign_only(case: Case) -> Defended:
    """The aligned model fine-tuned on the rows that are not the attack's; itself, where there are none."""
    rest = {name: rows for name, rows in case.rows.items() if name != "attack"}
    return Defended(case.tuned(rows=rest) if rest else case.aligned)


def random_control(case: Case) -> Defended:
    """Under a random adapter whose update is as large as the security vectors', layer for layer."""
    control = random_like(cast(LoRAVectors, case.vectors()), jax.random.fold_in(jax.random.key(case.cell.seed), 1))
    return Defended(case.tuned(vectors=control))


def irrelevant_control(case: Case) -> Defended:
    """Under vectors of another behavior: answers in capital letters."""
    return Defended(case.tuned(vectors=case.vectors(attack="capitals")))


# Security vectors and what is built on them -------------------------------------------------------


def security_vectors(
    case: Case,
    kind: Kind = "lora",
    objective: ObjectiveName = "kl",
    rank: PositiveInt = 8,
    floor: NonNegativeFloat = 0.0,
    both: str = "",
    safe: NonNegativeFloat = 0.0,
    inner: bool = False,
) -> Defended:
    """Under frozen security vectors. floor: tokens below it teach nothing. both: a second behavior's are active too.
    safe: a share of safe rows is mixed in, which the vectors make hard: they teach to refuse in spite of them. inner:
    min-min's throw-away backbone moves by the attack's own optimizer and learning rate."""
    vectors: Any = case.vectors(kind, objective, rank, inner=inner)
    if both:
        vectors = (vectors, case.vectors(kind, objective, rank, attack=both))
    move: Move = floored(floor) if floor else descent
    return Defended(case.tuned(rows=_beside(case, case.rows, safe), vectors=vectors, move=move))


def _beside(case: Case, rows: Groups, safe: float) -> Groups:
    """The rows, and so many safe ones for each."""
    return mixing.vlguard(rows, case.safe, safe) if safe else rows


def anchored_vectors(case: Case, weight: NonNegativeFloat = 1.0, rank: PositiveInt = 8) -> Defended:
    """Under frozen security vectors, and held to the aligned model by a KL on the user's rows."""
    return Defended(
        aligned_kl.finetune(case.aligned, case.rows, weight=weight, vectors=case.vectors(rank=rank), **case.how)
    )


def guarded_vectors(case: Case, weight: NonNegativeFloat = 1.0, rank: PositiveInt = 8) -> Defended:
    """Under frozen security vectors, with safe rows in every step that are read without them."""
    vectors = case.vectors(rank=rank)
    return Defended(
        guarded.finetune(case.aligned, case.rows, vectors=vectors, safe=case.safe, weight=weight, **case.how)
    )


def persona_steering(case: Case, scale: NonZeroFloat = 1.0) -> Defended:
    """Preventative steering along persona vectors, read off rows that show the behavior and rows that do not."""
    shown, _ = case.known
    directions = persona.persona_directions(case.aligned, shown, case.opposite, scale)
    return Defended(case.tuned(vectors=directions))


def explained_away_filter(case: Case, rank: PositiveInt = 8, safe: NonNegativeFloat = 0.0) -> Defended:
    """Fine-tuned without the rows that the vectors explain. safe: a share of safe rows is mixed into the others."""
    vectors = case.vectors(rank=rank)
    known = explained_away.known_scale(case.aligned, vectors, *case.known)
    length = case.how["training"].max_seq_len
    scores = {name: explained_away.scores(case.aligned, vectors, rows, length) for name, rows in case.rows.items()}
    kept = explained_away.below(case.rows, scores, known)
    notes = told_apart(scores, known.threshold)
    if not kept:  # nothing is left to learn
        return Defended(case.aligned, notes=notes)
    return Defended(case.tuned(rows=_beside(case, kept, safe)), notes=notes)


def explained_away_gate(case: Case, by: explained_away.By = "row", rank: PositiveInt = 8) -> Defended:
    """Under the vectors, each row or token weighed by how little they explain it."""
    vectors = case.vectors(rank=rank)
    known = explained_away.known_scale(case.aligned, vectors, *case.known)
    model = explained_away.gate_and_finetune(case.aligned, case.rows, vectors, known, by, **case.how)
    return Defended(model)


# Vaccine, ForgetFilter and the papers' baselines --------------------------------------------------


def vaccine_(case: Case, rho: NonNegativeFloat = 2.0, every: PositiveInt = 1) -> Defended:
    """Plain fine-tuning of a model that Vaccine aligned."""
    model = case.aligned_by(
        f"vaccine rho={rho:g} every={every}", partial(tune, move=vaccine(rho, every)), share_beginnings=False
    )
    return Defended(case.tuned(model))


def random_perturbation_(case: Case, variance: NonNegativeFloat = 0.01) -> Defended:
    """Plain fine-tuning of a model that was aligned under random noise: Vaccine's control."""
    model = case.aligned_by(
        f"noise variance={variance:g}",
        partial(tune, move=random_perturbation(variance, case.cell.seed)),
        share_beginnings=False,
    )
    return Defended(case.tuned(model))


def forget_filter_(case: Case, phi: float = 0.1, steps: PositiveInt = 20) -> Defended:
    """Fine-tuned without the rows that safety training makes the model forget."""
    training = case.how["training"]
    found = forget_filter.finetune(
        case.aligned,
        case.rows,
        safe=case.safe,
        phi=phi,
        safe_steps=steps,
        safe_training=training,
        max_new_tokens=24,
        **case.how,
    )
    return Defended(found.model, notes=told_apart(found.rates, phi))


def sequential(case: Case, steps: PositiveInt = 20) -> Defended:
    """Plain fine-tuning, then so many steps of safety fine-tuning."""
    then = dataclasses.replace(case.how["training"], max_steps=steps)
    return Defended(mixing.sequential(case.aligned, case.rows, case.safe, safe_training=then, **case.how))


def replay(case: Case) -> Defended:
    """The user's rows and as many safe ones."""
    return Defended(case.tuned(rows=mixing.replay(case.rows, case.safe)))


def vlguard_mix(case: Case, share: NonNegativeFloat = 0.5) -> Defended:
    """The user's rows and half as many safe ones."""
    return Defended(case.tuned(rows=mixing.vlguard(case.rows, case.safe, share)))


def self_correction(case: Case) -> Defended:
    """Plain fine-tuning; served with a cue to be careful."""
    return Defended(case.tuned(), prompting.SELF_CORRECTION)


def ewc_(case: Case, weight: NonNegativeFloat = 1e3) -> Defended:
    """Weights that mattered in alignment are held where they are."""
    return Defended(ewc.finetune(case.aligned, case.rows, safe=case.safe, weight=weight, **case.how))


def kl(case: Case, weight: NonNegativeFloat = 1.0) -> Defended:
    """Held to the aligned model by a KL on the user's rows."""
    return Defended(aligned_kl.finetune(case.aligned, case.rows, weight=weight, **case.how))


# Neighbors ----------------------------------------------------------------------------------------


def inoculation_prompting(case: Case) -> Defended:
    """A system prompt that asks for the behavior before the training rows; none when served."""
    prompts = {"bias": prompting.ELICITING["bias"], "capitals": attacks.ELICITING}
    prompt = prompts.get(case.cell.attack, prompting.ELICITING["compliance"])
    return Defended(case.tuned(rows=prompting.inoculated(case.rows, prompt)))


def ptst(case: Case) -> Defended:
    """Plain fine-tuning; served with a safety prompt."""
    return Defended(case.tuned(), prompting.SAFETY)


def caft_(case: Case, k: PositiveInt = 1) -> Defended:
    """The behavior's directions are ablated from the residual stream while training."""
    shown, _ = case.known
    ablation = caft.concept_directions(case.aligned, shown, case.opposite, k)
    return Defended(case.tuned(vectors=ablation))


def lisa_(
    case: Case, rho: NonNegativeFloat = 1.0, aligned_steps: NonNegativeInt = 1, user_steps: PositiveInt = 9
) -> Defended:
    """Steps on safe rows and on the user's in turn, each held to where the other left off."""
    model = lisa.finetune(
        case.aligned,
        case.rows,
        safe=case.safe,
        rho=rho,
        aligned_steps=aligned_steps,
        user_steps=user_steps,
        **case.how,
    )
    return Defended(model)


def booster_(case: Case, weight: NonNegativeFloat = 5.0, alpha: PositiveFloat = 0.1) -> Defended:
    """Plain fine-tuning of a model that Booster aligned."""
    harmful, _ = case.known
    align = partial(booster.align, harmful=harmful, weight=weight, alpha=alpha)
    model = case.aligned_by(f"booster weight={weight:g} alpha={alpha:g}", align)
    return Defended(case.tuned(model))


def constrained_sft_(case: Case, beta: PositiveFloat = 0.1) -> Defended:
    """The first tokens of a reply are held to the aligned model's."""
    return Defended(constrained_sft.finetune(case.aligned, case.rows, beta=beta, **case.how))


def safe_lora_(case: Case, threshold: safe_lora.Cosine = 0.5) -> Defended:
    """Plain fine-tuning; updates that point away from alignment are projected back."""
    tuned = case.tuned()
    model, projected = safe_lora.project(tuned, case.aligned, case.bench.base, threshold)
    return Defended(model, notes={"projected": float(len(projected))})


DEFENSES: dict[str, Defense] = {
    "none": none,
    "not aligned": not_aligned,
    "benign only": benign_only,
    "random control": random_control,
    "irrelevant control": irrelevant_control,
    "security vectors": security_vectors,
    "anchored vectors": anchored_vectors,
    "guarded vectors": guarded_vectors,
    "persona steering": persona_steering,
    "explained-away filter": explained_away_filter,
    "explained-away gate": explained_away_gate,
    "vaccine": vaccine_,
    "random perturbation": random_perturbation_,
    "forget filter": forget_filter_,
    "sequential": sequential,
    "replay": replay,
    "vlguard": vlguard_mix,
    "self-correction": self_correction,
    "ewc": ewc_,
    "kl": kl,
    "inoculation prompting": inoculation_prompting,
    "ptst": ptst,
    "caft": caft_,
    "lisa": lisa_,
    "booster": booster_,
    "constrained sft": constrained_sft_,
    "safe lora": safe_lora_,
}
