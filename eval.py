"""Judge: score, compare. `python eval.py VERB --help` tells all settings of a verb."""

from secvec_jax import command_line
from secvec_jax.experiments import verbs

VERBS = {
    "score": (verbs.ScoreRun, verbs.score),
    "compare": (verbs.Compare, verbs.compare),
}

if __name__ == "__main__":
    command_line.program(__doc__, VERBS)
