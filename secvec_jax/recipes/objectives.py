"""`train.py objectives`: the three objectives of phase 1, compared on a quickstart's aligned model and splits."""

import dataclasses
from functools import partial
from pathlib import Path

from secvec_jax import config
from secvec_jax.checks import checked
from secvec_jax.defenses.security_vectors import ObjectiveName
from secvec_jax.errors import UserError
from secvec_jax.evaluation.results import Results
from secvec_jax.evaluation.suite import Outcomes
from secvec_jax.recipes.quickstart import Quickstart
from secvec_jax.workspace import run_directory
from secvec_jax.workspace.inputs import Inputs, known, model, packaged
from secvec_jax.workspace.runs import scoring_inputs
from secvec_jax.workspace.splits import sources
from secvec_jax.workspace.stage import Stage
from secvec_jax.workspace.stages import claim, curves
from secvec_jax.workspace.workspace import Workspace

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


def objectives(settings: Objectives, command: str) -> Results:
    """Run what is not done yet and write the report; returns the results.

    Raises UserError if there is no quickstart with an aligned model.
    """
    source = Path(settings.quickstart)
    own = source / "model" / "aligned"
    experiment = config.load(Quickstart, source / "config.yaml") if (source / "config.yaml").is_file() else None
    if experiment is None or (experiment.aligns_first and not own.is_dir()):
        raise UserError(f"{source} has no aligned model: run `python train.py quickstart --out {source}` first")
    aligned = own if experiment.aligns_first else None

    def further_inputs() -> Inputs:
        source_settings = {
            f"the quickstart's {key}": repr(value) for key, value in run_directory.flat(experiment).items()
        }
        source_model = {f"--quickstart {source}": known(model, str(aligned or experiment.model))}
        return packaged(sources(experiment.eval_split)) | source_model | source_settings | scoring_inputs()

    workspace = Workspace(experiment, claim(settings, further_inputs), aligned)
    results: dict[str, Outcomes] = {
        "aligned": workspace.stages.run("aligned", lambda stage: workspace.evaluate(workspace.aligned, stage)),
    }
    for name in OBJECTIVES:
        phase1 = dataclasses.replace(experiment.phase1, objective=name)
        work = partial(workspace.phase1, name, phase1)
        results[f"{name}, vectors on"] = workspace.stage(f"vectors {name}", work, makes_vectors=name)
        results[name] = workspace.stage(name, partial(_phase2, workspace, name), vectors=(name,))
    losses = curves(workspace.folder / "metrics.jsonl", dict(zip(OBJECTIVES, OBJECTIVES)))
    return workspace.report(command, settings, results, (), losses, (_NOTE,))


def _phase2(workspace: Workspace, name: str, stage: Stage) -> Outcomes:
    return workspace.phase2(name, workspace.splits.mix, workspace.vectors(name), stage)


_NOTE = (
    "Rows named after an objective are fine-tuned under its vectors and scored without them; `vectors on` is the "
    "aligned model with the vectors active. min_min also takes steps of a temporary model copy."
)
