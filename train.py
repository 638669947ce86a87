"""Train: quickstart, align, vectors, finetune. `python train.py VERB --help` tells all settings of a verb."""

import sys

from secvec_jax import command_line
from secvec_jax.experiments import quickstart, verbs

VERBS = {
    "quickstart": (quickstart.Quickstart, quickstart.quickstart),
    "align": (verbs.Align, verbs.align),
    "vectors": (verbs.Vectors, verbs.vectors),
    "finetune": (verbs.Finetune, verbs.finetune),
}

if __name__ == "__main__":
    sys.exit(command_line.main(__doc__, VERBS))
