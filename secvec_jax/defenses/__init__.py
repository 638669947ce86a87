"""The defenses, by the names of their classes; see `base` for what a defense is, and `sv.defend` for how to use one.

`DEFENSES` has all of them by their names in grids and commands, and `listing()` describes them.
"""

from secvec_jax.defenses.aligned_kl import AlignedKL, AnchoredVectors
from secvec_jax.defenses.base import Defended, Defense, DefenseInputs
from secvec_jax.defenses.booster import Booster
from secvec_jax.defenses.caft import CAFT
from secvec_jax.defenses.constrained_sft import ConstrainedSFT
from secvec_jax.defenses.controls import BenignOnly, IrrelevantControl, NotAligned, PlainFinetuning, RandomControl
from secvec_jax.defenses.ema import EMA
from secvec_jax.defenses.ewc import EWC
from secvec_jax.defenses.explained_away import ExplainedAwayFilter, ExplainedAwayGate
from secvec_jax.defenses.forget_filter import ForgetFilter
from secvec_jax.defenses.guarded import GuardedVectors
from secvec_jax.defenses.lisa import Lisa
from secvec_jax.defenses.mixing import Replay, Sequential, VLGuard
from secvec_jax.defenses.persona import PersonaSteering
from secvec_jax.defenses.prompting import PTST, InoculationPrompting, SelfCorrection
from secvec_jax.defenses.registry import DEFENSES, listing
from secvec_jax.defenses.safe_lora import SafeLoRA
from secvec_jax.defenses.safegrad import SafeGrad
from secvec_jax.defenses.sbr import SBR
from secvec_jax.defenses.security_vectors import SecurityVectors
from secvec_jax.defenses.vaccine import RandomPerturbation, Vaccine

__all__ = [
    "CAFT",
    "DEFENSES",
    "EMA",
    "EWC",
    "PTST",
    "SBR",
    "AlignedKL",
    "AnchoredVectors",
    "BenignOnly",
    "Booster",
    "ConstrainedSFT",
    "Defended",
    "Defense",
    "DefenseInputs",
    "ExplainedAwayFilter",
    "ExplainedAwayGate",
    "ForgetFilter",
    "GuardedVectors",
    "InoculationPrompting",
    "IrrelevantControl",
    "Lisa",
    "NotAligned",
    "PersonaSteering",
    "PlainFinetuning",
    "RandomControl",
    "RandomPerturbation",
    "Replay",
    "SafeGrad",
    "SafeLoRA",
    "SecurityVectors",
    "SelfCorrection",
    "Sequential",
    "VLGuard",
    "Vaccine",
    "listing",
]
