"""The run of a verb: its directory, its stages, and the results and report that it ends with."""

from collections.abc import Callable, Sequence
from typing import Any

from secvec_jax import config
from secvec_jax.distributed import is_main_process, on_main_process
from secvec_jax.evaluation import report
from secvec_jax.evaluation.results import Results, environment_facts
from secvec_jax.evaluation.scorers import RULES
from secvec_jax.inference import frozen_precision
from secvec_jax.terminal import Console
from secvec_jax.workspace.inputs import Inputs
from secvec_jax.workspace.run_directory import settings_of_run
from secvec_jax.workspace.stages import Stages, claim, devices, release, screen


class Run:
    """A verb's run: claims the run directory `settings.out`, and starts or resumes there."""

    def __init__(self, settings: Any, command: str, more: Callable[[], Inputs] = dict):
        """more: inputs that the settings do not name."""
        self.settings, self.command = settings, command
        self.folder = claim(settings, lambda: more() | _precision_input(settings))
        self.console = Console(quiet=not is_main_process(), soft_wrap=True)
        self.stages = Stages(self.folder, self.console)

    def report(self, rows: list[dict[str, Any]], notes: Sequence[str] = ()) -> None:
        """Write results.json and report.md, and show the table and the notes; ends the run."""
        environment = environment_facts() | devices()
        results = Results(
            self.command, config.to_dict(settings_of_run(self.settings)), environment, self.stages.seconds, rows
        )

        def write() -> None:
            results.save(self.folder)
            report.write(self.folder, results, notes=notes)

        on_main_process(write)
        terminal = screen()
        terminal.print(report.table(results))
        for note in notes:
            terminal.print(note)
        release(self.folder)


def _precision_input(settings: Any) -> Inputs:
    """The precision of the model's weights; a resumed run keeps it on other devices, whose default may differ."""
    if not hasattr(settings, "frozen_weights"):
        return {}
    precision = getattr(settings, "precision", None) or frozen_precision(settings.frozen_weights)
    return {"what weights are held in (--frozen-weights)": precision}


def result_name(model: str, vectors: Sequence[str]) -> str:
    """The name that results give to a model evaluated with or without vectors."""
    return f"{model} + vectors" if vectors else model


def scoring_inputs() -> Inputs:
    """What scores depend on in addition to the model and the prompts."""
    return {"the version of the scoring rules": RULES}
