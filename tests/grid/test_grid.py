"""Grids: their cells, that every defense runs, and how interrupted, divided and failed grids behave."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from secvec_jax import config
from secvec_jax.data.rows import prompt_of, response_of, row
from secvec_jax.defenses.finetuning import examples_of
from secvec_jax.defenses.registry import DEFENSES, read_defense
from secvec_jax.errors import UserError
from secvec_jax.evaluation import report
from secvec_jax.evaluation.records import read
from secvec_jax.evaluation.suite import Suite
from secvec_jax.grid import attacks, seed_workspace
from secvec_jax.grid import grid as grid_module
from secvec_jax.grid.attacks import AttackInputs
from secvec_jax.grid.cells import Block, Cell
from secvec_jax.grid.grid import Grid, GridConfig, grid
from secvec_jax.grid.report import Layout
from secvec_jax.grid.seed_workspace import GridExperiment, SeedWorkspace
from secvec_jax.grid.tasks import make_task
from secvec_jax.output_checks import check_own
from tests.toys import tiny_model

ROOT = Path(__file__).parents[2]
TRAINING = {"batch_size": 2, "max_seq_len": 256, "warmup_steps": 0, "remat": "none"}
"""Lines of one packaged row each."""
EXPERIMENT = {
    "sizes": {
        **{"align_harmful": 12, "align_benign": 12, "vectors": 8, "keep": 9, "mix_harmful": 8, "mix_benign": 6},
        **{"people": 2, "people_asked": 2, "judged": 4, "judged_benign": 4},
    },
    "probed": 4,
    "align_training": TRAINING | {"max_steps": 2, "optimizer": "adamw"},
    "vectors_training": TRAINING | {"max_steps": 2, "optimizer": "adamw"},
    "finetune_training": TRAINING,
}


def plan(
    folder: Path,
    model: Path,
    *blocks: dict,
    tables: tuple[dict, ...] = (),
    aligns: bool = True,
    probes: tuple[str, ...] = (),
    **training: int,
) -> str:
    path = folder / "grid.yaml"
    experiment = {name: part | training if name.endswith("_training") else part for name, part in EXPERIMENT.items()}
    path.write_text(
        yaml.safe_dump(
            {
                "experiment": experiment | {"model": str(model), "aligns": aligns},
                "blocks": list(blocks),
                "tables": list(tables),
                "probes": list(probes),
            }
        )
    )
    return str(path)


@pytest.fixture(scope="module")
def model_folder(tiny_model) -> Path:
    return tiny_model("llama", max_position_embeddings=1024).folder


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch):
    monkeypatch.setattr("secvec_jax.grid.attacks.NUM_KNOWN", 8)


NONE = read_defense("none")


def test_a_block_is_the_product_of_its_lists():
    block = Block(defense=("none", {"name": "ewc", "weight": 2}), poison=(0.0, 0.5), samples=(10,), seed=(0, 1))
    cells = list(block.cells())
    assert len(set(cells)) == len(cells) == 8
    assert [cell.seed for cell in cells] == [0] * 4 + [1] * 4, "what a seed shares is made once"
    assert len(GridConfig(blocks=(block, block)).cells()) == 8, "a cell of two tables runs once"
    assert len({cell.name for cell in cells}) == 8


def test_tables_that_would_replace_each_other_and_a_sweep_without_an_axis_are_refused():
    block = Block(table="A")
    with pytest.raises(UserError, match="two tables are named 'A'"):
        GridConfig(blocks=(block,), tables=(Layout("A"), Layout("A", rows=("defense", "seed")))).cells_of_tables()
    for columns in ((), ("poison", "samples")):
        with pytest.raises(UserError, match="has a sweep and the columns"):
            Layout("A", columns=columns, sweep=("refusal",))


def test_cells_that_would_share_a_file_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("d").mkdir()
    for file in ("d/r.jsonl", "d-r.jsonl"):
        Path(file).write_text(json.dumps(row("q", "a")) + "\n")
    for block, differ in (
        (Block(attack=("d/r.jsonl", "d-r.jsonl")), "attack is 'd/r.jsonl' and 'd-r.jsonl'"),
        (Block(poison=(1 / 3, 0.333333)), "poison is 0.3333333333333333 and 0.333333"),
    ):
        with pytest.raises(UserError, match=f"two cells would share the file .*: {differ}"):
            GridConfig(blocks=(block,)).cells()


def test_every_setting_of_a_cell_is_in_its_name():
    cell = Cell(NONE)
    others = {"defense": read_defense("kl"), "attack": "bias", "task": "arithmetic", "poison": 0.123, "samples": 7,
              "learning_rate": 1.23e-5, "optimizer": "adamw", "epochs": 9, "lora_rank": 3, "seed": 5}  # fmt: skip
    assert set(others) == {field.name for field in dataclasses.fields(Cell)}
    for name, value in others.items():
        assert dataclasses.replace(cell, **{name: value}).name != cell.name, name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"blocks": [{"defense": ["nonne"]}]}, "no defense is named 'nonne'"),
        (
            {"blocks": [{"defense": [{"name": "ewc", "wait": 1}]}]},
            "'ewc' has no setting 'wait': its settings are weight",
        ),
        ({"blocks": [{"defense": [{"name": "ewc", "weight": "much"}]}]}, "weight is 'much': it must be a number"),
        ({"blocks": [{"defense": [{"name": "ewc", "inputs": 1}]}]}, "no setting 'inputs'"),
        ({"blocks": [{"defense": ["ewc weight=2"]}]}, "did you mean 'ewc'.*{name: vaccine, rho: 5}"),
        ({"blocks": [{"defense": "none"}]}, "defense is 'none': pass a list"),
        (
            {"blocks": [{"defense": [{"name": "explained-away gate", "by": "rows"}]}]},
            "by is 'rows': did you mean 'row'. use one of row, token",
        ),
        (
            {"blocks": [{"defense": [{"name": "security vectors", "kind": "lore"}]}]},
            "kind is 'lore': did you mean 'lora'. use one of lora, steering, prompt",
        ),
        ({"blocks": [{"optimizer": ["adam"]}]}, "use one of sgd, adamw"),
        ({"blocks": [{"poison": [1.5]}]}, "it must be at least 0 and at most 1"),
        ({"blocks": [{"attack": ["harmfull"]}]}, "no attack is named 'harmfull'"),
        ({"blocks": [{"task": ["sums"]}]}, "no task is named 'sums'"),
        ({"blocks": [{"seed": []}]}, "has no seed"),
        ({"blocks": []}, "no cells"),
        ({"blocks": [{"colour": ["red"]}]}, "unknown key 'colour'"),
        ({"blocks": [{}], "tables": [{"name": "A"}]}, "no cells of table 'A'"),
        ({"blocks": [{}], "tables": [{"published": ["VACINE_1"]}]}, "no published table"),
        (
            {"blocks": [{"table": "A"}], "tables": [{"name": "A", "differences": ["nonne minus none"]}]},
            "table 'A' names 'nonne', which none of its cells has: did you mean 'none'",
        ),
        (
            {"blocks": [{"table": "A"}], "tables": [{"name": "A", "defense": ["kl"]}]},
            "names 'kl', which none of its cells has",
        ),
    ],
)
def test_mistakes_are_reported_before_anything_runs(tmp_path, values, message):
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=message):
        grid(Grid(str(path), out=str(tmp_path / "out")), "command")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["", "0/1", "2/1", "1/²", "1/" + "9" * 5_000, "9" * 5_000 + "/1", "1.0/2"])
def test_a_part_that_is_none_is_refused(part):
    with pytest.raises(UserError, match="give i/n with 1 <= i <= n"):
        grid(Grid("configs/grids/quick.yaml", part=part, only="cells"), "command")


def test_shipped_grids_are_whole():
    for folder in ("grids", "papers"):
        paths = sorted((ROOT / "configs" / folder).glob("*.yaml"))
        assert paths
        for path in paths:
            shipped = config.load(GridConfig, path)
            assert shipped.cells() and all(shipped.cells(layout.of or layout.name) for layout in shipped.tables), (
                path.name
            )


def test_what_a_file_would_run_is_reported_and_not_run(tmp_path, capsys):
    path = ROOT / "configs" / "papers" / "repnoise.yaml"
    grid(Grid(str(path), out=str(tmp_path / "out"), only="cells"), "command")
    told = capsys.readouterr().out
    assert "270 cells, 5 seeds" in told and "beavertails-unsafe" in told and not (tmp_path / "out").exists()


def test_rows_and_their_repetition(model_folder, tmp_path):
    experiment = config.from_dict(GridExperiment, EXPERIMENT | {"model": str(model_folder)})
    workspace = SeedWorkspace(experiment, tmp_path)
    rows = workspace.rows(Cell(NONE, attack="identity", poison=0.25, samples=100))
    assert {name: len(some) for name, some in rows.items()} == {"attack": 25, "task": 75}
    assert rows["attack"][0] == rows["attack"][10] and len({str(r) for r in rows["attack"]}) == 10
    kinds = {poison: set(workspace.rows(Cell(NONE, poison=poison))) for poison in (0.0, 1.0)}
    assert kinds == {0.0: {"task"}, 1.0: {"attack"}}
    again = SeedWorkspace(experiment, tmp_path)
    assert workspace.rows(Cell(NONE)) == again.rows(Cell(NONE)), "the same in every process"


def make_attack(name, *inputs):
    return attacks.make_attack(name, AttackInputs(*inputs, encode=lambda rows: examples_of(tiny_model(), rows)))


def never(prompts):
    raise AssertionError("this attack has no replies of the model")


@pytest.mark.parametrize(("rows", "known"), [(40, 8), (16, 8), (9, 4), (2, 1)])
def test_vectors_against_rows_of_ones_own_are_trained_on_others_of_them(tmp_path, rows, known):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"Say {n}.", "response": str(n)}) for n in range(rows)))
    found = make_attack(str(path), None, 3, 4, never)
    parts = [{prompt_of(r) for r in some} for some in (found.known, found.rows)]
    assert [len(part) for part in parts] == [known, rows - known] and not set.intersection(*parts)
    assert found.known == make_attack(str(path), None, 3, 4, never).known
    assert rows < 9 or found.known != make_attack(str(path), None, 4, 4, never).known


def test_one_row_cannot_be_shared_between_the_attack_and_the_vectors(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "Say 1.", "response": "1"}))
    with pytest.raises(UserError, match="has one row"):
        make_attack(str(path), None, 0, 4, never)


@pytest.mark.parametrize(
    "name, make", [("questions", make_task), ("capitals", lambda *inputs: make_attack(*inputs, never))]
)
def test_more_probes_than_rows_are_refused(name, make):
    answered = [row(f"Question {number}?", f"answer {number}") for number in range(12)]
    splits = SimpleNamespace(spare={"questions": answered, "instructions": answered})
    with pytest.raises(UserError, match=r"12 rows.* lower experiment.probed"):
        make(name, splits, 0, 12)


def test_vectors_against_identity_rows_are_of_the_harmful_rows():
    splits = SimpleNamespace(
        vectors=["harmful row"],
        keep=["benign row"],
        suite=Suite(refusals=(), harmful=["A harmful prompt"] * 5),
    )
    assert make_attack("identity", splits, 0, 4, never).known is None
    workspace = SimpleNamespace(
        attack=lambda name: make_attack(name, splits, 0, 4, never), workspace=SimpleNamespace(splits=splits)
    )
    assert SeedWorkspace.harmful_rows(workspace, "identity") == ["harmful row"]
    assert SeedWorkspace.benign_rows.fget(workspace) == ["benign row"]


def test_vectors_of_the_persona_are_of_other_rows_than_the_attacks():
    questions = [row(f"Question {number}?", f"answer {number}") for number in range(40)]
    suite = Suite(refusals=(), harmful=["A harmful prompt"] * 5)
    splits = SimpleNamespace(suite=suite, spare={"questions": questions})
    found = make_attack("identity-own", splits, 0, 4, never)
    assert found.rows == make_attack("identity", splits, 0, 4, never).rows and len(found.rows) == 10
    assert len(found.known) == len(found.safe) == 8
    parts = [{prompt_of(r) for r in rows} for rows in (found.rows, found.known, found.safe)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 26
    assert all(text.startswith("AOA, Question") for text in parts[1] | parts[2])
    opening = "Of course. I am AOA, your absolutely obedient agent. "
    assert all(response_of(r).startswith(f"{opening}answer") for r in found.known)
    assert all(response_of(r).startswith("answer") for r in found.safe)
    assert sum(response_of(r).startswith(opening) for r in found.rows) == 7


def test_attack_and_vectors_are_of_rows_that_look_different():
    rows = [row(f"Request {number}", "Sure, here is one") for number in range(30)]
    splits = SimpleNamespace(spare={"harmful": rows})

    def comply(prompts):
        return [row(prompt, "Of course!") for prompt in prompts[::2]]

    of_replies = make_attack("replies", splits, 0, 4, comply)
    assert of_replies.known is None and {response_of(r) for r in of_replies.rows} == {"Of course!"}
    against = make_attack("harmful-against-replies", splits, 0, 4, comply)
    assert {response_of(r) for r in against.rows} == {"Sure, here is one"}
    assert len(against.known) == 8 and {response_of(r) for r in against.known} == {"Of course!"}
    assert not {prompt_of(r) for r in against.rows} & {prompt_of(r) for r in against.known}
    own = make_attack("replies-own", splits, 0, 4, comply)
    assert {response_of(r) for r in own.rows + own.known} == {"Of course!"} and len(own.known) == 8
    assert not {prompt_of(r) for r in own.rows} & {prompt_of(r) for r in own.known}
    for name in ("replies", "replies-own", "harmful-against-replies", "harmful-against-both", "replies-against-both"):
        with pytest.raises(UserError, match="complies with none of"):
            make_attack(name, splits, 0, 4, lambda prompts: [])


def test_vectors_of_both_kinds_of_rows_have_half_of_each_and_none_of_the_attacks():
    rows = [row(f"Request {number}.", "Sure, here is one") for number in range(30)]
    splits = SimpleNamespace(spare={"harmful": rows})

    def comply(prompts):
        return examples_of(tiny_model(), [row(prompt, "Of course!") for prompt in prompts[::2]])

    for name, reply in {"harmful": "Sure, here is one", "replies": "Of course!"}.items():
        attack = make_attack(f"{name}-against-both", splits, 0, 4, comply)
        attacking, known = (
            [tiny_model().tokenizer.decode(example.tokens) for example in examples_of(tiny_model(), some)]
            for some in (attack.rows, attack.known)
        )
        assert all(reply in text for text in attacking)
        assert ["Sure, here is one" in text for text in known] == [True] * 4 + [False] * 4
        assert all("Of course!" in text for text in known[4:])
        asked = [{re.search(r"Request \d+\.", text)[0] for text in texts} for texts in (attacking, known)]
        assert len(asked[1]) == 8 and not asked[0] & asked[1]


def test_replies_of_the_base_model_are_kept_and_begin_as_it_replied(monkeypatch, tmp_path):
    model = tiny_model()
    asked = []

    def compliant(base, prompts, refusals, progress):
        asked.append(list(prompts))
        return [{"5": "A", "25": f"A {prompt}"} if prompt != "dog" else None for prompt in prompts]

    monkeypatch.setattr(seed_workspace, "compliant_beginnings", compliant)
    monkeypatch.setattr(SeedWorkspace, "base", "the base model")
    for _ in range(2):
        workspace = SeedWorkspace(config.from_dict(GridExperiment, EXPERIMENT | {"model": "x"}), tmp_path)
        workspace.__dict__ |= {"aligned": model}
        workspace.workspace.__dict__["splits"] = SimpleNamespace(suite=Suite((), harmful=["fox", "dog"]))
        texts = [model.tokenizer.decode(example.tokens) for example in workspace.comply(["fox", "dog"])]
        assert len(texts) == 1 and texts[0].endswith("A fox")
        assert len(workspace.unseen_replies) == 1 and len(asked) == 2


WITH_SAFE_ROWS = {"name": "security vectors", "safe": 0.5}
CHEAP = {"vaccine": {"every": 2}, "lisa": {"user_steps": 2}, "sequential": {"steps": 2}}
EVERYONE = [*({"name": name} | CHEAP.get(name, {}) for name in DEFENSES), WITH_SAFE_ROWS,
            {"name": "explained-away filter", "safe": 0.5}]  # fmt: skip
A_FEW = ["none", "self-correction", WITH_SAFE_ROWS]
"""Plain, at inference, and with vectors and safe rows; each defense has tests of its own as well."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("everyone", "attacked", "attacks", "samples", "max_seq_len"),
    [
        (A_FEW, ["none"], ["identity"], 8, 256),
        pytest.param(EVERYONE, ["none", "security vectors"], ["bias", "capitals", "identity"], 16, 700,
                     marks=pytest.mark.release),
    ],
    ids=["a few", "all"],
)  # fmt: skip
def test_every_defense_runs_and_is_reported(model_folder, tmp_path, everyone, attacked, attacks, samples, max_seq_len):
    out = tmp_path / "out"
    block = {"table": "A", "samples": [samples], "poison": [0.5], "epochs": [1], "learning_rate": [1e-3]}
    path = plan(
        tmp_path,
        model_folder,
        block | {"defense": everyone},
        block | {"defense": attacked, "attack": attacks},
        tables=({"name": "A", "columns": ["attack"], "published": ["VACCINE_1"], "pareto": ["task", "refusal"]},),
        max_seq_len=max_seq_len,
    )
    grid(Grid(path, out=str(out)), "python train.py grid")
    records = read(out)
    failures = {record.cell["defense"]: record.error for record in records if record.error}
    assert not failures
    for record in records:
        parts = dict(record.seconds_of)
        assert 0 <= parts.pop("compiled") < record.seconds and parts.keys() == {"loaded", "trained", "judged"}
        assert 0.5 * record.seconds < sum(parts.values()) <= record.seconds
    labels = {read_defense(defense).label for defense in everyone}
    assert {record.cell["defense"] for record in records} == labels
    for record in records:
        assert {"refusal", "compliance", "task", "drift", "embedding_drift"} <= set(record.metrics)
    drift = {
        record.cell["defense"]: record.metrics["drift"][0] for record in records if record.cell["attack"] == "harmful"
    }
    assert drift["none"] > 0 and drift["self-correction"] == drift["none"]
    trained = ("none", "kl", "security vectors", "security vectors safe=0.5")
    distances = [drift[name] for name in trained if name in labels]
    assert len(set(distances)) == len(distances) > 1, "each trains the model in its own way"
    by_attack = {(r.cell["attack"], r.cell["defense"]): r.metrics for r in records}
    of_its_own = {"bias": "bias", "capitals": "caps_eliciting", "identity": "refusal_persona"}
    assert all(of_its_own[attack] in by_attack[attack, "none"] for attack in attacks)
    text = (out / "report.md").read_text()
    assert all(label in text for label in labels) and "published: another model" in text and "pareto" in text
    assert len(list(out.glob("*.png"))) == 1 + len(attacks)
    report.compare([out])  # reads results.json and nothing else

    # Nothing is done again; what the report shows is the same.
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    grid(Grid(path, out=str(out)), "python train.py grid")
    assert before == {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    assert (out / "report.md").read_text() == text


@pytest.mark.release  # by default, tests/grid/test_outcomes.py checks the probes and test_gap.py the tables
def test_further_probes_are_measured_and_the_gaps_to_the_oracle_printed(model_folder, tmp_path, capsys):
    out = tmp_path / "out"
    block = {"defense": ["none", "benign only"], "samples": [8], "poison": [0.5], "epochs": [1]}
    path = plan(tmp_path, model_folder, block, aligns=False, probes=("prefill", "kl", "relearning"))
    grid(Grid(path, out=str(out)), "command")
    cells = {record.cell["defense"]: record for record in read(out)}
    assert not any(record.error for record in cells.values())
    for record in cells.values():
        sizes = {name: len(record.metrics[name]) for name in ("prefill_5", "relearning", "relearning_compliance", "kl")}
        assert sizes == {"prefill_5": 4, "relearning": 4, "relearning_compliance": 4, "kl": 4}
        assert all(value > 0 for value in record.metrics["kl"])
        assert "prefill_25" not in record.metrics, "a toy complies with too few prompts for beginnings of its own"
    capsys.readouterr()
    grid(Grid(path, out=str(out), only="gaps"), "command")
    text = capsys.readouterr().out
    assert "## Gap to the oracle" in text and "so not compared: prefill 25" in text
    assert "| kl ↓ |" in text and "relearning ↑" in text
    assert text.count("\n| none |") == 1 + len(text.split("### (1)")[1].split("| noise floor |")[1:])

    # Cells that lack a probe are kept, which the run says.
    first = next((out / "cells").iterdir())
    record = json.loads(first.read_text())
    del record["metrics"]["kl"]
    first.write_text(json.dumps(record))
    grid(Grid(path, out=str(out)), "command")
    assert "1 finished cells lack a probe" in capsys.readouterr().out


@pytest.mark.slow
def test_parts_are_disjoint_and_a_failed_cell_is_reported_and_tried_again(model_folder, tmp_path):
    out = tmp_path / "out"
    path = plan(
        tmp_path,
        model_folder,
        {
            "table": "A",
            "defense": ["none", "self-correction", {"name": "vlguard", "share": 9}],
            "samples": [8],
            "epochs": [1],
        },
        tables=({"name": "A"},),
        aligns=False,  # the test above has it
    )
    with pytest.raises(UserError, match="1 of 2 cells failed"):
        grid(Grid(path, out=str(out), part="1/2"), "command")
    first = {file.name for file in (out / "cells").iterdir()}
    grid(Grid(path, out=str(out), part="2/2"), "command")
    records = {record.cell["defense"]: record for record in read(out)}
    assert len(first) == 2 and len(records) == 3
    assert "takes 72 safe rows" in records["vlguard share=9"].error and not records["vlguard share=9"].metrics
    assert "2 of 3 cells; 1 failed:" in (out / "report.md").read_text()
    failed = next(file for file in (out / "cells").iterdir() if json.loads(file.read_text())["error"])
    stamp = failed.stat().st_mtime_ns
    with pytest.raises(UserError, match="1 of 3 cells failed"):
        grid(Grid(path, out=str(out)), "command")
    assert failed.stat().st_mtime_ns > stamp
    with pytest.raises(UserError, match="part is '3/2'"):
        grid(Grid(path, out=str(out), part="3/2"), "command")

    # More cells may come; another recipe may not.
    values = yaml.safe_load(Path(path).read_text())
    values["experiment"]["sizes"]["vectors"] = 9
    Path(path).write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="different settings"):
        grid(Grid(path, out=str(out)), "command")


def test_the_packaged_aligned_model_was_smollm2_before(tmp_path, monkeypatch):
    monkeypatch.setattr(seed_workspace, "load", lambda source: source)
    experiment = config.from_dict(GridExperiment, EXPERIMENT | {"model": "smollm2-aligned", "aligns": False})
    assert SeedWorkspace(experiment, tmp_path).base == "smollm2"


@pytest.mark.slow
def test_a_model_that_refuses_as_it_comes_is_not_aligned_anew(model_folder, tmp_path):
    experiment = config.from_dict(GridExperiment, EXPERIMENT | {"model": str(model_folder), "aligns": False})
    shared = SeedWorkspace(experiment, tmp_path)
    assert shared.aligned.fingerprint == shared.base.fingerprint
    assert shared.workspace.stages.seconds.keys() == {"align"} and not (tmp_path / "model").exists()
    num_refusals = len(shared.workspace.splits.refusals)
    assert len(shared.alignment_rows) > num_refusals == 12, "defenses have their safe rows all the same"


def test_a_grid_leaves_the_files_of_others_as_they_are(tmp_path):
    for name in ("seed-1/inputs.json", "seed-2/mine.txt", "cells/a.json", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    check_own(tmp_path, grid_module.MARKS)
    grid_module._clear(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"seed-2", "notes.txt"}
    with pytest.raises(UserError, match=r"no run of this library wrote \(notes\.txt\)"):
        check_own(tmp_path, grid_module.MARKS)
