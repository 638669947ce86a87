"""The table of all defenses, and how grid files write them.

read_defense("none")
read_defense({"name": "vaccine", "rho": 5})     # Vaccine(rho=5.0, every=1)
"""

import dataclasses
import textwrap
from collections.abc import Mapping
from typing import Any

from secvec_jax.arguments import shown
from secvec_jax.checks import defaults_of
from secvec_jax.defenses.aligned_kl import AlignedKL, AnchoredVectors
from secvec_jax.defenses.base import MEANING, Defense, as_yaml
from secvec_jax.defenses.booster import Booster
from secvec_jax.defenses.caft import CAFT
from secvec_jax.defenses.constrained_sft import ConstrainedSFT
from secvec_jax.defenses.controls import BenignOnly, IrrelevantControl, NotAligned, PlainFinetuning, RandomControl
from secvec_jax.defenses.ema import EMA
from secvec_jax.defenses.evidence import EVIDENCE
from secvec_jax.defenses.ewc import EWC
from secvec_jax.defenses.explained_away import ExplainedAwayFilter, ExplainedAwayGate
from secvec_jax.defenses.forget_filter import ForgetFilter
from secvec_jax.defenses.guarded import GuardedVectors
from secvec_jax.defenses.lisa import Lisa
from secvec_jax.defenses.mixing import Replay, Sequential, VLGuard
from secvec_jax.defenses.persona import PersonaSteering
from secvec_jax.defenses.prompting import PTST, InoculationPrompting, SelfCorrection
from secvec_jax.defenses.safe_lora import SafeLoRA
from secvec_jax.defenses.safegrad import SafeGrad
from secvec_jax.defenses.sbr import SBR
from secvec_jax.defenses.security_vectors import SecurityVectors
from secvec_jax.defenses.vaccine import RandomPerturbation, Vaccine
from secvec_jax.errors import UserError
from secvec_jax.suggestions import suggestion

DEFENSES: dict[str, type[Defense]] = {
    defense.name: defense
    for defense in (
        # Plain fine-tuning and controls
        PlainFinetuning,
        NotAligned,
        BenignOnly,
        RandomControl,
        IrrelevantControl,
        # Security vectors and what is built on them
        SecurityVectors,
        AnchoredVectors,
        GuardedVectors,
        PersonaSteering,
        ExplainedAwayFilter,
        ExplainedAwayGate,
        # Vaccine, ForgetFilter and the baselines of these papers
        Vaccine,
        RandomPerturbation,
        ForgetFilter,
        Sequential,
        Replay,
        VLGuard,
        SelfCorrection,
        EWC,
        AlignedKL,
        # Other methods from the literature
        InoculationPrompting,
        PTST,
        CAFT,
        Lisa,
        Booster,
        ConstrainedSFT,
        SafeLoRA,
        SBR,
        SafeGrad,
        EMA,
    )
}
"""Every defense by its name."""


def read_defense(value: Any) -> Defense:
    """The defense that a grid file writes as a name, or as a mapping of its name and settings.

        none
        {name: vaccine, rho: 5}

    A name may have hyphens in place of spaces: guarded-vectors.

    Raises UserError for an unknown name, an unknown setting, or a value of the wrong type or out of range.
    """
    settings = dict(value) if isinstance(value, Mapping) else {"name": value}
    name = settings.pop("name", None)
    if not isinstance(name, str):
        raise UserError(f"a defense is {shown(value)}: write its name, or a mapping such as {{name: vaccine, rho: 5}}")
    name = next((known for known in DEFENSES if known.replace(" ", "-") == name.replace(" ", "-")), name)
    if name not in DEFENSES:
        words = [word for word in name.split() if "=" not in word]
        form = " (settings are written as a mapping: {name: vaccine, rho: 5})" if words != name.split() else ""
        raise UserError(f"no defense is named {name!r}: {suggestion(' '.join(words), DEFENSES)}{form}")
    defense = DEFENSES[name]
    known = settings_of(defense)
    for setting in settings:
        if setting not in [text.partition("=")[0] for text in known]:
            listed = f"its settings are {', '.join(known)}" if known else "it has none"
            raise UserError(f"{name!r} has no setting {setting!r}: {listed}")
    try:
        return defense(**settings)
    except UserError as error:
        raise UserError(f"{name!r}: {error}") from None


def as_mapping(defense: Defense) -> dict[str, Any]:
    """The mapping that `read_defense` reads back: the name and all settings."""
    return {"name": defense.name} | dataclasses.asdict(defense)  # type: ignore[call-overload]  # every one is a dataclass


def settings_of(defense: type[Defense]) -> list[str]:
    """The settings of a defense with their defaults, as a grid file writes them: "rho=2"."""
    return [f"{name}={as_yaml(value)}".removesuffix("=") for name, value in defaults_of(defense).items()]


def evidence_of(defense: type[Defense]) -> str:
    """What was measured of the defense with its default settings, in one line."""
    return EVIDENCE.get(defense.name, "not measured here")


def usable_defenses() -> dict[str, type[Defense]]:
    """The defenses that can be used on a user's own model and data."""
    return {name: defense for name, defense in DEFENSES.items() if not defense.only_in_grids}


def listing() -> str:
    """All defenses as text for a terminal: what each is, its stage, needs, settings, cost and evidence."""
    parts = []
    for name, defense in usable_defenses().items():
        summary = (defense.__doc__ or "").partition("\n")[0]
        facts = {
            "acts in": defense.stage,
            "needs": ", ".join(defense.needs) or "nothing but your rows",
            "settings": ", ".join(settings_of(defense)) or "none",
            "cost": defense.cost,
            "evidence": evidence_of(defense),
        }
        parts.append(f"{name}: {summary}")
        parts += [
            textwrap.fill(f"    {label + ':':10}{text}", 110, subsequent_indent=" " * 14, break_on_hyphens=False)
            for label, text in facts.items()
        ]
    parts += ["", "What they need:"]
    parts += [
        textwrap.fill(f"    {need + ':':18}{text}", 110, subsequent_indent=" " * 22, break_on_hyphens=False)
        for need, text in MEANING.items()
    ]
    parts += ["", "In grids only:"]
    parts += [f"    {name}: {kind.only_in_grids}" for name, kind in DEFENSES.items() if kind.only_in_grids]
    return "\n".join(parts)
