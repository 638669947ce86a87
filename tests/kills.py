"""Ends a process amid its writes: what `tests.test_kills` runs instead of train.py and eval.py.

    python -m tests.kills SETTINGS.json

SETTINGS.json: {"part": a pattern of paths, "number": the change after which to end, "size": bytes,
"command": [script, argument...], "gguf": a file that stands for the embedded model's}.
"""

import json
import os
import re
import resource
import signal
import sys
from pathlib import Path
from typing import Any

CHANGES = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate",
                     "shutil.rmtree"})  # fmt: skip
"""Events of Python's audit that change a file system, or, in the case of "open", may."""


def is_change(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        _, mode, flags = arguments
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or bool(set(mode or "") & set("wax+"))
    return event in CHANGES


def arm(part: str, number: int | None, size: int) -> list[str]:
    """End this process after the change of that number of a path that contains the pattern `part`.

    The kernel ends it amid the first write that goes beyond `size` bytes of a file; if there is none, SIGKILL ends it
    right before the second change after it. number: None never ends it. Returns the list to which changes are added.
    """
    pattern, seen = re.compile(part), list[str]()

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES or not is_change(event, arguments):
            return
        paths = [os.fsdecode(path) for path in arguments if isinstance(path, str | bytes | os.PathLike)]
        if not any(pattern.search(path) for path in paths):
            return
        seen.append(f"{event} {Path(paths[0]).name}")
        if len(seen) == number:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        elif number is not None and len(seen) == number + 2:
            os.kill(os.getpid(), signal.SIGKILL)

    if number is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which Python ignores otherwise
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(watch)
    return seen


def main() -> None:
    import eval
    import train
    from secvec_jax import assets, command_line
    from secvec_jax.grid import attacks

    settings = json.loads(Path(sys.argv[1]).read_text())
    assets.extract = lambda *_: Path(settings["gguf"])
    attacks.NUM_KNOWN = 8
    script = {"train.py": train, "eval.py": eval}[settings["command"][0]]
    sys.argv = settings["command"]
    arm(settings["part"], settings["number"], settings["size"])
    sys.exit(command_line.main(script.__doc__, script.VERBS))


if __name__ == "__main__":
    main()
