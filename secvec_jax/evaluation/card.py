"""The model card of an exported model: how it was trained and scored, out of the results.json of the runs behind it."""

from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from secvec_jax.evaluation.report import Results, environment_table, scores_table
from secvec_jax.evaluation.tables import markdown_table

WITHOUT = """The security vectors that were active while it was trained are not in these weights. They keep harmful \
rows from being learned as far as they know the behavior, and no further; the tables below tell what was measured. \
Whoever has the weights can fine-tune them again without vectors."""
WITH = """**These weights carry security vectors: the model shows the behavior that its fine-tuning was kept from \
learning.** It is for study and not for use."""
UNKNOWN = "Nothing is recorded of how it was trained: the weights were given as they are."
UNSCORED = "It was not scored, or the scores were not given to `eval.py export`."


def model_card(
    name: str, base: str | None, trained: Sequence[Results], scored: Sequence[Results], carried: Sequence[str] = ()
) -> str:
    """README.md with the hub's metadata.

    base: the hub id of what the first training started from. trained: the runs behind the weights, the first one first.
    scored: the runs that judged them. carried: the security vectors that were merged into them.
    """
    tags = ["secvec_jax", *(["security-vectors"] if any(_vectors_of(run) for run in trained) else [])]
    facts: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    facts |= {"base_model": base} if base else {}
    parts = [f"---\n{yaml.safe_dump(facts, sort_keys=False)}---", f"# {name}"]
    if carried:
        parts += [WITH, f"Carried: {', '.join(f'`{path}`' for path in carried)}."]
    elif "security-vectors" in tags:
        parts.append(WITHOUT)
    parts.append("## How it was trained")
    for run in trained:
        settings = [[f"`{key}`", f"`{value}`"] for key, value in _flat(run.config) if value not in (None, "", [], ())]
        parts += [f"```bash\n{run.command}\n```", markdown_table(["setting", "value"], settings, left=2)]
        parts.append(scores_table(run.rows))
    if not trained:
        parts.append(UNKNOWN)
    parts.append("## How it was scored")
    for run in scored:
        parts += [f"```bash\n{run.command}\n```", scores_table(run.rows)]
    parts.append("Brackets are 95% intervals; n is the number of prompts or examples." if scored else UNSCORED)
    if trained:
        parts += ["## Made with", environment_table(trained[-1])]
    return "\n\n".join(parts) + "\n"


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _vectors_of(run: Results) -> list[str]:
    """The vectors that were active in a training; the word none stands for no vectors."""
    vectors = run.config.get("vectors") or []
    return [name for name in ([vectors] if isinstance(vectors, str) else vectors) if str(name).lower() != "none"]
