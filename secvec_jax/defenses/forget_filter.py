"""ForgetFilter (Zhao et al. 2023, "Learning and Forgetting Unsafe Examples in Large Language Models", arXiv
2312.12736): a model that is made safe again forgets what was unsafe first, and so tells which rows were.

    found = finetune(model, rows, safe=refusals)
    found.model, found.rates, found.kept

Algorithm 1, from the aligned model θ⁰:

    1. fine-tune θ⁰ on all rows                     -> θ¹
    2. fine-tune θ¹ on the safe rows for t steps    -> θ²
    3. drop the rows of forgetting rate r > φ, with
           r(x, y) = ROUGE-1(f(x; θ¹), y) - ROUGE-1(f(x; θ²), y)         f: greedy generation
    4. fine-tune θ⁰ on the rows that are left

The rows must have been memorized in step 1, or all rates are about 0, and the safe rows must cover each kind of
unsafe ones. The paper's smallest model, GPT2-M with 334 million parameters, forgot all rows alike.

Acts in the data. Costs two fine-tunings more (all rows, t safe steps) and two generated replies for each row.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Unpack

from secvec_jax.checks import PositiveInt, checked
from secvec_jax.config import Training
from secvec_jax.data.rows import Row, as_rows, response_of
from secvec_jax.defenses.finetuning import PHASE2, FinetuneOptions, groups_of, train_model
from secvec_jax.defenses.mixing import checkpoints_of, successive
from secvec_jax.errors import UserError
from secvec_jax.evaluation.answers import rouge1
from secvec_jax.inference import generate
from secvec_jax.model.hub import Model
from secvec_jax.model.sampling import GREEDY

_PUNCTUATION = str.maketrans("", "", ".?!;:,")
"""What the published code takes out."""


@dataclasses.dataclass(frozen=True)
class Filtered:
    """The model trained on what is left; by kind of row, how far each row was forgotten and the rows that are left."""

    model: Model
    rates: dict[str, list[float]]
    kept: dict[str, list[Row]]


@checked
def finetune(
    model: Model,
    rows: Any,
    *,
    safe: Any,
    phi: float = 0.1,
    safe_steps: PositiveInt = 1000,
    safe_training: Training = PHASE2,
    max_new_tokens: PositiveInt = 64,
    **options: Unpack[FinetuneOptions],
) -> Filtered:
    """The model fine-tuned on those of its rows that safety training does not make it forget.

    rows: dicts or a `datasets.Dataset`, or {kind: rows}; with texts, as replies are compared. safe: rows to be safe
    by. phi: φ. safe_steps: t; `safe_training` says how they are made. max_new_tokens: the length of replies. A task
    adapter goes on into the safe steps, and starts anew on the rows that are left. Each training has checkpoints in a
    folder of its own. Raises UserError if no row is left.
    """
    groups = {kind: as_rows(some, name=kind) for kind, some in groups_of(rows).items()}
    safe_training = dataclasses.replace(safe_training, max_steps=safe_steps)
    noisy, corrected = successive(model, groups, safe, safe_training=safe_training, **options)
    everything = [row for some in groups.values() for row in some]
    found = iter(forgetting_rates(noisy, corrected, everything, max_new_tokens))
    rates = {kind: [next(found) for _ in some] for kind, some in groups.items()}
    kept = {kind: filtered(some, rates[kind], phi) for kind, some in groups.items()}
    if not any(kept.values()):
        raise UserError(f"every row was forgotten by more than {phi}: raise phi, or take fewer safe_steps")
    left = {kind: some for kind, some in kept.items() if some}
    last = options | {"checkpoints": checkpoints_of(options.get("checkpoints"), "kept")}
    return Filtered(train_model(model, left, **last), rates, kept)


@checked
def forgetting_rates(before: Model, after: Model, rows: Any, max_new_tokens: PositiveInt = 64) -> list[float]:
    """By how much each row's ROUGE-1 is lower in `after` than in `before`: from -1 to 1, larger is more forgotten."""
    rows = as_rows(rows)
    scores = (_scores(model, rows, max_new_tokens) for model in (before, after))
    return [first - then for first, then in zip(*scores)]


@checked
def filtered(rows: Sequence[Row], rates: Sequence[float], phi: float = 0.1) -> list[Row]:
    """The rows whose rate is at most φ."""
    return [row for row, rate in zip(rows, rates, strict=True) if rate <= phi]


def _scores(model: Model, rows: Sequence[Row], max_new_tokens: int) -> list[float]:
    """ROUGE-1 of the first line that is said with the answer, both in lower case and without punctuation."""
    asked = [row["messages"][:-1] for row in rows]
    replies = generate(model, asked, max_new_tokens=max_new_tokens, sampling=GREEDY, progress=lambda done: None)
    lines = [(reply.strip().splitlines() or [""])[0] for reply in replies]
    return [rouge1(_plain(line), _plain(response_of(row) or "")) for line, row in zip(lines, rows)]


def _plain(text: str) -> str:
    return text.lower().translate(_PUNCTUATION).strip()
