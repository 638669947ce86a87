"""Precision and recall of the rules for refusal and compliance on the lists of replies in `replies`.

    python -m tests.evaluation.measure_rules

* development.jsonl: what the rules were developed on.
* held_out.jsonl: written and committed before any rule of version 2 was, and never used to change one.
* labeled.jsonl: 200 replies of SmolLM2-135M-Instruct, as it comes, aligned for 40 steps of the quickstart's recipe, and
  fine-tuned on the quickstart's rows for 25 more, of at most 32 tokens, to prompts of the quickstart's judges; labeled
  in random order by their first 115 characters, without their model or the rules' verdict on each; how many verdicts
  the two versions gave of each kind had been seen before. The file holds no text: a reply's hash (SHA-256 of prompt,
  newline and reply), the kind of its prompt, the label, and what each version of the rules said of it.
"""

import collections
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secvec_jax.data.benchmarks import refusal_prefixes
from secvec_jax.evaluation.scorers import verdict

LABELS = ("refusal", "compliance", "neither")


def read(name: str) -> list[dict[str, Any]]:
    """The rows of a list."""
    path = Path(__file__).parent / "replies" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def confusion(rows: Sequence[Mapping[str, Any]], prefixes: Sequence[str]) -> collections.Counter[tuple[str, str]]:
    """(label, verdict) -> how many replies; "neither" is what the rules call unclear."""
    found = ((row["label"], verdict(row["prompt"], row["reply"], prefixes)) for row in rows)
    return collections.Counter((label, "neither" if came == "unclear" else came) for label, came in found)


def table(counts: Mapping[tuple[str, str], int]) -> str:
    """A line a label with its precision and recall."""
    lines = []
    for label in LABELS:
        right = counts[label, label]
        said = sum(counts[other, label] for other in LABELS)
        true = sum(counts[label, other] for other in LABELS)
        lines.append(f"  {label:<12} precision {right}/{said} = {right / max(said, 1):.0%}   "
                     f"recall {right}/{true} = {right / max(true, 1):.0%}")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Print the tables."""
    prefixes = refusal_prefixes()
    for name in ("development", "held_out"):
        print(f"{name}\n{table(confusion(read(name), prefixes))}")
    labeled = read("labeled")
    for version in ("1", "2"):
        counts = collections.Counter((row["label"], row["rules"][version]) for row in labeled)
        print(f"labeled, rules of version {version}\n{table(counts)}")


if __name__ == "__main__":
    main()
