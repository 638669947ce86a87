"""Train: quickstart, objectives, align, vectors, finetune; a grid of defenses and attacks; plan a run on TPUs.

`train.py VERB --help` tells all settings of a verb.
"""

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # The imports take seconds, and an exception in their midst is a page of traceback.
    signal.signal(signal.SIGINT, lambda number, frame: (os.write(2, b"stopped before it began\n"), os._exit(130)))

from secvec_jax import command_line
from secvec_jax.grid import grid
from secvec_jax.recipes import objectives, plan, quickstart, verbs

VERBS: dict[str, command_line.Verb] = {
    "quickstart": (quickstart.Quickstart, quickstart.quickstart),
    "objectives": (objectives.Objectives, objectives.objectives),
    "align": (verbs.Align, verbs.align),
    "vectors": (verbs.Vectors, verbs.vectors),
    "finetune": (verbs.Finetune, verbs.finetune),
    "grid": (grid.Grid, grid.grid),
    "plan": (plan.Planned, plan.planned),
}

if __name__ == "__main__":
    command_line.program(__doc__, VERBS)
