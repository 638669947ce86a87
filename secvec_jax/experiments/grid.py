"""`train.py grid`: defense x attack x task x poison ratio x samples x learning rate x optimizer x seed, cell by cell.

A grid file lists blocks; a block is the product of its lists. Every cell leaves one JSON in OUT/cells, with a number
for each prompt, and is skipped when the same command is given again; aligned models and vectors are made once a seed,
in OUT/seed-N. Several processes, on one host or on several with a common file system, take turns by `--part i/n`.
"""

import dataclasses
import itertools
import json
import shutil
import time
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
from simple_parsing import field

from secvec_jax import config
from secvec_jax.activations import attention_difference
from secvec_jax.checks import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Seed, checked
from secvec_jax.defenses.tuning import How
from secvec_jax.digests import difference
from secvec_jax.distributed import broadcast_from_first, is_main_process, on_main_process
from secvec_jax.errors import UserError
from secvec_jax.evaluation.records import Record, read
from secvec_jax.evaluation.scorers import RULES
from secvec_jax.evaluation.suite import Outcomes, outcomes
from secvec_jax.experiments import contenders, grid_report, scenes
from secvec_jax.experiments.bench import Bench, Cell, Optimizer
from secvec_jax.experiments.grid_report import Layout
from secvec_jax.experiments.lab import Recipe
from secvec_jax.experiments.materials import sources
from secvec_jax.experiments.stages import Stage, claim, screen, write
from secvec_jax.files import lock
from secvec_jax.trees import distance
from secvec_jax.workspace.inputs import Inputs, known, model, packaged
from secvec_jax.workspace.run_directory import hold, release


@checked
@dataclasses.dataclass(frozen=True)
class Block:
    """Lists of a cell's settings, whose product are the cells. table: the table of the report that they are for."""

    table: str = ""
    defense: tuple[str, ...] = ("none",)
    attack: tuple[str, ...] = ("harmful",)
    task: tuple[str, ...] = ("profiles",)
    poison: tuple[Fraction, ...] = (0.1,)
    samples: tuple[PositiveInt, ...] = (100,)
    learning_rate: tuple[PositiveFloat, ...] = (3.6e-4,)
    optimizer: tuple[Optimizer, ...] = ("sgd",)
    epochs: tuple[PositiveInt, ...] = (2,)
    task_rank: tuple[NonNegativeInt, ...] = (0,)
    seed: tuple[Seed, ...] = (0,)

    def cells(self) -> Iterator[Cell]:
        """The product, the seeds outermost and the defenses innermost. Raises UserError for what no cell can be."""
        names = [f.name for f in dataclasses.fields(Cell)]
        for name in names:
            if not getattr(self, name):
                raise UserError(f"a block of table {self.table!r} has no {name}: list at least one")
        order = [name for name in reversed(names)]
        for values in itertools.product(*(getattr(self, name) for name in order)):
            yield Cell(**dict(zip(order, values)))


@checked
@dataclasses.dataclass(frozen=True)
class Plan:
    """What a grid file says."""

    blocks: tuple[Block, ...] = ()
    tables: tuple[Layout, ...] = ()
    """how the report shows them; cells of a block that is of no table are in OUT/cells alone"""
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    """the model, its alignment and its vectors; the seed is a cell's own"""

    def cells(self, table: str | None = None) -> list[Cell]:
        """Every cell once, of all tables or of one, in the order of the blocks.

        Raises UserError if there are none, or for a defense or a setting that nobody knows.
        """
        blocks = [block for block in self.blocks if table in (None, block.table)]
        found = list(dict.fromkeys(cell for block in blocks for cell in block.cells()))
        if not found:
            raise UserError(f"the grid has no cells{f' of table {table!r}' if table else ''}: list blocks")
        for cell in found:
            contenders.parsed(cell.defense)
            scenes.check(cell.attack, cell.task)
        return found


@checked
@dataclasses.dataclass(frozen=True)
class Grid:
    """Fine-tune and judge every cell of a grid file, and write its tables; goes on where it was."""

    grid: str = field(default="", positional=True, nargs="?")
    """a grid file, such as configs/grids/quick.yaml"""
    out: str = ""
    """the run directory; runs/NAME unless it is given"""
    part: str = "1/1"
    """i/n: this process does every n-th cell, from the i-th on"""
    only: Literal["all", "cells", "report"] = "all"
    """cells: check the file and tell what it would run; report: write the tables of what is there"""
    overwrite: bool = False
    """delete the cells, models and vectors that OUT holds, and start anew"""


def grid(settings: Grid, command: str) -> None:
    """The run of `train.py grid`."""
    if not settings.grid:
        raise UserError("name a grid file, such as configs/grids/quick.yaml")
    plan = config.load(Plan, settings.grid)
    cells = plan.cells()
    shown = [plan.cells(layout.of or layout.name) for layout in plan.tables]
    mine = _part(cells, settings.part)
    console = screen()
    if settings.only == "cells":
        for cell in mine:
            console.print(cell.name, markup=False, highlight=False)
        console.print(f"{len(mine)} cells, {len({cell.seed for cell in mine})} seeds")
        return
    folder = Path(settings.out or f"runs/{Path(settings.grid).stem}")
    if settings.only == "all":
        on_main_process(partial(_hold, folder, settings.part, settings.overwrite))
        if settings.overwrite:
            on_main_process(partial(_clear, folder))
        _check_rules(folder, cells, mine)
        for seed in sorted({cell.seed for cell in cells}):
            claim(_Claim(dataclasses.replace(plan.recipe, seed=seed), str(_seed_folder(folder, seed))),
                  partial(_packaged, plan.recipe), alone=False)  # fmt: skip
        number = unknown = 0
        for seed, some in itertools.groupby(sorted(mine, key=_seed), _seed):
            bench = Bench(dataclasses.replace(plan.recipe, seed=seed), _seed_folder(folder, seed))
            for cell in some:
                number += 1
                path = folder / "cells" / f"{cell.name}.json"
                kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"error": "has not run"}
                if kept["error"] is None:
                    changed = difference(kept.get("inputs") or {}, bench.inputs(cell)) if is_main_process() else None
                    if not broadcast_from_first(changed is not None):
                        unknown += not kept.get("inputs")
                        continue
                    console.print(f"{cell.name}: {changed}, so it runs again", markup=False, highlight=False)
                record = _record(bench, cell)
                on_main_process(partial(_write, path, record, bench))
                console.print(f"{number}/{len(mine)} {_told(record)}", markup=False, highlight=False)
                jax.clear_caches()  # each program holds memory maps, which a process has but so many of
        if unknown:
            console.print(f"{unknown} cells are of a version that recorded no inputs: they are kept as they are")
        on_main_process(partial(release, _part_folder(folder, settings.part)))
    on_main_process(lambda: grid_report.write(folder, command, config.to_dict(plan), plan.tables, shown, read(folder)))
    console.print(f"the report is in {folder / 'report.md'}")


@checked
@dataclasses.dataclass(frozen=True)
class _Claim:
    """What a seed's shared stages are made by, and may not change from one start to the next; cells may be added."""

    recipe: Recipe
    out: str


def _check_rules(folder: Path, cells: list[Cell], mine: list[Cell]) -> None:
    """Raise UserError where a cell to be run has other seeds that older rules scored: no mean is taken over both."""

    def key(cell: Cell) -> Cell:
        return dataclasses.replace(cell, seed=0)

    paths = {cell: folder / "cells" / f"{cell.name}.json" for cell in cells}
    done = {
        cell: Record.from_dict(json.loads(path.read_text()), str(path)) for cell, path in paths.items() if path.exists()
    }
    older = {key(cell): record.rules for cell, record in done.items() if not record.error and record.rules != RULES}
    for cell in mine:
        if key(cell) in older and (cell not in done or done[cell].error):
            raise UserError(
                f"{folder}: other seeds of {cell.name} were scored by version {older[key(cell)]} of the rules, and "
                f"this one would be by version {RULES}: give another --out, or --only report"
            )


def _packaged(recipe: Recipe) -> Inputs:
    """The content of the recipe's model and of the packaged rows that cells are made of."""
    model_content = {f"--model {recipe.model}": known(model, recipe.model)}
    return model_content | packaged((*sources(recipe.judges), "asdiv", "bbq"))


def _hold(folder: Path, part: str, alone: bool) -> None:
    """Let no other process do this part.

    Raises UserError if one does, if others divide the grid otherwise, or if this one is to be alone and is not.
    """
    mine = _part_folder(folder, part)
    hold(mine)
    for other in (folder / "parts").iterdir():
        if other != mine and (alone or other.name.rpartition("-of-")[2] != mine.name.rpartition("-of-")[2]):
            try:
                lock(other).release()
            except UserError:
                release(mine)
                raise UserError(
                    f"another process does part {other.name.replace('-of-', '/')} of {folder}: divide the grid as it "
                    "does and leave --overwrite out, or wait until it ends"
                ) from None


def _part_folder(folder: Path, part: str) -> Path:
    return folder / "parts" / part.replace("/", "-of-")


def _clear(folder: Path) -> None:
    for made in (folder / "cells", *folder.glob("seed-*")):
        shutil.rmtree(made, ignore_errors=True)


def _write(path: Path, record: Record, bench: Bench) -> None:
    """Keep a cell's record with the content of what it was made of."""
    inputs = bench.inputs(Cell(**record.cell))  # type: ignore[arg-type]
    write(path, json.dumps(dataclasses.asdict(dataclasses.replace(record, inputs=inputs))))


def _part(cells: list[Cell], part: str) -> list[Cell]:
    index, _, count = part.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise UserError(f"part is {part!r}: give i/n with 1 <= i <= n, such as 1/2")
    return cells[int(index) - 1 :: int(count)]


def _record(bench: Bench, cell: Cell) -> Record:
    start = time.monotonic()
    metrics: Outcomes = {}
    error = None
    try:
        metrics = _judged(bench, cell)
    except Exception as failure:  # a cell that fails is told, and the others go on
        traceback.print_exc()
        error = " ".join(f"{type(failure).__name__}: {failure}".split())[:300]
    return Record(dataclasses.asdict(cell), metrics, time.monotonic() - start, error, RULES)


def _seed_folder(folder: Path, seed: int) -> Path:
    return folder / f"seed-{seed}"


def _seed(cell: Cell) -> int:
    return cell.seed


def _judged(bench: Bench, cell: Cell) -> Outcomes:
    """What the cell's model comes to, with what its training showed: the attack's loss and the gradient norm in the
    first and the last step, the drift of the weights, and of the attention's outputs on harmful rows."""
    steps: list[dict[str, float]] = []
    aligned = bench.aligned

    def work(stage: Stage) -> Outcomes:
        show = stage.on_step()

        def on_step(step: int, count: int, metrics: dict[str, float]) -> None:
            steps.append(metrics)
            show(step, count, metrics)

        how = How(training=bench.training(cell), task=bench.task(cell), on_step=on_step)
        tuned, system, notes = contenders.defend(bench, cell, how)
        suite = bench.suite(cell, system)
        found = outcomes(tuned, suite, on_reply=stage.replies(suite.size, "judging"))
        found["drift"] = [float(distance(tuned.backbone, aligned.backbone))]
        found["embedding_drift"] = attention_difference(tuned, aligned, suite.harmful_targets)
        return found | {name: [float(value)] for name, value in notes.items()}

    with bench.lab.stages.show(cell.defense) as stage:
        found = work(stage)
    for when, seen in (("first", steps[:1]), ("last", steps[-1:])):
        for metrics in seen:
            found |= {f"{when}_{name.removeprefix('loss/')}": [metrics[name]] for name in ("loss/attack", "grad_norm")
                      if name in metrics}  # fmt: skip
    return found


def _told(record: Record) -> str:
    if record.error:
        return f"{record.cell['defense']}: FAILED, {record.error[:80]}"
    means = {name: sum(values) / len(values) for name, values in record.metrics.items()}
    shown = ("refusal", "over_refusal", "task", "bias", "caps", "drift", "first_grad_norm")
    scores = "  ".join(f"{name} {means[name]:.2f}" for name in shown if name in means)
    names = [
        f"{key} {record.cell[key]}" for key in ("attack", "poison", "samples", "learning_rate", "optimizer", "seed")
    ]
    return f"{record.cell['defense']} ({', '.join(names)}): {scores}  [{record.seconds:.0f} s]"
