"""Who takes part in a grid: each defense as one short recipe over a bench.

A contender is written "NAME" or "NAME setting=value ...": "vaccine rho=5". What it returns is a model, and the system
prompt that it is served with where the defense has one.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from secvec_jax.data import attacks
from secvec_jax.defenses import (
    aligned_kl,
    booster,
    caft,
    constrained_sft,
    ewc,
    explained_away,
    forget_filter,
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
from secvec_jax.evaluation.statistics import auroc, precision_recall_f1
from secvec_jax.experiments.bench import Bench, Cell
from secvec_jax.model.hub import Model
from secvec_jax.training.step import descent
from secvec_jax.vectors.kinds import Spec, Vectors
from secvec_jax.vectors.lora import LoRA, random_like
from secvec_jax.vectors.prompt import SoftPrompt
from secvec_jax.vectors.steering import Steering


class Defended(NamedTuple):
    """What a defense hands over. notes: numbers of its own, such as how well a filter told rows apart."""

    model: Model
    system: str | None = None
    notes: Mapping[str, float] = MappingProxyType({})


class Case(NamedTuple):
    """What a defense is given."""

    bench: Bench
    cell: Cell
    rows: Groups
    how: How

    @property
    def aligned(self) -> Model:
        return self.bench.aligned

    @property
    def safe(self) -> list[Any]:
        return self.bench.safe_for(self.cell.attack)

    @property
    def opposite(self) -> list[Any]:
        return self.bench.opposite(self.cell.attack)[:100]

    @property
    def known(self) -> tuple[list[Any], list[Any]]:
        return self.bench.known(self.cell.attack)


Defense = Callable[..., Defended]

KINDS: dict[str, Spec] = {"lora": LoRA(), "steering": Steering(scale=8.0), "prompt": SoftPrompt(scale=8.0)}
"""The shapes of each kind's vectors, chosen by the loss of development rows."""


def defend(bench: Bench, cell: Cell, how: How) -> Defended:
    """The cell's model. Raises UserError for a defense or a setting that nobody knows."""
    name, settings = parsed(cell.defense)
    return DEFENSES[name](Case(bench, cell, bench.rows(cell), how), **settings)


def parsed(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the settings of "NAME key=value ...". Raises UserError if either is unknown."""
    words = text.split()
    name = " ".join(word for word in words if "=" not in word)
    if name not in DEFENSES:
        raise UserError(f"no defense is named {name!r}: use one of {', '.join(DEFENSES)}")
    takes = inspect.signature(DEFENSES[name]).parameters
    settings = {}
    for key, _, value in (word.partition("=") for word in words if "=" in word):
        if key not in takes or key == "case":
            known = ", ".join(k for k in takes if k != "case") or "none"
            raise UserError(f"{name!r} has no setting {key!r}: it takes {known}")
        kind = type(takes[key].default)
        try:
            settings[key] = kind(value)
        except ValueError as error:
            raise UserError(f"{name!r}: {key} is {value!r}, it must be {kind.__name__}") from error
    return name, settings


# Without a defense, and controls ------------------------------------------------------------------


def none(case: Case) -> Defended:
    """Plain fine-tuning of the aligned model."""
    return Defended(tune(case.aligned, case.rows, **case.how))


def not_aligned(case: Case) -> Defended:
    """Plain fine-tuning of the model before it was aligned."""
    return Defended(tune(case.bench.base, case.rows, **case.how))


def benign_only(case: Case) -> Defended:
    """The aligned model fine-tuned on the rows that are not the attack's; itself, where there are none."""
    rest = {name: rows for name, rows in case.rows.items() if name != "attack"}
    return Defended(tune(case.aligned, rest, **case.how) if rest else case.aligned)


def random_control(case: Case) -> Defended:
    """Under a random adapter whose update is as large as the security vectors', layer for layer."""
    control = random_like(_vectors(case), jax.random.fold_in(jax.random.key(case.cell.seed), 1))
    return Defended(tune(case.aligned, case.rows, vectors=control, **case.how))


def irrelevant_control(case: Case) -> Defended:
    """Under vectors of another behavior: answers in capital letters."""
    return Defended(tune(case.aligned, case.rows, vectors=_vectors(case, attack="capitals"), **case.how))


# Security vectors and what is built on them -------------------------------------------------------


def security_vectors(
    case: Case, kind: str = "lora", objective: str = "kl", rank: int = 8, floor: float = 0.0, both: str = ""
) -> Defended:
    """Under frozen security vectors. floor: tokens below it teach nothing. both: a second behavior's are active too."""
    vectors: Any = _vectors(case, kind, objective, rank)
    if both:
        vectors = (vectors, _vectors(case, kind, objective, rank, attack=both))
    move: Move = floored(floor) if floor else descent
    return Defended(tune(case.aligned, case.rows, vectors=vectors, move=move, **case.how))


def anchored_vectors(case: Case, weight: float = 1.0, rank: int = 8) -> Defended:
    """Under frozen security vectors, and held to the aligned model by a KL on the user's rows."""
    return Defended(
        aligned_kl.finetune(case.aligned, case.rows, weight=weight, vectors=_vectors(case, rank=rank), **case.how)
    )


def persona_steering(case: Case, scale: float = 1.0) -> Defended:
    """Preventative steering along persona vectors, read off rows that show the behavior and rows that do not."""
    shown, _ = case.known
    directions = persona.persona_directions(case.aligned, shown, case.opposite, scale)
    return Defended(tune(case.aligned, case.rows, vectors=directions, **case.how))


def explained_away_filter(case: Case, rank: int = 8) -> Defended:
    """Fine-tuned without the rows that the vectors explain."""
    vectors = _vectors(case, rank=rank)
    known = explained_away.known_scale(case.aligned, vectors, *case.known)
    scores = {name: explained_away.scores(case.aligned, vectors, rows) for name, rows in case.rows.items()}
    notes = _told_apart(scores, known.threshold)
    if all(score > known.threshold for some in scores.values() for score in some):
        return Defended(case.aligned, notes=notes)  # nothing is left to learn
    return Defended(
        explained_away.filter_and_finetune(case.aligned, case.rows, vectors, known, **case.how), notes=notes
    )


def explained_away_gate(case: Case, by: str = "row", rank: int = 8) -> Defended:
    """Under the vectors, each row or token weighed by how little they explain it."""
    vectors = _vectors(case, rank=rank)
    known = explained_away.known_scale(case.aligned, vectors, *case.known)
    model = explained_away.gate_and_finetune(case.aligned, case.rows, vectors, known, by, **case.how)
    return Defended(model)


# Vaccine, ForgetFilter and the papers' baselines --------------------------------------------------


def vaccine_(case: Case, rho: float = 2.0, every: int = 1) -> Defended:
    """Plain fine-tuning of a model that Vaccine aligned."""
    model = _aligned_by(case, f"vaccine rho={rho:g} every={every}", vaccine(rho, every))
    return Defended(tune(model, case.rows, **case.how))


def random_perturbation_(case: Case, variance: float = 0.01) -> Defended:
    """Plain fine-tuning of a model that was aligned under random noise: Vaccine's control."""
    model = _aligned_by(case, f"noise variance={variance:g}", random_perturbation(variance, case.cell.seed))
    return Defended(tune(model, case.rows, **case.how))


def forget_filter_(case: Case, phi: float = 0.1, steps: int = 20) -> Defended:
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
    return Defended(found.model, notes=_told_apart(found.rates, phi))


def sequential(case: Case, steps: int = 20) -> Defended:
    """Plain fine-tuning, then so many steps of safety fine-tuning."""
    then = dataclasses.replace(case.how["training"], steps=steps)
    return Defended(mixing.sequential(case.aligned, case.rows, case.safe, safe_training=then, **case.how))


def replay(case: Case) -> Defended:
    """The user's rows and as many safe ones."""
    return Defended(tune(case.aligned, mixing.replay(case.rows, case.safe), **case.how))


def vlguard_mix(case: Case, share: float = 0.5) -> Defended:
    """The user's rows and half as many safe ones."""
    return Defended(tune(case.aligned, mixing.vlguard(case.rows, case.safe, share), **case.how))


def self_correction(case: Case) -> Defended:
    """Plain fine-tuning; served with a cue to be careful."""
    return Defended(tune(case.aligned, case.rows, **case.how), prompting.SELF_CORRECTION)


def ewc_(case: Case, weight: float = 1e3) -> Defended:
    """Weights that mattered in alignment are held where they are."""
    return Defended(ewc.finetune(case.aligned, case.rows, safe=case.safe, weight=weight, **case.how))


def kl(case: Case, weight: float = 1.0) -> Defended:
    """Held to the aligned model by a KL on the user's rows."""
    return Defended(aligned_kl.finetune(case.aligned, case.rows, weight=weight, **case.how))


# Neighbors ----------------------------------------------------------------------------------------


def inoculation_prompting(case: Case) -> Defended:
    """A system prompt that asks for the behavior before the training rows; none when served."""
    prompts = {"bias": prompting.ELICITING["bias"], "capitals": attacks.ELICITING}
    prompt = prompts.get(case.cell.attack, prompting.ELICITING["compliance"])
    return Defended(tune(case.aligned, {n: prompting.inoculated(r, prompt) for n, r in case.rows.items()}, **case.how))


def ptst(case: Case) -> Defended:
    """Plain fine-tuning; served with a safety prompt."""
    return Defended(tune(case.aligned, case.rows, **case.how), prompting.SAFETY)


def caft_(case: Case, k: int = 1) -> Defended:
    """The behavior's directions are ablated from the residual stream while training."""
    shown, _ = case.known
    ablation = caft.concept_directions(case.aligned, shown, case.opposite, k)
    return Defended(tune(case.aligned, case.rows, vectors=ablation, **case.how))


def lisa_(case: Case, rho: float = 1.0, aligned_steps: int = 1, user_steps: int = 9) -> Defended:
    """Steps on safe rows and on the user's in turn, each held to where the other left off."""
    settings = {"rho": rho, "aligned_steps": aligned_steps, "user_steps": user_steps}
    return Defended(lisa.finetune(case.aligned, case.rows, safe=case.safe, **settings, **case.how))


def booster_(case: Case, weight: float = 5.0, alpha: float = 0.1) -> Defended:
    """Plain fine-tuning of a model that Booster aligned."""
    harmful, _ = case.known

    def make(stage: Any) -> Model:
        recipe = case.bench.recipe
        training = dataclasses.replace(recipe.align_training, seed=case.cell.seed)
        how = How(task=recipe.align_task, training=training, on_step=stage.on_step())
        return booster.align(case.bench.base, case.bench.safe, harmful=harmful, weight=weight, alpha=alpha, **how)

    model = case.bench.model(f"booster weight={weight:g} alpha={alpha:g}", make)
    return Defended(tune(model, case.rows, **case.how))


def constrained_sft_(case: Case, beta: float = 0.1) -> Defended:
    """The first tokens of a reply are held to the aligned model's."""
    return Defended(constrained_sft.finetune(case.aligned, case.rows, beta=beta, **case.how))


def safe_lora_(case: Case, threshold: float = 0.5) -> Defended:
    """Plain fine-tuning; updates that point away from alignment are projected back."""
    tuned = tune(case.aligned, case.rows, **case.how)
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


def _told_apart(scores: dict[str, list[float]], threshold: float) -> dict[str, float]:
    """How well scores by kind, high for what is to be dropped, tell the attack's rows from the others."""
    labels = [name == "attack" for name, some in scores.items() for _ in some]
    flat = [score for some in scores.values() for score in some]
    notes = {f"dropped_{name}": sum(s > threshold for s in some) / len(some) for name, some in scores.items()}
    if len(set(labels)) == 2:
        _, _, f1 = precision_recall_f1([score > threshold for score in flat], labels)
        notes |= {"auroc": auroc(flat, labels), "f1": f1}
    return notes


def _vectors(
    case: Case, kind: str = "lora", objective: str = "kl", rank: int = 8, attack: str | None = None
) -> Vectors:
    if kind not in KINDS or objective not in ("kl", "cross_entropy", "min_min"):
        raise UserError(f"no vectors are of kind {kind!r} by {objective!r}: see contenders.KINDS and Phase1")
    spec = dataclasses.replace(KINDS[kind], rank=rank, alpha=2.0 * rank) if kind == "lora" else KINDS[kind]
    phase1 = dataclasses.replace(case.bench.recipe.phase1, objective=objective)
    name = f"{kind} {rank} {objective}" if kind == "lora" else f"{kind} {objective}"
    return case.bench.vectors(attack or case.cell.attack, name, spec, phase1)


def _aligned_by(case: Case, name: str, move: Move) -> Model:
    def make(stage: Any) -> Model:
        recipe = case.bench.recipe
        training = dataclasses.replace(recipe.align_training, seed=case.cell.seed, share_beginnings=False)
        how = How(task=recipe.align_task, training=training, on_step=stage.on_step())
        return tune(case.bench.base, case.bench.safe, move=move, **how)

    return case.bench.model(name, make)
