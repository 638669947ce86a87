"""Train: align a model, train security vectors, fine-tune under them, or both by `protect`; run a grid; plan a run."""

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Imports take seconds, and Ctrl-C during them would print a page of traceback.
    signal.signal(signal.SIGINT, lambda number, frame: (os.write(2, b"stopped before the run began\n"), os._exit(130)))

from secvec_jax import cli, command_line

VERBS = cli.TRAIN

if __name__ == "__main__":
    command_line.program(__doc__, VERBS, dict.fromkeys(cli.EVAL, "eval.py"))
