"""The pages name every command, setting and defense, and the code that they show works."""

import argparse
import ast
import dataclasses
import functools
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from transformers import AutoModelForCausalLM

import eval as judging
import train
from secvec_jax import cli, flags
from secvec_jax.config import Training
from secvec_jax.data import sources
from secvec_jax.data.sources import load_rows
from secvec_jax.defenses import registry
from secvec_jax.defenses.evidence import EVIDENCE
from secvec_jax.defenses.registry import read_defense
from secvec_jax.distributed import Cluster
from secvec_jax.evaluation import metrics
from secvec_jax.model import families, hub
from secvec_jax.model.families import FAMILIES
from tests.conftest import build_hf_model
from tests.defenses.toy_inputs import ToyInputs
from tests.toys import build_tokenizer, tiny_model

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def commands() -> str:
    """The page of commands as mkdocs is given it; .ci/run builds the whole projection."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    return hooks.on_page_markdown((ROOT / "docs" / "commands.md").read_text())


def test_every_command_and_setting_is_reported(commands):
    for script, module in (("train", train), ("eval", judging)):
        for name, verb in module.VERBS.items():
            settings, _ = verb.load()
            section = commands.split(f"## {script}.py {name}\n", 1)[1].split("\n## ", 1)[0]
            for field in dataclasses.fields(settings):
                assert re.search(rf"^\| `{field.name}[.`]", section, re.MULTILINE), f"{name} {field.name}"


ROW_FIELDS = {"messages", "prompt", "response", "instruction", "output", "system", "history"}
OTHER_PROGRAMS = {
    "assets.py": {"--hash", "--no-deps", "--only-binary", "--require-hashes", "--requirement", "--dest", "--quiet",
                  "--no-cache-dir", "--no-input", "--disable-pip-version-check"},
    "package_index.py": {"--no-binary", "--no-cache-dir", "--no-input", "--only-binary"},
    "model/gguf.py": {"--merge"},
    "evaluation/audit_page.py": {"--allowed", "--fails", "--inconclusive", "--line", "--passes", "--soft", "--text"},
}  # fmt: skip
"""Module -> flags of pip or gguf-split that it passes on or recommends, and names of CSS properties."""
OF_EVERY_VERB = {"--help", "--version", "--config", "--no-", "--no-lora"}


def strings(module: Path) -> list[str]:
    """The texts in a module's code, without its docstrings."""
    nodes = list(ast.walk(ast.parse(module.read_text())))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    constants = [node for node in nodes if isinstance(node, ast.Constant) and id(node) not in docstrings]
    return [node.value for node in constants if isinstance(node.value, str)]


def test_messages_name_flags_and_settings_that_exist():
    page = (ROOT / "docs" / "commands.md").read_text()
    settings = {name.rpartition(".")[2] for name in re.findall(r"(?m)^\| `([\w.]+)`", page)} | ROW_FIELDS
    flags_of_verbs = set(re.findall(r"`(--[\w.-]+)`", page)) | OF_EVERY_VERB
    switched_on = re.findall(r"`--([\w.-]+)` \| on \|", page)
    flags_of_verbs |= {f"--no-{name}" for name in switched_on}
    assert {"max_seq_len", "long_rows"} <= settings and "--max-seq-len" in flags_of_verbs
    package, unknown = ROOT / "secvec_jax", []
    for module in sorted(package.rglob("*.py")):
        name = str(module.relative_to(package))
        known_flags = flags_of_verbs | OTHER_PROGRAMS.get(name, set())
        for text in strings(module):
            named_flags = re.findall(r"(?<![\w-])--[a-z][a-z.-]*", text)
            named_settings = re.findall(r"`([a-z_]+)`", text)
            unknown += [(name, flag) for flag in named_flags if flag.rstrip(".") not in known_flags]
            unknown += [(name, setting) for setting in named_settings if setting not in settings]
    assert not unknown


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "RESULTS.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_have_at_most_eight_columns_and_never_refusal_alone(page):
    for head in re.findall(r"(?m)^\| (.*) \|\n\| ?:?---", page.read_text()):
        columns = [cell.strip() for cell in head.replace(r"\|", "").split(" | ")]
        assert len(columns) <= 8, head
        if any(re.match(r"(?:[\w ]+: )?refusal( [↑(].*)?$", column) for column in columns):
            assert "compliance" in head and "harmful loss" in head, head


def test_what_is_committed_is_what_the_settings_and_results_say(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import hooks

    for name, page in hooks.PAGES.items():
        assert hooks.filled(page.read_text()) == page.read_text(), f"run `python docs/hooks.py`: {name}"
    assert "## train.py finetune" in hooks.PAGES["commands"].read_text()
    assert hooks.evidence() == EVIDENCE, "run `python docs/hooks.py`: results have changed"


def test_every_metric_is_in_the_glossary():
    page = (ROOT / "docs" / "metrics.md").read_text()
    known = {*metrics.RATES, *metrics.FILTERS, *metrics.GRADES, *metrics.LOSSES, *metrics.BETTER}
    assert [name for name in sorted(known) if f"`{name}`" not in page] == []


def test_no_defense_is_left_out():
    listed = (ROOT / "docs" / "api" / "defenses.md").read_text()
    modules = [path.stem for path in (ROOT / "secvec_jax" / "defenses").glob("*.py") if path.stem != "__init__"]
    assert [name for name in modules if f"::: secvec_jax.defenses.{name}\n" not in listed] == []
    documented = [importlib.import_module(f"secvec_jax.defenses.{name}").__doc__ for name in modules]
    assert all(len(text.strip()) > 60 for text in documented)


@pytest.mark.parametrize("defense", registry.DEFENSES.values(), ids=lambda defense: defense.name)
def test_every_defense_is_listed_with_its_settings_stage_and_needs(defense):
    page = (ROOT / "docs" / "defenses.md").read_text()
    (line,) = re.findall(rf"(?m)^\| `{defense.name}` \| (.*) \|$", page)
    settings, stage, needs, cost, evidence, source = (cell.strip() for cell in line.split("|"))
    given = dict(setting.strip("`").partition("=")[::2] for setting in settings.split(", ") if setting)
    assert list(given) == [field.name for field in dataclasses.fields(defense)]
    spelled = {name: yaml.safe_load(value) if value else "" for name, value in given.items()}
    assert read_defense({"name": defense.name, **spelled}) == defense(), "the defaults"
    assert stage == defense.stage and needs == (", ".join(defense.needs) or "-")
    assert (cost, evidence, source) == (defense.cost, registry.evidence_of(defense), defense.source)


def example(title: str) -> str:
    """A code block of docs/extending.md."""
    (found,) = re.findall(
        rf'```python title="{title}"\n(.*?)```', (ROOT / "docs" / "extending.md").read_text(), re.DOTALL
    )
    assert len(found.splitlines()) < 60
    return found


def test_a_source_can_be_added(monkeypatch):
    monkeypatch.setattr(sources, "PACKAGED", dict(sources.PACKAGED))
    exec(example("source"), {})
    rows = load_rows("squares")
    assert len(rows) == 98 and rows[0]["messages"][1]["content"] == "4"


@pytest.mark.parametrize("window", [None, 4])
def test_a_family_can_be_added(monkeypatch, tmp_path, tokens, logits, hf_logits, window):
    monkeypatch.setattr(families, "FAMILIES", added := dict(families.FAMILIES))
    exec(example("family"), {})
    assert set(added) - set(FAMILIES) == {"starcoder2"}
    hf = build_hf_model(model_type="starcoder2", sliding_window=window)
    hf.save_pretrained(tmp_path / "there")
    build_tokenizer().save_pretrained(tmp_path / "there")
    model = hub.load(tmp_path / "there")
    np.testing.assert_allclose(logits(model, tokens), hf_logits(hf, tokens), rtol=0, atol=1e-4)
    model.save(tmp_path / "back")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="float32").eval()
    np.testing.assert_allclose(hf_logits(again, tokens), hf_logits(hf, tokens), rtol=0, atol=1e-5)


def test_a_defense_can_be_added(monkeypatch):
    monkeypatch.setattr(registry, "DEFENSES", dict(registry.DEFENSES))
    exec(example("defense"), {})
    defense = read_defense({"name": "first rows", "share": 0.25})
    assert defense.label == "first rows share=0.25"
    trained_on = []
    inputs = ToyInputs(tiny_model(), {"attack": list(range(8)), "task": [1]}, training=Training())
    monkeypatch.setattr(inputs, "finetune", lambda rows: trained_on.append(rows) or "model")
    defended = defense.apply(inputs)
    assert trained_on == [{"attack": [0, 1], "task": [1]}]
    assert defended.model == "model" and defended.notes == {"rows": 3.0}


@functools.cache
def flags_of(verb) -> frozenset[str]:
    """Every flag that a verb's parser knows, switched-off forms included."""
    settings, _ = verb.load()
    parser = argparse.ArgumentParser(allow_abbrev=False)
    flags.add_flags(parser, settings)
    if verb.on_devices:
        flags.add_flags(parser, Cluster)
    known = {flag for action in parser._actions for flag in action.option_strings}
    return frozenset(known | {"--config", "--help", "--version"})


VERBS = cli.TRAIN | cli.EVAL
COMMAND = re.compile(r"(?:train\.py|eval\.py|secvec) ([a-z]+)\b((?:\\\n|[^`\n])*)")
OTHERS = re.compile(
    r"\b(pip|gcloud|kubectl|srun|sbatch|mkdocs|hf|docker|xpk|scp|ssh|mpirun|pytest|wandb|tensorboard)\b"
)


FLAG = re.compile(r"--[a-z][\w.-]*")


def wrong_flags(page: str) -> list[str]:
    """Flags in the commands of a page that their verb does not have."""
    wrong = []
    for verb, arguments in COMMAND.findall(page):
        if verb in VERBS and not OTHERS.search(arguments):
            known = flags_of(VERBS[verb])
            wrong += [f"{verb} {flag}" for flag in FLAG.findall(arguments) if flag not in known]
    return wrong


def test_the_threat_model_names_tests_that_exist():
    lines = [line for line in (ROOT / "docs" / "threat-model.md").read_text().splitlines() if line.startswith("| ")][2:]
    assert len(lines) > 8 and all("`tests/" in line for line in lines), "each line has the test that holds it"
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", "\n".join(lines)):
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_docs_have_flags_that_exist(page):
    assert not wrong_flags(page.read_text())


def test_a_flag_that_does_not_exist_is_seen():
    assert wrong_flags("`python train.py finetune --data x --task-rank 3`") == ["finetune --task-rank"]
    assert wrong_flags("python eval.py score --model m \\\n    --lines 2\n") == ["score --lines"]


def test_flags_that_the_docs_explain_exist():
    known = frozenset().union(*map(flags_of, VERBS.values()))
    with_other_programs = ("tpu.md", "gpu.md", "launch.md", "RESULTS.md")
    wrong = []
    for page in PAGES:
        if page.name not in with_other_programs:
            spans = re.findall(r"`(--[a-z][^`]*)`", page.read_text())
            wrong += [f"{page.name} {flag}" for span in spans for flag in FLAG.findall(span) if flag not in known]
    assert not wrong
