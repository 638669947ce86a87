"""Verbs in turn in one process: `python -m tests.verbs_in_turn COMMANDS`, a JSON list of [script, argument, ...].

Prints for each, as a line of JSON, its exit code and what it wrote, (stdout, stderr).
"""

import json
import sys

from tests.processes import call


def main() -> None:
    for command in json.loads(sys.argv[1]):
        print(json.dumps(call(*command)), flush=True)


if __name__ == "__main__":
    main()
