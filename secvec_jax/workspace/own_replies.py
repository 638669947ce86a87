"""The model's own replies to benign prompts, on which alignment trains: generated once, and kept in a file."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from secvec_jax.data.chat import Example, prompt_tokens
from secvec_jax.distributed import broadcast_from_first, on_main_process
from secvec_jax.errors import UserError
from secvec_jax.evaluation.scorers import refuses
from secvec_jax.files import read_kept
from secvec_jax.inference import compute_dtype
from secvec_jax.model.generate import generate_tokens
from secvec_jax.model.hub import Model
from secvec_jax.workspace.stages import write

OPENING = 5
"""Tokens of a reply that alignment trains on: they decide whether it is a refusal."""


def greedy_openings(
    model: Model, prompts: list[str], refusals: Sequence[str], progress: Callable[[int], None]
) -> list[Example]:
    """The prompts with the opening of the model's greedy replies; prompts that it refuses are left out.

    Alignment on these teaches only where not to refuse, since the model already answers this way.
    """
    encoded = [
        prompt_tokens(model.tokenizer, [{"role": "user", "content": p}], model.architecture.max_length) for p in prompts
    ]
    ends = model.stop_tokens
    replies = generate_tokens(
        model.backbone, encoded, max_new_tokens=OPENING, stop=ends, dtype=compute_dtype(), progress=progress
    )
    examples = []
    for prompt, reply in zip(encoded, replies):
        if refuses(model.tokenizer.decode(reply), refusals):
            continue
        reply_tokens = np.asarray(reply if len(reply) == OPENING else [*reply, ends[0]], np.int32)
        mask = np.arange(len(prompt) + len(reply_tokens)) >= len(prompt)
        examples.append(Example(np.concatenate([prompt, reply_tokens]), mask))
    return examples


def stored_examples(file: Path, generate: Callable[[], list[Example]]) -> list[Example]:
    """The examples that `generate` returns, generated once and stored in the file; each is supervised to its end."""
    if not broadcast_from_first(file.exists()):
        stored = as_json(generate())
        on_main_process(lambda: write(file, json.dumps(stored)))
    fix = "delete it, and it is made again"
    stored = read_kept(file, fix)
    try:
        return from_json(stored)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{file} is damaged ({error}): {fix}") from error


def as_json(examples: Sequence[Example]) -> list[list[Any]]:
    """Examples as JSON values; each is supervised from one token to its end."""
    return [[example.tokens.tolist(), example.answer_start] for example in examples]


def from_json(stored: Sequence[Any]) -> list[Example]:
    """The examples of what `as_json` returned."""
    arrays = [(np.asarray(tokens, np.int32), start) for tokens, start in stored]
    return [Example(tokens, np.arange(len(tokens)) >= start) for tokens, start in arrays]
