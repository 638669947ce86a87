"""Judge: score, compare. `python eval.py VERB --help` tells all settings of a verb."""

import sys

from secvec_jax import command_line
from secvec_jax.experiments import verbs

VERBS = {
    "score": (verbs.ScoreRun, verbs.score),
    "compare": (verbs.Compare, verbs.compare),
}

if __name__ == "__main__":
    sys.exit(command_line.main(__doc__, VERBS))
