"""The three objectives of phase 1, compared on the quickstart's aligned model, rows and judges."""

import dataclasses
from functools import partial
from pathlib import Path

from secvec_jax import config
from secvec_jax.checks import checked
from secvec_jax.defenses.security_vectors import ObjectiveName
from secvec_jax.errors import UserError
from secvec_jax.evaluation import report
from secvec_jax.evaluation.suite import Outcomes
from secvec_jax.experiments.lab import Lab
from secvec_jax.experiments.materials import sources
from secvec_jax.experiments.quickstart import Quickstart
from secvec_jax.experiments.runs import scored
from secvec_jax.experiments.stages import Stage, claim, curves
from secvec_jax.workspace import run_directory
from secvec_jax.workspace.inputs import Inputs, known, model, packaged

OBJECTIVES: tuple[ObjectiveName, ...] = ("cross_entropy", "kl", "min_min")


@checked
@dataclasses.dataclass(frozen=True)
class Objectives:
    """Compare the three objectives of phase 1: train vectors with each, check them, and fine-tune under them."""

    quickstart: str = "runs/quickstart"
    """run directory of a finished quickstart, whose aligned model, settings and rows are used"""
    out: str = "runs/objectives"
    """run directory"""
    overwrite: bool = False
    """delete the run in OUT and start over"""


def objectives(settings: Objectives, command: str) -> report.Results:
    """Run what is not done yet and write the report; returns the results.

    Raises UserError if there is no quickstart with an aligned model.
    """
    source = Path(settings.quickstart)
    if not (source / "model" / "aligned").is_dir():
        raise UserError(f"{source} has no aligned model: run `python train.py quickstart --out {source}` first")
    recipe = config.load(Quickstart, source / "config.yaml")
    aligned = source / "model" / "aligned"

    def used() -> Inputs:
        settings_there = {f"the quickstart's {key}": repr(value) for key, value in run_directory.flat(recipe).items()}
        there = {f"--quickstart {source}": known(model, str(aligned))}
        return packaged(sources(recipe.judges)) | there | settings_there | scored()

    lab = Lab(recipe, claim(settings, used), aligned)
    found: dict[str, Outcomes] = {
        "aligned": lab.stages.run("aligned", lambda stage: lab.judge(lab.aligned, stage)),
    }
    for name in OBJECTIVES:
        phase1 = dataclasses.replace(recipe.phase1, objective=name)
        work = partial(lab.phase1, name, phase1)
        found[f"{name}, vectors on"] = lab.stage(f"vectors {name}", work, makes_vectors=name)
        found[name] = lab.stage(name, partial(_phase2, lab, name), vectors=(name,))
    losses = curves(lab.folder / "metrics.jsonl", dict(zip(OBJECTIVES, OBJECTIVES)))
    return lab.report(command, settings, found, (), losses, (_NOTE,))


def _phase2(lab: Lab, name: str, stage: Stage) -> Outcomes:
    return lab.phase2(name, lab.materials.mix, lab.vectors(name), stage)


_NOTE = (
    "Rows named after an objective are fine-tuned under its vectors and judged without them; `vectors on` is the "
    "aligned model seen through them. min_min takes its steps of a throw-away backbone besides."
)
