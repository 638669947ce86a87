"""Train: quickstart, objectives, align, vectors, finetune; plan a run on TPUs.

`train.py VERB --help` tells all settings of a verb.
"""

from secvec_jax import command_line
from secvec_jax.experiments import objectives, planning, quickstart, verbs

VERBS = {
    "quickstart": (quickstart.Quickstart, quickstart.quickstart),
    "objectives": (objectives.Objectives, objectives.objectives),
    "align": (verbs.Align, verbs.align),
    "vectors": (verbs.Vectors, verbs.vectors),
    "finetune": (verbs.Finetune, verbs.finetune),
    "plan": (planning.Planned, planning.planned),
}

if __name__ == "__main__":
    command_line.program(__doc__, VERBS)
