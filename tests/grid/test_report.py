"""The report of a grid: what is shown together, which differences, and how many cells have been measured."""

import random
import re
from pathlib import Path
from typing import Any

import pytest

from secvec_jax import config
from secvec_jax.defenses.registry import read_defense
from secvec_jax.errors import UserError
from secvec_jax.evaluation.records import Record
from secvec_jax.evaluation.statistics import Difference, SeededScore, seeded_bootstrap
from secvec_jax.evaluation.tables import MAX_COLUMNS
from secvec_jax.grid import report as grid_report
from secvec_jax.grid.cells import Cell
from secvec_jax.grid.grid import GridConfig
from secvec_jax.grid.report import Layout

ROOT = Path(__file__).parents[2]
RATES = ("refusal", "compliance", "over_refusal", "task", "bias", "refusal_persona")


def cell_of(defense: Any, **settings: Any) -> Cell:
    return Cell(read_defense(defense), **settings)


def record(cell: Cell) -> Record:
    """Made-up outcomes."""
    draw = random.Random(cell.name)
    metrics: dict[str, Any] = {name: [float(draw.random() < 0.5) for _ in range(4)] for name in RATES}
    metrics |= {"harmful_loss": [draw.random() for _ in range(3)], "embedding_drift": [draw.random()]}
    lone = ("drift", "f1", "auroc", "dropped_attack", "dropped_task", "first_attack", "first_grad_norm")
    return Record(cell.settings, metrics | {name: [draw.random()] for name in lone}, 1.0)


def report(folder: Path, layout: Layout, cells: list[Cell], records: list[Record] | None = None) -> str:
    records = [record(cell) for cell in cells] if records is None else records
    grid_report.write(folder, "command", {}, [layout], [cells], records)
    return (folder / "report.md").read_text()


def tables(text: str) -> list[str]:
    return [part for part in text.split("\n\n") if part.startswith("|")]


SHIPPED = sorted(path for folder in ("grids", "papers") for path in (ROOT / "configs" / folder).glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_table_of_a_shipped_grid_can_be_read(path, tmp_path, monkeypatch):
    for module in ("evaluation.pivot", "grid.gap"):  # resampling thousands of cells is slow
        monkeypatch.setattr(f"secvec_jax.{module}.seeded_bootstrap", _score)
        monkeypatch.setattr(f"secvec_jax.{module}.paired", _difference)
    monkeypatch.setattr(grid_report, "_plots", lambda *_: [])
    plan = config.load(GridConfig, path)
    shown = [[cell for cell in plan.cells(one.of or one.name) if cell.seed < 2] for one in plan.tables]
    records = [record(cell) for cell in {cell for some in shown for cell in some}]
    grid_report.write(tmp_path, "command", {}, plan.tables, shown, records)
    text = (tmp_path / "report.md").read_text()
    assert all(f"## {layout.name}\n" in text for layout in plan.tables) and not re.search(r"^0 of ", text, re.M)
    assert tables(text)
    for table in tables(text):
        head = table.partition("\n")[0]
        assert head.count(" | ") < MAX_COLUMNS
        assert ("| refusal ↑" in table) == ("| harmful loss ↑" in table), head
        assert "| refusal ↑" not in table or "| compliance ↓" in table
    for layout in plan.tables:
        assert not layout.differences or f"**{layout.name}, differences**" in text


def _score(samples, is_rate) -> SeededScore:
    flat = [value for sample in samples for value in sample]
    return SeededScore(sum(flat) / len(flat), len(flat), (0.0, 1.0), len(samples))


def _difference(a, b, is_rate) -> Difference:
    return Difference(0.5, sum(map(len, a)), (0.0, 1.0), len(b))


def test_differences_come_between_our_table_and_the_published_ones(tmp_path):
    cells = [cell_of(name, poison=p, seed=s) for name in ("none", "kl") for p in (0.1, 0.2) for s in (0, 1)]
    layout = Layout("B", columns=("poison",), differences=("kl minus none", "kl minus ewc"), published=("REPNOISE_1",))
    text = report(tmp_path, layout, cells)
    places = [text.index(part) for part in ("| 0.1 | 0.2 |", "**B, differences**", "**RepNoise, Table 1**")]
    assert places == sorted(places)
    assert text.count("| kl minus none | refusal ↑ |") == 1 and "minus ewc" not in text


def test_plots_are_of_what_the_layout_names(tmp_path):
    cells = [cell_of(name, poison=p) for name in ("none", "kl") for p in (0.1, 0.2)]
    layout = Layout("B", columns=("poison",), pareto=("task", "refusal"), sweep=("task",))
    text = report(tmp_path, layout, cells)
    for name in ("b-pareto-0.1.png", "b-pareto-0.2.png", "b-sweep-task.png"):
        assert f"]({name})" in text and (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("rows", [(), ("defense", "poison", "seed", "task", "attack")])
def test_a_row_is_named_by_one_to_four_fields(rows):
    with pytest.raises(UserError, match="1 to 4 fields"):
        Layout("A", rows=rows)


def test_points_and_lines_are_the_scores(tmp_path):
    cells = [cell_of(name, poison=p) for name in ("none", "kl") for p in (0.1, 0.2)]
    records = [record(cell) for cell in cells]
    del records[3].metrics["task"]
    layout = Layout("B", columns=("poison",), metrics=("refusal", "task"))
    summary = grid_report._summary(layout, records)
    assert grid_report._sweep(summary, layout, "task") == {
        name: [(r.cell["poison"], seeded_bootstrap([r.metrics["task"]])) for r in records
               if r.cell["defense"] == name and "task" in r.metrics]
        for name in ("none", "kl")
    }  # fmt: skip
    (_, first), (_, second) = grid_report._by_setting(summary)
    points = grid_report._points(first, layout.rows, "task", "refusal")
    assert points["kl"] == tuple(seeded_bootstrap([records[2].metrics[m]]) for m in ("task", "refusal"))
    assert list(grid_report._points(second, layout.rows, "task", "refusal")) == ["none"]


def test_a_table_shows_the_cells_that_it_names(tmp_path):
    cells = [
        cell_of(name, poison=p, attack=a) for name in ("none", "kl") for p in (0.1, 0.2) for a in ("harmful", "bias")
    ]
    text = report(tmp_path, Layout("A", attack=("bias",), poison=(0.2,), metrics=("bias",)), cells)
    assert "2 of 2 cells." in text and "attack bias, task profiles, poison 0.2" in text


def test_what_was_not_measured_is_said(tmp_path):
    cells = [cell_of("none"), cell_of("vaccine"), cell_of({"name": "vaccine", "rho": 8})]
    failed = Record(cell_of("kl").settings, {}, 1.0, "out of memory")
    text = report(tmp_path, Layout("A"), cells, [*map(record, cells), failed])
    counts = dict(re.findall(r"(?m)^- (\d+): (.*)$", text.partition("## Cells of each defense")[2]))
    assert "3 finished cells" in text
    assert counts["1"] == "none" and counts["2"] == "vaccine" and ", kl," in counts["0"] and "booster" in counts["0"]


@pytest.mark.parametrize("pair", ["kl", "kl minus ", " minus none", "kl - none"])
def test_a_difference_names_two_defenses(pair):
    with pytest.raises(UserError, match="FIRST minus SECOND"):
        Layout("A", differences=(pair,))
