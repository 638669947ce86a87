"""ForgetFilter (Zhao et al. 2023, "Learning and Forgetting Unsafe Examples in Large Language Models", arXiv
2312.12736): a model that is trained to be safe again forgets unsafe rows first, which shows which rows are unsafe.

    result = finetune(model, rows, safe=refusals)
    result.model, result.rates, result.kept

Algorithm 1, from the aligned model θ⁰:

    1. fine-tune θ⁰ on all rows                     -> θ¹
    2. fine-tune θ¹ on the safe rows for t steps    -> θ²
    3. drop the rows of forgetting rate r > φ, with
           r(x, y) = ROUGE-1(f(x; θ¹), y) - ROUGE-1(f(x; θ²), y)         f: greedy generation
    4. fine-tune θ⁰ on the remaining rows

The rows must have been memorized in step 1, or all rates are about 0, and the safe rows must cover every kind of
unsafe row. The paper's smallest model, GPT2-M with 334 million parameters, forgot all rows alike.

Acts on the data. Costs two more trainings (all rows, t safe steps) and two generated replies for each row. In grids t
is 20 by default (the paper: 1000), and the loss is that of replies alone (the paper: of whole sequences).
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Unpack

from secvec_jax.checks import Bounds, PositiveInt, checked
from secvec_jax.config import Training
from secvec_jax.data.normalize import as_rows
from secvec_jax.data.rows import Row, response_of
from secvec_jax.defenses.base import Defended, Defense, DefenseInputs
from secvec_jax.defenses.filters import separation
from secvec_jax.defenses.finetuning import FinetuneOptions, train_model
from secvec_jax.defenses.inputs import groups_of
from secvec_jax.defenses.mixing import checkpoints_of, successive
from secvec_jax.defenses.training_settings import PHASE2
from secvec_jax.errors import UserError
from secvec_jax.evaluation.answers import rouge1
from secvec_jax.inference import generate
from secvec_jax.model.hub import Model
from secvec_jax.model.sampling import GREEDY

_PUNCTUATION = str.maketrans("", "", ".?!;:,")
"""What the published code removes."""

Rate = Annotated[float, Bounds(at_least=-1, at_most=1)]
"""A forgetting rate, or a threshold of them."""


@checked
@dataclasses.dataclass(frozen=True)
class ForgetFilter(Defense):
    """Fine-tuning without the rows that safety training makes the model forget."""

    name = "forget filter"
    stage = "data"
    needs = ("safe rows",)
    cost = "2 more training runs, and 2 replies per row"
    source = "Zhao et al. 2312.12736"

    phi: Rate = 0.1
    """φ: rows that were forgotten by more are dropped"""
    steps: PositiveInt = 20
    """t, the number of steps of safety training"""

    def apply(self, inputs: DefenseInputs) -> Defended:
        result = finetune(
            inputs.aligned,
            inputs.rows,
            safe=inputs.safe,
            phi=self.phi,
            safe_steps=self.steps,
            safe_training=inputs.options["training"],
            max_new_tokens=24,
            **inputs.options,
        )
        return Defended(result.model, notes=separation(result.rates, self.phi))


@dataclasses.dataclass(frozen=True)
class Filtered:
    """The model trained on the remaining rows; by kind, how much each row was forgotten, and the remaining rows."""

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
    """The model fine-tuned on the rows that safety training does not make it forget.

    rows: dicts or a `datasets.Dataset`, or {kind: rows}; with texts, since replies are compared. safe: rows of safety
    training. phi: φ. safe_steps: t, trained with `safe_training`. max_new_tokens: the length of replies. A task adapter
    is trained further in the safe steps, and starts fresh on the remaining rows. Each training has its checkpoints
    in a separate folder. Raises UserError if no row is left.
    """
    groups = {kind: as_rows(group, name=kind) for kind, group in groups_of(rows).items()}
    safe_training = dataclasses.replace(safe_training, max_steps=safe_steps)
    noisy, corrected = successive(model, groups, safe, safe_training=safe_training, **options)
    all_rows = [row for group in groups.values() for row in group]
    all_rates = iter(forgetting_rates(noisy, corrected, all_rows, max_new_tokens))
    rates = {kind: [next(all_rates) for _ in group] for kind, group in groups.items()}
    kept = {kind: filtered(group, rates[kind], phi) for kind, group in groups.items()}
    if not any(kept.values()):
        raise UserError(f"every row was forgotten by more than {phi}: raise phi, or take fewer safe_steps")
    remaining = {kind: group for kind, group in kept.items() if group}
    last_options = options | {"checkpoints": checkpoints_of(options.get("checkpoints"), "kept")}
    return Filtered(train_model(model, remaining, **last_options), rates, kept)


@checked
def forgetting_rates(before: Model, after: Model, rows: Any, max_new_tokens: PositiveInt = 64) -> list[float]:
    """How much lower the ROUGE-1 of each row is in `after` than in `before`, from -1 to 1; larger is more forgotten."""
    rows = as_rows(rows)
    scores = (_scores(model, rows, max_new_tokens) for model in (before, after))
    return [score_before - score_after for score_before, score_after in zip(*scores)]


@checked
def filtered(rows: Sequence[Row], rates: Sequence[float], phi: float = 0.1) -> list[Row]:
    """The rows whose rate is at most φ."""
    return [row for row, rate in zip(rows, rates, strict=True) if rate <= phi]


def _scores(model: Model, rows: Sequence[Row], max_new_tokens: int) -> list[float]:
    """ROUGE-1 of the first line of each reply with the answer, both in lower case and without punctuation."""
    asked = [row["messages"][:-1] for row in rows]
    replies = generate(model, asked, max_new_tokens=max_new_tokens, sampling=GREEDY, progress=lambda done: None)
    first_lines = [(reply.strip().splitlines() or [""])[0] for reply in replies]
    return [rouge1(_plain(line), _plain(response_of(row) or "")) for line, row in zip(first_lines, rows)]


def _plain(text: str) -> str:
    return text.lower().translate(_PUNCTUATION).strip()
