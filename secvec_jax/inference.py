"""Asking a model: replies to prompts through its chat template, and the plain forward pass.

Vectors are off unless they are passed: phase 3 of the method is leaving the argument out.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from secvec_jax.data.chat import prompts_tokens
from secvec_jax.data.rows import Message, row
from secvec_jax.mesh import platform
from secvec_jax.model.decoder import Guest, as_guests
from secvec_jax.model.generate import generate_tokens
from secvec_jax.model.hub import Model
from secvec_jax.turns import turn_ends


def generate(
    model: Model,
    prompts: Sequence[str | list[Message]],
    vectors: Guest | tuple[Guest, ...] | None = None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """The model's reply to each prompt (a text, or a conversation as messages), greedy unless temperature > 0.

    Raises UserError for a prompt that leaves no room for the reply.
    """
    limit = model.architecture.max_length - max_new_tokens
    conversations = [row(p)["messages"] if isinstance(p, str) else p for p in prompts]
    replies = generate_tokens(
        model.backbone,
        prompts_tokens(model.tokenizer, conversations, limit),
        as_guests(vectors),
        max_new_tokens=max_new_tokens,
        stop=turn_ends(model.tokenizer),
        batch_size=batch_size,
        temperature=temperature,
        seed=seed,
        dtype=compute_dtype(),
        progress=progress,
    )
    return [model.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in replies]


def logits(model: Model, tokens: Any, vectors: Guest | tuple[Guest, ...] | None = None) -> jax.Array:
    """The plain forward pass: token ids `[B, T]` -> next-token logits `[B, T, V]`, float32."""
    return _logits(model.backbone, jnp.asarray(tokens), as_guests(vectors), dtype=compute_dtype())


@partial(jax.jit, static_argnames="dtype")
def _logits(decoder, tokens, guests, *, dtype):
    return decoder.logits(decoder(tokens, guests=guests, dtype=dtype)[0])


def compute_dtype() -> DTypeLike:
    """What forward passes compute in: bfloat16 on accelerators, float32 on CPU."""
    return jnp.float32 if platform() == "cpu" else jnp.bfloat16
