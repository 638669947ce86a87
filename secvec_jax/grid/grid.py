"""`train.py grid`: defense x attack x task x poison ratio x samples x learning rate x optimizer x seed, cell by cell.

A grid file lists blocks; a block is the product of its lists. Every cell writes one JSON file to OUT/cells, with a
number for each prompt, and is skipped when the same command is rerun. Aligned models and vectors are made once a seed,
in OUT/seed-N. Several processes, on one host or on several with a common file system, divide the cells by `--part i/n`.
"""

import dataclasses
import itertools
import json
import shutil
import time
import traceback
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from secvec_jax import config
from secvec_jax.arguments import whole_number
from secvec_jax.checks import Text, checked
from secvec_jax.digests import difference, of_values
from secvec_jax.distributed import broadcast_from_first, is_main_process, on_main_process, require_same
from secvec_jax.errors import UserError
from secvec_jax.evaluation.records import Record, read, read_record
from secvec_jax.evaluation.scorers import RULES
from secvec_jax.evaluation.suite import Outcomes
from secvec_jax.files import lock
from secvec_jax.grid import gap_report
from secvec_jax.grid import report as grid_report
from secvec_jax.grid.cells import Block, Cell
from secvec_jax.grid.outcomes import METRIC, FurtherProbe, cell_outcomes
from secvec_jax.grid.report import Layout
from secvec_jax.grid.seed_workspace import GridExperiment, SeedWorkspace
from secvec_jax.output_checks import check_own
from secvec_jax.programs import drop_programs_if_many, seconds_compiling
from secvec_jax.suggestions import suggestion
from secvec_jax.workspace.inputs import Inputs, known, model, packaged
from secvec_jax.workspace.run_directory import INPUTS, acquire, release
from secvec_jax.workspace.splits import sources
from secvec_jax.workspace.stages import claim, screen, write


@checked
@dataclasses.dataclass(frozen=True)
class GridConfig:
    """The contents of a grid file."""

    blocks: tuple[Block, ...] = ()
    tables: tuple[Layout, ...] = ()
    """how the report shows them; cells of a block without a table are only in OUT/cells"""
    experiment: GridExperiment = dataclasses.field(default_factory=GridExperiment)
    """the model, its alignment and its vectors; every cell has its own seed"""
    probes: tuple[FurtherProbe, ...] = ()
    """what is measured in addition in every cell: prefill, kl, relearning (see `grid.outcomes`)"""

    def cells(self, table: str | None = None) -> list[Cell]:
        """Every cell once, of all tables or of one, in the order of the blocks.

        Raises UserError if there are none, and if two would have the same file.
        """
        blocks = [block for block in self.blocks if table in (None, block.table)]
        cells = list(dict.fromkeys(cell for block in blocks for cell in block.cells()))
        if not cells:
            raise UserError(f"the grid has no cells{f' of table {table!r}' if table else ''}: list blocks")
        by_name: dict[str, Cell] = {}
        for cell in cells:
            other = by_name.setdefault(cell.name, cell)
            if other != cell:
                differing = [name for name, value in cell.settings.items() if value != other.settings[name]]
                values = " and ".join(repr(each.settings[differing[0]]) for each in (other, cell))
                raise UserError(f"two cells would share the file {cell.name}: {differing[0]} is {values}; rename one")
        return cells

    def cells_of_tables(self) -> list[list[Cell]]:
        """The cells of each table.

        Raises UserError if a table has none, names a defense that none of them has, or has the name of another.
        """
        names = [layout.name for layout in self.tables]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise UserError(f"two tables are named {repeated[0]!r}, and one would replace the other: rename one")
        cells_of_tables = []
        for layout in self.tables:
            cells = self.cells(layout.of or layout.name)
            labels = list(dict.fromkeys(cell.defense.label for cell in cells))
            for label in layout.named_defenses():
                if label not in labels:
                    problem = f"table {layout.name!r} names {label!r}, which none of its cells has"
                    raise UserError(f"{problem}: {suggestion(label, labels)}")
            cells_of_tables.append(cells)
        return cells_of_tables


@checked
@dataclasses.dataclass(frozen=True)
class Grid:
    """Fine-tune and evaluate every cell of a grid file, and write its tables; resumes where it stopped."""

    grid: Text = dataclasses.field(metadata={"positional": True})
    """a grid file, such as configs/grids/quick.yaml"""
    out: str = ""
    """run directory; by default runs/NAME, named after the grid file"""
    part: str = "1/1"
    """i/n: this process runs every n-th cell, starting with the i-th"""
    only: Literal["all", "cells", "report", "gaps"] = "all"
    """cells: check the file and list its cells, running none; report: write the tables of the completed cells; gaps:
    print how far the completed cells are from the oracle, benign only"""
    overwrite: bool = False
    """delete the cells, models and vectors in OUT and start over"""


def grid(settings: Grid, command: str) -> None:
    """Runs `train.py grid`."""
    grid_config = config.load(GridConfig, settings.grid)
    require_same({settings.grid: of_values([config.to_dict(grid_config)])})
    cells = grid_config.cells()
    cells_of_tables = grid_config.cells_of_tables()
    part = _part(cells, settings.part)
    console = screen()
    if settings.only == "cells":
        for cell in part:
            console.print(cell.name)
        console.print(f"{len(part)} cells, {len({cell.seed for cell in part})} seeds")
        return
    folder = Path(settings.out or f"runs/{Path(settings.grid).stem}")
    if settings.only == "gaps":
        text = gap_report.markdown_of(_current(read(folder), folder))
        console.print(
            text or f"no cell of {folder} has an oracle of its settings and seed: run benign only", soft_wrap=True
        )
        return
    failed = _run(settings, grid_config, cells, part, folder) if settings.only == "all" else 0
    on_main_process(
        lambda: grid_report.write(
            folder,
            command,
            config.to_dict(grid_config),
            grid_config.tables,
            cells_of_tables,
            _current(read(folder), folder),
        )
    )
    console.print(f"the report is in {folder / 'report.md'}")
    if failed:
        raise UserError(f"{failed} of {len(part)} cells failed, as the report says: rerun the command to retry them")


MARKS = ("parts", "cells")
"""Folders that mark a grid's run directory."""


def _run(settings: Grid, grid_config: GridConfig, cells: list[Cell], part: list[Cell], folder: Path) -> int:
    """Run the cells of this part that are not finished, and return how many failed; cells: all of the grid."""
    experiment, probes = grid_config.experiment, grid_config.probes
    on_main_process(partial(check_own, folder, MARKS))
    on_main_process(partial(_hold, folder, settings.part, settings.overwrite))
    if settings.overwrite:
        on_main_process(partial(_clear, folder))
    _check_rules(folder, cells, part)
    for seed in sorted({cell.seed for cell in cells}):
        claimed = _Claim(dataclasses.replace(experiment, seed=seed), str(_seed_folder(folder, seed)))
        claim(claimed, partial(_packaged, experiment), exclusive=False)
    console = screen()
    count = failed = unrecorded = lacking = 0
    for seed, cells_of_seed in itertools.groupby(sorted(part, key=_seed), _seed):
        workspace = SeedWorkspace(dataclasses.replace(experiment, seed=seed), _seed_folder(folder, seed))
        for cell in cells_of_seed:
            count += 1
            path = _record_path(folder, cell)
            kept = read_record(path) if path.exists() else None
            if kept is not None and kept.error is None:
                inputs = kept.inputs
                changed = difference(inputs, workspace.contents(cell)) if is_main_process() else None
                if not broadcast_from_first(changed is not None):
                    unrecorded += not inputs
                    lacking += any(METRIC[probe] not in kept.metrics for probe in probes)
                    continue
                console.print(f"{cell.name}: {changed}, so it runs again")
            record = _record(workspace, cell, probes)
            on_main_process(partial(_write, path, record, cell, workspace))
            failed += record.error is not None
            console.print(f"{count}/{len(part)} {_summary(record)}")
            drop_programs_if_many()  # otherwise the next cells reuse them
    if unrecorded:
        console.print(f"{unrecorded} cells are of a version that recorded no inputs: they are kept as they are")
    if lacking:
        console.print(f"{lacking} finished cells lack a probe of the grid file: delete their files to run them again")
    on_main_process(partial(release, _part_folder(folder, settings.part)))
    return failed


@checked
@dataclasses.dataclass(frozen=True)
class _Claim:
    """The settings of a seed's shared stages, which may not change when the grid is resumed; cells may be added."""

    experiment: GridExperiment
    out: str


def _check_rules(folder: Path, cells: list[Cell], part: list[Cell]) -> None:
    """Raise UserError if other seeds of a cell were scored by older rules, since a mean must not mix the two."""

    def without_seed(cell: Cell) -> Cell:
        return dataclasses.replace(cell, seed=0)

    paths = {cell: _record_path(folder, cell) for cell in cells}
    records = {cell: read_record(path) for cell, path in paths.items() if path.exists()}
    finished = {cell: record for cell, record in records.items() if not record.error}
    _current(finished.values(), folder)
    older = {without_seed(cell): record.rules for cell, record in finished.items() if record.rules != RULES}
    for cell in part:
        rules = older.get(without_seed(cell))
        if cell not in finished and rules is not None:
            raise UserError(
                f"{folder}: other seeds of {cell.name} were scored by version {rules} of the rules, and this one would "
                f"be by version {RULES}: give another --out, or --only report"
            )


def _current(records: Iterable[Record], folder: Path) -> list[Record]:
    """The records. Raises UserError if one is of a version whose cells had other settings."""
    names = {field.name for field in dataclasses.fields(Cell)}
    if any(set(record.cell) != names for record in records):
        raise UserError(f"{folder} has cells of an older version, which had other settings: give another --out")
    return list(records)


def _packaged(experiment: GridExperiment) -> Inputs:
    """The content of the experiment's model and of the packaged rows that cells are made of."""
    model_content = {f"--model {experiment.model}": known(model, experiment.model)}
    return model_content | packaged((*sources(experiment.eval_split), "asdiv", "bbq"))


def _hold(folder: Path, part: str, exclusive: bool) -> None:
    """Lock this part for this process; exclusive: no other process may run a part.

    Raises UserError if another process has this part, divides the grid differently, or runs any part if this one is
    exclusive.
    """
    part_folder = _part_folder(folder, part)
    acquire(part_folder)
    num_parts = part_folder.name.rpartition("-of-")[2]
    for other in (folder / "parts").iterdir():
        if other != part_folder and (exclusive or other.name.rpartition("-of-")[2] != num_parts):
            try:
                lock(other).release()
            except UserError:
                release(part_folder)
                raise UserError(
                    f"another process runs part {other.name.replace('-of-', '/')} of {folder}: divide the grid as it "
                    "does and leave --overwrite out, or wait until it ends"
                ) from None


def _part_folder(folder: Path, part: str) -> Path:
    return folder / "parts" / part.replace("/", "-of-")


def _seed_folder(folder: Path, seed: int) -> Path:
    return folder / f"seed-{seed}"


def _record_path(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / f"{cell.name}.json"


def _clear(folder: Path) -> None:
    """Delete the cells and the folders of seeds: those that a run has marked as its own."""
    for made in (folder / "cells", *(path.parent for path in folder.glob(f"seed-*/{INPUTS}"))):
        shutil.rmtree(made, ignore_errors=True)


def _part(cells: list[Cell], part: str) -> list[Cell]:
    index, count = map(whole_number, part.partition("/")[::2])
    if index is None or count is None or not 1 <= index <= count:
        raise UserError(f"part is {part!r}: give i/n with 1 <= i <= n, such as 1/2")
    return cells[index - 1 :: count]


def _seed(cell: Cell) -> int:
    return cell.seed


def _write(path: Path, record: Record, cell: Cell, workspace: SeedWorkspace) -> None:
    """Store a cell's record, with the digests of its inputs."""
    complete = dataclasses.replace(record, inputs=workspace.contents(cell))
    write(path, json.dumps(dataclasses.asdict(complete)))


def _record(workspace: SeedWorkspace, cell: Cell, probes: Sequence[FurtherProbe]) -> Record:
    start, compiled_before = time.monotonic(), seconds_compiling()
    metrics: Outcomes = {}
    seconds_of: dict[str, float] = {}
    error = None
    try:
        metrics = cell_outcomes(workspace, cell, probes, seconds_of)
    except Exception as failure:  # it is reported, and the other cells run
        traceback.print_exc()
        error = " ".join(f"{type(failure).__name__}: {failure}".split())[:300]
    seconds_of["compiled"] = seconds_compiling() - compiled_before
    return Record(cell.settings, metrics, time.monotonic() - start, error, RULES, seconds_of=seconds_of)


def _summary(record: Record) -> str:
    """A line on the screen."""
    defense = record.cell["defense"]
    if record.error:
        return f"{defense}: FAILED, {record.error[:80]}"
    means = {name: sum(values) / len(values) for name, values in record.metrics.items()}
    shown = ("refusal", "over_refusal", "task", "bias", "caps", "drift", "first_grad_norm")
    scores = "  ".join(f"{name} {means[name]:.2f}" for name in shown if name in means)
    fields = ("attack", "poison", "samples", "learning_rate", "optimizer", "seed")
    settings = ", ".join(f"{name} {record.cell[name]}" for name in fields)
    parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in record.seconds_of.items())
    return f"{defense} ({settings}): {scores}  [{record.seconds:.0f} s: {parts}]"
