"""The file survives a round trip or is refused, and every view shows what the file holds."""

import io
import json
import os
import struct

import numpy as np
import pytest
from rich.console import Console

from secvec_jax.errors import UserError
from secvec_jax.evaluation import plots, report
from secvec_jax.evaluation import results as results_file
from secvec_jax.evaluation.results import PACKAGES, SCHEMA_VERSION, Results, environment_facts

NAMES = ("base", "aligned", "benign only", "plain", "random control", "security vectors")


def score(value, n=64, low=None, high=None):
    return {"value": value, "n": n, "ci95": [value if low is None else low, value if high is None else high]}


@pytest.fixture
def results():
    rows = [
        {
            "name": name,
            "metrics": {
                "drift": score(0.0123 + i, low=0.011, high=1.5 + i),
                "rouge1": score(0.314 + i / 100),
                "refusal": score(0.1 * i, low=max(0, 0.1 * i - 0.07), high=0.1 * i + 0.06),
                "exact_match": score(0.9, n=32 + i),
            },
        }
        for i, name in enumerate(NAMES)
    ]
    del rows[0]["metrics"]["drift"]
    return Results("python train.py quickstart", {"lr": 0.1}, {"cpus": 2}, {"align": 61.25}, rows)


@pytest.fixture
def curves():
    steps = range(60)
    plain = [(step, 3 * 0.95**step + 0.1) for step in steps]
    return {
        "benign only": {"benign": plain},
        "plain": {"harmful": plain, "benign": plain},
        "security vectors": {"harmful": [(step, 0.1) for step in steps], "benign": plain},
    }


def show(renderable, width=160):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def png_size(path):
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:])


def pixels(path):
    from matplotlib.image import imread

    return (imread(path)[..., :3] * 255).round().astype(int)


def has_color(path, color):
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(pixels(path) - wanted).max(axis=-1) <= 1).sum()) > 100


class TestFile:
    def test_round_trip(self, tmp_path, results):
        path = results.save(tmp_path / "new" / "run")
        assert path.name == "results.json"
        assert Results.load(path.parent) == results
        assert json.loads(path.read_text())["schema_version"] == SCHEMA_VERSION == 1
        assert [item.name for item in path.parent.iterdir()] == ["results.json"]

    def test_a_file_without_a_schema_version_is_of_version_1(self, tmp_path, results):
        path = results.save(tmp_path)
        contents = json.loads(path.read_text())
        del contents["schema_version"]
        path.write_text(json.dumps(contents))
        assert Results.load(tmp_path) == results

    @pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.5])
    def test_another_schema_version_is_refused_in_one_line(self, tmp_path, results, version):
        path = results.save(tmp_path)
        path.write_text(json.dumps({"schema_version": version}))
        with pytest.raises(UserError, match=r"results\.json: schema_version is .*reads 1: use the version") as error:
            Results.load(tmp_path)
        assert "\n" not in str(error.value)

    def test_nan_is_stored_as_null_and_numpy_as_numbers(self, tmp_path, results):
        results.rows[1]["metrics"]["drift"] = score(float("nan"), low=-np.inf, high=np.float32("nan"))
        results.seconds["tune"] = np.float32(1.5)
        results.config = {"folder": tmp_path, "steps": np.int64(7), "betas": (0.9, 0.99), "seed": None}
        results.save(tmp_path)
        loaded = Results.load(tmp_path)
        assert loaded.rows[1]["metrics"]["drift"] == {"value": None, "n": 64, "ci95": [None, None]}
        assert loaded.seconds["tune"] == 1.5
        assert loaded.config == {"folder": str(tmp_path), "steps": 7, "betas": [0.9, 0.99], "seed": None}

    def test_a_failed_save_leaves_the_old_file_and_nothing_else(self, tmp_path, results, monkeypatch):
        results.save(tmp_path)
        before = (tmp_path / "results.json").read_bytes()
        results.command = "another"

        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            results.save(tmp_path)
        assert [item.name for item in tmp_path.iterdir()] == ["results.json"]
        assert (tmp_path / "results.json").read_bytes() == before

    def test_what_json_cannot_hold_is_refused_before_writing(self, tmp_path, results):
        results.config["model"] = object()
        with pytest.raises(UserError, match="object"):
            results.save(tmp_path)
        assert not list(tmp_path.iterdir())

    def test_a_missing_file_names_the_fix(self, tmp_path):
        with pytest.raises(UserError, match="folder of a finished run"):
            Results.load(tmp_path)

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", "\xff\xfe", '{"command": NaN}'])
    def test_malformed_json_is_refused(self, tmp_path, text):
        (tmp_path / "results.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=r"results\.json"):
            Results.load(tmp_path)

    @pytest.mark.parametrize(
        "key, value",
        [
            ("command", 3),
            ("config", None),
            ("seconds", {"align": "long"}),
            ("seconds", {"align": True}),
            ("rows", {}),
            ("rows", ["plain"]),
            ("rows", [{"metrics": {}}]),
            ("rows", [{"name": "plain"}]),
            ("rows", [{"name": "plain", "metrics": {"refusal": 0.5}}]),
            ("rows", [{"name": "plain", "metrics": {"refusal": {"value": 0.5, "n": 4}}}]),
            ("rows", [{"name": "plain", "metrics": {"refusal": {"value": 0.5, "n": 4, "ci95": [1]}}}]),
            ("rows", [{"name": "plain", "metrics": {"refusal": {"value": "x", "n": 4, "ci95": [0, 1]}}}]),
            ("rows", [{"name": "plain", "metrics": {"refusal": {"value": 1, "n": None, "ci95": [0, 1]}}}]),
        ],
    )
    def test_a_wrong_form_is_refused_at_both_ends(self, tmp_path, results, key, value):
        path = results.save(tmp_path)
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
        with pytest.raises(UserError, match=key.rstrip("s") + "|metrics|refusal"):
            Results.load(tmp_path)
        setattr(results, key, value)
        with pytest.raises(UserError):
            results.save(tmp_path)


def test_environment_reads_versions():
    facts = environment_facts()
    assert facts["numpy"] == np.__version__
    assert set(PACKAGES) < set(facts)
    json.dumps(facts)


def test_a_missing_package_has_no_version(monkeypatch):
    monkeypatch.setattr(results_file, "PACKAGES", ("no-such-package-here",))
    assert environment_facts()["no-such-package-here"] is None


class TestTable:
    def test_columns_come_in_the_fixed_order_and_rows_take_a_line(self, results):
        lines = show(report.table(results)).splitlines()
        titles = ("refusal", "exact match", "drift", "rouge1")
        places = [max(line.find(title) for line in lines[:2]) for title in titles]
        assert places == sorted(places) and places[0] > 0
        assert len([line for line in lines if line.strip()]) == 2 + len(NAMES)

    def test_rates_are_percent_with_interval_and_losses_are_three_digits(self, results):
        text = show(report.table(results))
        assert "50% [43, 56]" in text
        assert "5.01" in text and "[0.011" not in text

    def test_n_is_in_the_header_when_shared_and_in_the_cells_otherwise(self, results):
        text = show(report.table(results))
        assert text.splitlines()[1].count("n=64") == 3
        assert "n=37" in text

    def test_missing_and_null_are_a_dash(self, results):
        results.rows[1]["metrics"]["drift"]["value"] = None
        base, aligned = show(report.table(results)).splitlines()[2:4]
        assert " - " in base and " - " in aligned

    def test_names_are_no_markup(self, results):
        results.rows[0]["name"] = "[red]base[/red]"
        assert "[red]base[/red]" in show(report.table(results))

    def test_no_rows_still_print(self):
        assert "model" in show(report.table(Results("command")))

    def test_a_narrow_console_loses_no_digit(self, results):
        assert "\u2026" not in show(report.table(results), width=50)

    @pytest.mark.parametrize("width", [50, 60, 80, 118, 200])
    def test_no_word_is_broken_and_no_line_is_too_long(self, results, width):
        results.rows[0]["name"] = "security vectors of another objective, harmful rows alone, 1000 of them"
        metrics = results.rows[0]["metrics"]
        metrics |= {name: dict(metrics["refusal"]) for name in ("compliance", "unclear", "prefill_25", "over_refusal")}
        text = show(report.table(results), width=width)
        assert max(map(len, text.splitlines())) <= width
        for word in ("refusal", "compliance", "unclear", "exact", "objective,", "[43,", "↑", "↓"):
            assert word in text.split(), word


class TestCompare:
    def test_rows_of_several_runs_stand_under_their_names(self, tmp_path, results):
        for name in ("first", "second"):
            results.save(tmp_path / name)
        lines = show(report.compare([tmp_path / "first", tmp_path / "second"])).splitlines()[2:]
        assert sum(line.startswith("first ") for line in lines) == len(NAMES)
        assert sum(line.startswith("second ") for line in lines) == len(NAMES)

    def test_runs_of_one_name_are_distinguished(self, tmp_path, results):
        folders = [tmp_path / parent / "run" for parent in "ab"]
        for folder in folders:
            results.save(folder)
        text = show(report.compare(folders), width=300)
        assert str(folders[0]) in text and str(folders[1]) in text

    def test_nothing_to_compare_is_a_mistake(self, tmp_path):
        with pytest.raises(UserError, match="nothing to compare"):
            report.compare([])
        with pytest.raises(UserError, match="no readable"):
            report.compare([tmp_path / "absent"])


class TestMarkdown:
    def test_every_number_is_there(self, results):
        text = report.markdown(results)
        for i in range(len(NAMES)):
            assert f"{10 * i}%" in text
            assert f"n={32 + i}" in text
            assert f"{0.314 + i / 100:.3f}" in text
        assert "5.01 [0.0110, 6.50]" in text
        assert "| align | 61.2 |" in text
        assert "refusal ↑ (n=64)" in text

    def test_verdicts_notes_images_environment_and_total(self, results):
        results.seconds["tune"] = 38.75
        results.environment = {"cpus": 2, "devices": ["gpu:0", "gpu:1"], "grain": None}
        text = report.markdown(
            results, [("Holds", True, "3 of 4"), ("Fails", False, "1 of 4")], ["scores.png"], ["A caution."]
        )
        for line in (
            "python train.py quickstart",
            "- [x] Holds: 3 of 4",
            "- [ ] Fails: 1 of 4",
            "![scores](scores.png)",
            "A caution.",
            "| total | 100.0 |",
            "| devices | gpu:0, gpu:1 |",
            "| grain | - |",
        ):
            assert line in text.splitlines()

    def test_each_line_of_the_table_has_the_same_cells(self, results):
        results.rows[0]["name"] = "a|b"
        lines = [line for line in report.markdown(results).splitlines() if line.startswith("|")][:8]
        assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1


class TestWrite:
    def test_report_and_plots(self, tmp_path, results, curves):
        path = report.write(tmp_path / "run", results, [("Claim", True, "detail")], curves, ["Note."])
        assert sorted(item.name for item in path.parent.iterdir()) == [
            "losses.png",
            "report.md",
            "scores.png",
        ]
        text = path.read_text()
        for name in ("scores.png", "losses.png"):
            image = path.parent / name
            assert f"]({name})" in text
            assert png_size(image) == (1500, 675)
            assert pixels(image).std() > 10

    def test_a_row_has_one_color_in_both_plots(self, tmp_path, results, curves):
        report.write(tmp_path, results, curves=curves)
        for name in ("security vectors", "plain"):
            for plot in ("scores.png", "losses.png"):
                assert has_color(tmp_path / plot, plots._FIXED_COLORS[name])
        assert not has_color(tmp_path / "losses.png", plots._FIXED_COLORS["random control"])

    def test_only_what_has_data_is_drawn(self, tmp_path):
        rows = [{"name": "plain", "metrics": {"drift": score(0.1)}}]
        empty = {"plain": {"harmful": [], "benign": [(0, 0.0), (1, float("nan"))]}}
        text = report.write(tmp_path, Results("command", rows=rows), curves=empty).read_text()
        assert [item.name for item in tmp_path.iterdir()] == ["report.md"]
        assert "png" not in text

    def test_unknown_rows_nulls_and_a_single_point_are_drawn(self, tmp_path):
        rows = [
            {"name": "vaccine", "metrics": {"refusal": {"value": 0.5, "n": 2, "ci95": [None, None]}}},
            {"name": "forget filter", "metrics": {"refusal": score(float("nan")), "compliance": score(1)}},
        ]
        report.write(tmp_path, Results("command", rows=rows), curves={"vaccine": {"benign": [(1, 2.0)]}})
        assert has_color(tmp_path / "scores.png", plots._SPARE_COLORS[0])
        assert has_color(tmp_path / "scores.png", plots._SPARE_COLORS[1])

    def test_malformed_results_are_refused_before_writing(self, tmp_path):
        with pytest.raises(UserError, match="metrics"):
            report.write(tmp_path, Results("command", rows=[{"name": "plain"}]))
        assert not list(tmp_path.iterdir())


def test_the_moving_average_keeps_constants_and_length():
    assert plots._smooth(np.full(57, 2.0)) == pytest.approx(np.full(57, 2.0))
    noisy = np.random.default_rng(0).normal(5, 1, 200)
    assert plots._smooth(noisy).std() < 0.5 * noisy.std()
