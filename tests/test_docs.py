"""The site builds without a warning, names every command and setting, and what it tells to write works."""

import dataclasses
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

import eval as judging
import train
from secvec_jax.data import sources
from secvec_jax.data.sources import load_rows
from secvec_jax.experiments import contenders
from secvec_jax.model import families, hub
from secvec_jax.model.families import FAMILIES
from tests.conftest import build_hf_model
from tests.toys import build_tokenizer

ROOT = Path(__file__).parents[1]


class _Text(HTMLParser):
    def __init__(self):
        super().__init__()
        self.cells: list[str] = []

    def handle_data(self, data: str) -> None:
        self.cells.append(data.strip())


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def words(page: Path) -> list[str]:
    text = _Text()
    text.feed(page.read_text())
    return text.cells


@pytest.mark.slow
def test_every_command_and_setting_is_told(site):
    told = words(site / "commands" / "index.html")
    for script, module in (("train", train), ("eval", judging)):
        for verb, (settings, _) in module.VERBS.items():
            start = told.index(f"{script}.py {verb}", told.index("\u00b6"))
            for field in dataclasses.fields(settings):
                of_field = [word for word in told[start:] if word == field.name or word.startswith(f"{field.name}.")]
                assert of_field, f"{verb} {field.name}"


@pytest.mark.slow
def test_every_defense_has_a_page_of_its_own_words(site):
    told = " ".join(words(site / "api" / "defenses" / "index.html"))
    for name in ("vaccine", "forget_filter", "ewc", "lisa", "explained_away"):
        module = sys.modules[f"secvec_jax.defenses.{name}"]
        first = " ".join(module.__doc__.split())[:60]
        assert first in " ".join(told.split()), name


def test_no_defense_is_left_out():
    listed = (ROOT / "docs" / "api" / "defenses.md").read_text()
    modules = [path.stem for path in (ROOT / "secvec_jax" / "defenses").glob("*.py") if path.stem != "__init__"]
    assert [name for name in modules if f"::: secvec_jax.defenses.{name}\n" not in listed] == []


def test_the_defenses_of_a_grid_are_listed():
    listed = (ROOT / "docs" / "defenses.md").read_text()
    assert [name for name in contenders.DEFENSES if f"`{name}`" not in listed] == []


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
    monkeypatch.setattr(contenders, "DEFENSES", dict(contenders.DEFENSES))
    exec(example("defense"), {})
    assert contenders.parsed("first rows share=0.25") == ("first rows", {"share": 0.25})
    seen = []

    case = SimpleNamespace(
        rows={"attack": list(range(8)), "task": [1]}, tuned=lambda rows: seen.append(rows) or "model"
    )
    defended = contenders.DEFENSES["first rows"](case, share=0.25)
    assert seen == [{"attack": [0, 1], "task": [1]}]
    assert defended.model == "model" and defended.notes == {"rows": 3.0}
