"""Generates the page of commands from the settings, so that it is complete and its defaults are current.

    python docs/hooks.py        # writes docs/commands.md, which is committed for readers on a code host

mkdocs generates it each time the site is built.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = Path(__file__).parent / "commands.md"
START, END = "<!-- commands: written by `python docs/hooks.py` -->", "<!-- end of commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this for each page."""
    return filled(markdown) if START in markdown else markdown


def filled(page: str) -> str:
    """The page with the commands as they are now between the two marks."""
    before, _, rest = page.partition(START)
    return f"{before}{START}\n\n{commands()}\n\n{END}{rest.partition(END)[2]}"


def commands() -> str:
    """Every verb of train.py and eval.py with its settings, as Markdown."""
    sys.path.insert(0, str(ROOT))
    try:
        scripts = {name: importlib.import_module(name) for name in ("train", "eval")}
        flags = importlib.import_module("secvec_jax.flags")
        cluster = importlib.import_module("secvec_jax.command_line").Cluster
    finally:
        sys.path.remove(str(ROOT))
    parts = []
    without_devices = []
    for script, module in scripts.items():
        for name, verb in module.VERBS.items():
            settings, _ = verb.load()
            examples = "\n".join(f"python {script}.py {name} {example}".rstrip() for example in verb.examples)
            parts.append(
                f"## {script}.py {name}\n\n{_prose(settings)}\n\n```bash\n{examples}\n```\n\n{_table(flags, settings)}"
            )
            if not verb.on_devices:
                without_devices.append(name)
    title = f"## Devices, for every verb except {' and '.join(without_devices)}"
    parts.append(f"{title}\n\n{_prose(cluster)}\n\n{_table(flags, cluster)}")
    return "\n\n".join(parts)


def _table(flags: Any, settings: type) -> str:
    lines = ["| setting | flag | default | |", "|---|---|---|---|"]
    for group in flags.groups(settings):
        lines += [_line(flags, flag) for flag in group.flags]
    return "\n".join(lines)


def _line(flags: Any, flag: Any) -> str:
    if flag.default is flags.REQUIRED:
        default = "required"
    elif flag.is_switch and flag.default is not None:
        default = "on" if flag.default else "off"
    else:
        default = f"`{flag.shown_default}`" if flag.shown_default else ""
    name = flag.name or flag.metavar
    meaning = flag.help.replace("|", r"\|")
    return f"| `{flag.key}` | `{name}` | {default} | {meaning} |"


def _prose(settings: type) -> str:
    return " ".join((settings.__doc__ or "").split())


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
