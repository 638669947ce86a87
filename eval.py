"""Judge models and rows, and hand models over. `python eval.py VERB --help` tells all settings of a verb."""

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # The imports take seconds, and an exception in their midst is a page of traceback.
    signal.signal(signal.SIGINT, lambda number, frame: (os.write(2, b"stopped before it began\n"), os._exit(130)))

from secvec_jax import command_line
from secvec_jax.recipes import export, harness, judge, screen, verbs

VERBS: dict[str, command_line.Verb] = {
    "score": (verbs.ScoreRun, verbs.score),
    "judge": (judge.Judged, judge.judged),
    "compare": (verbs.Compare, verbs.compare),
    "harness": (harness.Harness, harness.harness),
    "screen": (screen.Screen, screen.screen),
    "export": (export.Export, export.export),
}

if __name__ == "__main__":
    command_line.program(__doc__, VERBS)
