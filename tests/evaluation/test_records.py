"""Records of a grid's cells are read strictly: what is missing, unknown or malformed is named."""

import json

import pytest

from secvec_jax.errors import UserError
from secvec_jax.evaluation.records import Record, read


def contents(seed=0, metrics=None, error=None, **more):
    cell = {"defense": "plain", "attack": "harmful", "poison": 0.1, "seed": seed} | more
    return {"cell": cell, "metrics": metrics or {}, "seconds": 9.5, "error": error}


def record(**options):
    return Record.from_dict(contents(**options))


class TestRecord:
    def test_reads_the_form(self):
        read_back = record(metrics={"refusal": [1, 0.0]}, lora_rank=8, shuffled=True, note=None)
        assert read_back.metrics == {"refusal": (1, 0.0)}
        assert read_back.cell["lora_rank"] == 8
        assert (read_back.seconds, read_back.error) == (9.5, None)

    def test_a_record_without_rules_is_of_version_1(self):
        assert record(metrics={"refusal": [1]}).rules == 1

    def test_a_metric_of_nulls_is_missing(self):
        assert record(metrics={"auroc": [None], "drift": [0.1]}).metrics == {"drift": (0.1,)}

    def test_an_unknown_field_is_named_with_the_known_ones(self):
        with pytest.raises(
            UserError,
            match=r"unknown 'duration': the fields are 'cell', 'error', 'inputs', 'metrics', 'rules', 'seconds'",
        ):
            Record.from_dict(contents(metrics={"drift": [1]}) | {"duration": 3})

    @pytest.mark.parametrize("field", ["cell", "metrics", "seconds", "error"])
    def test_a_missing_field_is_named(self, field):
        whole = contents(metrics={"drift": [1]})
        with pytest.raises(UserError, match=f"no '{field}'"):
            Record.from_dict({name: value for name, value in whole.items() if name != field})

    @pytest.mark.parametrize(
        "change",
        [
            {"cell": []},
            {"cell": {"defense": "plain"}},
            {"cell": {"seed": "0"}},
            {"cell": {"seed": 0, "defense": ["plain"]}},
            {"cell": {"seed": 0, "poison": float("nan")}},
            {"metrics": []},
            {"metrics": {}},
            {"metrics": {"refusal": []}},
            {"metrics": {"refusal": 0.5}},
            {"metrics": {"refusal": [1, None]}},
            {"metrics": {"refusal": [1, True]}},
            {"metrics": {"refusal": [1, float("inf")]}},
            {"seconds": "long"},
            {"seconds": None},
            {"error": 3},
            {"error": ""},
            {"rules": 0},
        ],
    )
    def test_a_wrong_form_is_refused(self, change):
        with pytest.raises(UserError, match=r"^somewhere: .*records\.py"):
            Record.from_dict(contents(metrics={"drift": [1]}) | change, "somewhere")

    def test_no_object_is_refused(self):
        with pytest.raises(UserError, match="not an object"):
            Record.from_dict([])


class TestRead:
    def test_all_cells_by_name(self, tmp_path):
        (tmp_path / "cells").mkdir()
        for name, seed in (("b", 1), ("a", 0)):
            text = json.dumps(contents(seed=seed, metrics={"drift": [0.5]}))
            (tmp_path / "cells" / f"{name}.json").write_text(text)
        (tmp_path / "cells" / "a.json.tmp").write_text("{")
        assert [r.cell["seed"] for r in read(tmp_path)] == [0, 1]

    def test_none_is_a_mistake(self, tmp_path):
        with pytest.raises(UserError, match="finished cells"):
            read(tmp_path)

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"cell": NaN}', "\xff"])
    def test_a_malformed_file_is_named(self, tmp_path, text):
        (tmp_path / "cells").mkdir()
        (tmp_path / "cells" / "broken.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=r"broken\.json"):
            read(tmp_path)
