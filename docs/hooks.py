"""Generates what the docs say about settings, defenses and their results, so that it is complete and current.

    python docs/hooks.py

writes the commands in docs/commands.md and the tables in docs/defenses.md and docs/devices.md, which are committed for
readers on a code host, and secvec_jax/defenses/evidence.py, a line of the results in docs/results for each defense.
mkdocs fills in the pages each time the site is built.
"""

import importlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DOCS = Path(__file__).parent
PAGES = {"commands": DOCS / "commands.md", "defenses": DOCS / "defenses.md", "devices": DOCS / "devices.md"}
EVIDENCE = ROOT / "secvec_jax" / "defenses" / "evidence.py"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this for each page."""
    return filled(markdown)


def filled(page: str) -> str:
    """The page with what is generated as it is now, between its two marks."""
    for name, generate in GENERATED.items():
        start, end = f"<!-- {name}: written by `python docs/hooks.py` -->", f"<!-- end of {name} -->"
        if start in page:
            before, _, rest = page.partition(start)
            page = f"{before}{start}\n\n{generate()}\n\n{end}{rest.partition(end)[2]}"
    return page


def _imported(*names: str) -> list[Any]:
    """Modules of this repository, wherever this is run."""
    sys.path.insert(0, str(ROOT))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(ROOT))


def commands() -> str:
    """Every verb of train.py and eval.py with its settings, as Markdown."""
    train, evaluate, flags, distributed = _imported("train", "eval", "secvec_jax.flags", "secvec_jax.distributed")
    scripts = {"train": train, "eval": evaluate}
    cluster = distributed.Cluster
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
    names = [flag.name or flag.metavar]
    if flag.is_switch and flag.default is None:
        names.append(f"--no-{flag.name.removeprefix('--')}")
    shown_names = ", ".join(f"`{name}`" for name in names)
    meaning = flag.help.replace("|", r"\|")
    return f"| `{flag.key}` | {shown_names} | {default} | {meaning} |"


def _prose(settings: type) -> str:
    return " ".join((settings.__doc__ or "").split())


def defenses() -> str:
    """The table of all defenses, as Markdown."""
    (registry,) = _imported("secvec_jax.defenses.registry")
    header = "| name | settings | acts in | needs | cost | evidence | source |\n|---|---|---|---|---|---|---|"
    lines = []
    for name, defense in registry.DEFENSES.items():
        settings = ", ".join(f"`{text}`" for text in registry.settings_of(defense))
        needs = ", ".join(defense.needs) or "-"
        evidence = registry.evidence_of(defense)
        lines.append(
            f"| `{name}` | {settings} | {defense.stage} | {needs} | {defense.cost} | {evidence} | {defense.source} |"
        )
    only = [f"- `{name}`: {kind.only_in_grids}." for name, kind in registry.DEFENSES.items() if kind.only_in_grids]
    return "\n".join([header, *lines, "", "In grids only:", "", *only])


def presets() -> str:
    """The table of all presets, as Markdown."""
    presets, config = _imported("secvec_jax.presets", "secvec_jax.config")
    names = ["| preset | for |", "|---|---|"]
    settings = [
        "| preset | verb | batch size | remat | trained | weights in | memory |",
        "|---|---|---:|---|---|---|---:|",
    ]
    for name, preset in presets.presets().items():
        mesh = f", `--mesh {preset.mesh}`" if preset.mesh else ""
        names.append(f"| `{name}` | {preset.summary}{mesh} |")
        for verb in ("align", "vectors", "finetune", "protect"):
            values = config.flat(dict(getattr(preset, verb)))
            lora = f"task LoRA, rank {values['task_lora.rank']}" if "task_lora.rank" in values else "all weights"
            columns = [
                f"`{name}`",
                f"`{verb}`",
                str(values["training.batch_size"]),
                values["training.remat"],
                "vectors" if verb == "vectors" else lora,
                values.get("frozen_weights", "float32"),
                f"{preset.memory_gib[verb]:.1f} GiB" if preset.topology else "",
            ]
            settings.append(f"| {' | '.join(columns)} |")
    return "\n".join([*names, "", *settings])


def needs() -> str:
    """The table of what defenses need, as Markdown."""
    (base,) = _imported("secvec_jax.defenses.base")
    return "\n".join(["| | |", "|---|---|", *(f"| {need} | {meaning} |" for need, meaning in base.MEANING.items())])


# What was measured, in the order of preference: the hardest setting that a defense has a cell of.
_SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("50% harmful rows, Adam 3e-4", {"attack": "harmful", "poison": 0.5, "optimizer": "adamw", "learning_rate": 3e-4}),
    ("20% harmful rows, Adam 1e-4", {"attack": "harmful", "poison": 0.2, "optimizer": "adamw", "learning_rate": 1e-4}),
    ("2% harmful rows, Adam 1e-4", {"attack": "harmful", "poison": 0.02, "optimizer": "adamw", "learning_rate": 1e-4}),
    (
        "harmful rows only, SGD 3.6e-4",
        {"attack": "harmful", "poison": 1.0, "optimizer": "sgd", "learning_rate": 3.6e-4, "samples": 100},
    ),
    ("a bias in 50% of the rows, Adam 1e-4", {"attack": "bias", "poison": 0.5}),
)
_RATES = {"bias": "bias", "refusal": "refusal", "compliance": "compliance", "over_refusal": "over-refusal"}


def evidence() -> dict[str, str]:
    """By the name of a defense, its default settings' results in one line; defenses without a cell are left out."""
    (registry,) = _imported("secvec_jax.defenses.registry")
    results = DOCS / "results"
    lines = _evidence_in(results / "others" / "cells", registry.DEFENSES)
    lines |= _evidence_in(results / "cells", registry.DEFENSES)
    return {name: lines[name] for name in registry.DEFENSES if name in lines}


def _evidence_in(folder: Path, names: Iterable[str]) -> dict[str, str]:
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    lines = {}
    for name in names:
        for words, settings in _SETTINGS:
            of_setting = [r for r in records if all(r["cell"][key] == value for key, value in settings.items())]
            cells = {r["cell"]["seed"]: r["metrics"] for r in of_setting if r["cell"]["defense"] == name}
            undefended = {r["cell"]["seed"]: r["metrics"] for r in of_setting if r["cell"]["defense"] == "none"}
            if cells:
                has_task = settings["poison"] < 1
                compared = _shown([undefended[seed] for seed in cells], has_task)
                compared = "" if name == "none" else f"; undefended: {compared}"
                seeds = f"{len(cells)} seed{'s' * (len(cells) > 1)}"
                lines[name] = f"{words}: {_shown(list(cells.values()), has_task)}{compared} ({seeds})"
                break
    return lines


def _shown(cells: Sequence[dict[str, list[float]]], has_task: bool) -> str:
    """The means of the metrics that cells have, each over prompts and then over seeds."""

    def mean(metric: str) -> float:
        return sum(sum(cell[metric]) / len(cell[metric]) for cell in cells) / len(cells)

    parts = [f"{words} {100 * mean(metric):.0f}%" for metric, words in _RATES.items() if metric in cells[0]]
    parts += [f"unseen harmful loss {mean('harmful_loss'):.2f}"] if "harmful_loss" in cells[0] else []
    parts += [f"task {100 * mean('task'):.0f}%"] if has_task else []
    return ", ".join(parts)


def evidence_module() -> str:
    """The text of secvec_jax/defenses/evidence.py."""
    lines = ['"""What was measured of each defense, in one line: docs/results.md has the rest.', "",
             "Written by `python docs/hooks.py` from docs/results/cells and docs/results/others/cells.", '"""', "",
             "# ruff: noqa: E501", "", "EVIDENCE = {"]  # fmt: skip
    lines += [f'    "{name}": "{line}",' for name, line in evidence().items()]
    return "\n".join([*lines, "}", '"""Name of a defense -> its results; a defense that has none is left out."""', ""])


GENERATED: dict[str, Callable[[], str]] = {
    "commands": commands,
    "defenses": defenses,
    "needs": needs,
    "presets": presets,
}
"""Name of a mark -> what is written there."""

if __name__ == "__main__":
    EVIDENCE.write_text(evidence_module())
    for page in PAGES.values():
        page.write_text(filled(page.read_text()))
