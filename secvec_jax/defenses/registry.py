"""The table of all defenses, and how grid files write them.

read_defense("none")
read_defense({"name": "vaccine", "rho": 5})     # Vaccine(rho=5.0, every=1)
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from secvec_jax.defenses.aligned_kl import AlignedKL, AnchoredVectors
from secvec_jax.defenses.base import Defense
from secvec_jax.defenses.booster import Booster
from secvec_jax.defenses.caft import CAFT
from secvec_jax.defenses.constrained_sft import ConstrainedSFT
from secvec_jax.defenses.controls import BenignOnly, IrrelevantControl, NotAligned, PlainFinetuning, RandomControl
from secvec_jax.defenses.ewc import EWC
from secvec_jax.defenses.explained_away import ExplainedAwayFilter, ExplainedAwayGate
from secvec_jax.defenses.forget_filter import ForgetFilter
from secvec_jax.defenses.guarded import GuardedVectors
from secvec_jax.defenses.lisa import Lisa
from secvec_jax.defenses.mixing import Replay, Sequential, VLGuard
from secvec_jax.defenses.persona import PersonaSteering
from secvec_jax.defenses.prompting import PTST, InoculationPrompting, SelfCorrection
from secvec_jax.defenses.safe_lora import SafeLoRA
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
    )
}
"""Every defense by its name."""


def read_defense(value: Any) -> Defense:
    """The defense that a grid file writes as a name, or as a mapping of its name and settings.

        none
        {name: vaccine, rho: 5}

    Raises UserError for an unknown name, an unknown setting, or a value of the wrong type or out of range.
    """
    settings = dict(value) if isinstance(value, Mapping) else {"name": value}
    name = settings.pop("name", None)
    if not isinstance(name, str):
        raise UserError(f"a defense is {value!r}: write its name, or a mapping such as {{name: vaccine, rho: 5}}")
    if name not in DEFENSES:
        words = [word for word in name.split() if "=" not in word]
        form = " (settings are written as a mapping: {name: vaccine, rho: 5})" if words != name.split() else ""
        raise UserError(f"no defense is named {name!r}: {suggestion(' '.join(words), DEFENSES)}{form}")
    defense = DEFENSES[name]
    known = [field.name for field in dataclasses.fields(defense)]  # type: ignore[arg-type]  # every subclass is one
    for setting in settings:
        if setting not in known:
            raise UserError(
                f"{name!r} has no setting {setting!r}: {suggestion(setting, known) if known else 'it has none'}"
            )
    try:
        return defense(**settings)
    except UserError as error:
        raise UserError(f"{name!r}: {error}") from None
