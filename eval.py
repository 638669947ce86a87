"""Judge models and rows, and hand models over. `python eval.py VERB --help` tells all settings of a verb."""

from secvec_jax import command_line
from secvec_jax.experiments import export, harness, judging, screen, verbs

VERBS: dict[str, command_line.Verb] = {
    "score": (verbs.ScoreRun, verbs.score),
    "judge": (judging.Judged, judging.judged),
    "compare": (verbs.Compare, verbs.compare),
    "harness": (harness.Harness, harness.harness),
    "screen": (screen.Screen, screen.screen),
    "export": (export.Export, export.export),
}

if __name__ == "__main__":
    command_line.program(__doc__, VERBS)
