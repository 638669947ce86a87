"""Model cards for exported models: how the model was trained and scored, taken from the results.json of its runs."""

from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from secvec_jax.evaluation.report import environment_table, scores_table
from secvec_jax.evaluation.results import Results
from secvec_jax.evaluation.tables import markdown_table
from secvec_jax.printable import code, fenced, markdown

WITHOUT = """This model was trained with security vectors active; they are not part of these weights. They protect \
only against the behavior that they were trained on; the tables below report what was measured. Anyone who has the \
weights can fine-tune them again without vectors."""
WITH = """**These weights include security vectors: the model shows the behavior that its fine-tuning was kept from \
learning.** It is for research, not for use."""
UNKNOWN = "No training record is available: the weights were exported as they were."
UNSCORED = "No scores are available: the model was not scored, or its scores were not passed to `eval.py export`."


def model_card(
    name: str,
    base: str | None,
    trained: Sequence[Results],
    scored: Sequence[Results],
    carried: Sequence[str] = (),
    adapters: Sequence[str] = (),
) -> str:
    """Return the text of README.md, with Hugging Face Hub metadata.

    name: the title. base: the hub id of the model that training started from. trained: the training runs that produced
    the weights, in order. scored: the runs that evaluated them. carried: the security vectors merged into them.
    adapters: all adapters merged into them after that.
    """
    tags = ["secvec_jax", *(["security-vectors"] if any(_vectors_of(run) for run in trained) else [])]
    facts: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    facts |= {"base_model": base} if base else {}
    facts |= {"model-index": [{"name": name, "results": _index(scored)}]} if scored else {}
    parts = [f"---\n{yaml.safe_dump(facts, sort_keys=False)}---", f"# {markdown(name)}"]
    if carried:
        parts += [WITH, f"Merged vectors: {', '.join(map(code, carried))}."]
    elif "security-vectors" in tags:
        parts.append(WITHOUT)
    systems = [row["system"] for run in trained[-1:] for row in run.rows if "system" in row]
    parts += [system_section(system) for system in systems]
    parts.append("## How it was trained")
    for run in trained:
        settings = [
            [code(key), code(str(value))] for key, value in _flat(run.config) if value not in (None, "", [], ())
        ]
        parts += [fenced(run.command, "bash"), markdown_table(["setting", "value"], settings, left=2)]
        parts.append(scores_table(run.rows))
    if not trained:
        parts.append(UNKNOWN)
    if adapters:
        parts.append(f"Merged into these weights after that: {', '.join(map(code, adapters))}.")
    parts.append("## How it was scored")
    for run in scored:
        parts += [fenced(run.command, "bash"), scores_table(run.rows)]
    legend = "Brackets are 95% confidence intervals; n is the number of prompts or examples."
    parts.append(legend if scored else UNSCORED)
    if trained:
        parts += ["## Environment", environment_table(trained[-1])]
    return "\n\n".join(parts) + "\n"


def system_section(system: str) -> str:
    """Return the part of a model card with the system prompt that the model needs."""
    quoted = "\n".join(f"> {line}" for line in system.splitlines())
    return f"**Serve it with this system prompt, which is its defense:**\n\n{quoted}"


def _index(scored: Sequence[Results]) -> list[dict[str, Any]]:
    """The scores in the form of the Hub's metadata; of an audit, those of the fine-tuned model."""
    results = []
    for run in scored:
        rows = [row for row in run.rows if row["name"] == "after"] or run.rows
        for row in rows:
            task = row["name"] if len(rows) > 1 else "prompts of secvec_jax"
            metrics = [
                {"type": metric, "value": score["value"]}
                for metric, score in row["metrics"].items()
                if score["value"] is not None
            ]
            dataset = {"name": task, "type": "secvec_jax"}
            results.append({"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics})
    return results


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _vectors_of(run: Results) -> list[str]:
    """Return the vectors that were active during a training run; "none" in the settings means no vectors."""
    trained_in_it = [name for row in run.rows for name in row.get("vectors", [])]
    vectors = run.config.get("vectors") or trained_in_it
    named = vectors if isinstance(vectors, list | tuple) else [vectors]
    return [name for name in named if str(name).lower() != "none"]
