"""`eval.py compare` says where runs were not measured on the same."""

import json

from secvec_jax import cli, command_line
from secvec_jax.evaluation.results import Results
from secvec_jax.recipes.compare import measured_otherwise

REFUSAL = [{"name": "tuned", "metrics": {"refusal": {"value": 0.5, "n": 64, "ci95": [0.4, 0.6], "rules": 3}}}]
DRIFT = [{"name": "tuned", "metrics": {"drift": {"value": 0.5, "n": 1, "ci95": [0.5, 0.5]}}}]


def run(rows=REFUSAL, **config):
    return Results("eval.py score", config, rows=rows)


def test_settings_that_decide_what_is_measured_are_named_where_they_differ(tmp_path, capsys):
    scored = {"harmful": ["harmbench"], "limit": 64, "reply_tokens": 32, "system": None, "model": "a"}
    runs = {"a": run(**scored), "b": run(**scored | {"model": "b"}), "c": run(**scored | {"harmful": ["advbench"]})}
    assert measured_otherwise({name: runs[name] for name in "ab"}) == []
    assert measured_otherwise(runs) == ['--harmful is ["harmbench"] in a, b; ["advbench"] in c.']
    folders = [tmp_path / name for name in runs]
    for folder, each in zip(folders, runs.values()):
        each.save(folder)
    assert command_line.main("", cli.EVAL, ["compare", "--runs", *map(str, folders)]) == 0
    assert "Not comparable: --harmful is" in capsys.readouterr().out


def test_prompts_of_one_name_and_other_content_are_named(tmp_path, capsys):
    """As those of a file that was edited between two runs."""
    for name, content in {"a": "sha256:1", "b": "sha256:2", "c": "sha256:1"}.items():
        run(harmful=["p.jsonl"]).save(tmp_path / name)
        (tmp_path / name / "inputs.json").write_text(json.dumps({"--harmful p.jsonl": content, "--model m": content}))
    folders = [str(tmp_path / name) for name in "abc"]
    assert command_line.main("", cli.EVAL, ["compare", "--runs", *folders]) == 0
    a, b, c = folders
    told = [line for line in capsys.readouterr().out.replace("\n", " ").split("Not comparable: ")]
    assert [" ".join(line.split()) for line in told[1:]] == [f"--harmful p.jsonl was changed between {a}, {c} and {b}."]


def test_rows_to_train_on_and_runs_without_a_common_metric_are_not_named():
    trained = {"training": {"epochs": 1}, "harmful": ["a.jsonl"], "check_prompts": 24}
    others = {"tuned": run(**trained), "tuned again": run(**trained | {"harmful": ["b.jsonl"], "check_prompts": 48})}
    assert measured_otherwise(others) == ["--check-prompts is 24 in tuned; 48 in tuned again."]
    assert measured_otherwise({"a": run(limit=1), "b": run(DRIFT, limit=2)}) == []
    with_system = {"a": run(system=None), "b": run(system="[b] Be brief.")}
    assert measured_otherwise(with_system) == ['--system is not set in a; "[b] Be brief." in b.']
