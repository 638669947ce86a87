"""Using a model: `generate` replies to prompts through its chat template, and `logits`, the plain forward pass.

Vectors are off unless they are passed; phase 3 of the method is generation without them.
"""

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from secvec_jax.arguments import check_distinct, instance, path, shown
from secvec_jax.batch import check_token_ids
from secvec_jax.checks import Bounds, NonNegativeFloat, PositiveInt, check
from secvec_jax.data.chat import prompt_tokens
from secvec_jax.data.frames import records_of
from secvec_jax.data.normalize import as_rows, normalize
from secvec_jax.data.rows import Message, Row, response_of
from secvec_jax.errors import UserError
from secvec_jax.model.adapter import Adapter
from secvec_jax.model.architecture import Architecture
from secvec_jax.model.decoder import ForwardOptions
from secvec_jax.model.generate import generate_tokens
from secvec_jax.model.hub import Model, load
from secvec_jax.model.quantized import Precision
from secvec_jax.model.sampling import GREEDY, Sampling
from secvec_jax.progress import reply_progress
from secvec_jax.sharding import platform
from secvec_jax.turns import begun_thought, empty_thought, special_marks
from secvec_jax.vectors.lora import merge_adapters
from secvec_jax.vectors.origin import check_origin
from secvec_jax.vectors.store import check_different, load_vectors

VectorsLike = Adapter | str | os.PathLike[str] | list[Any] | tuple[Any, ...] | None
"""Vectors as a caller passes them: one or several, values or files; None for none."""


def generate(
    model: Model,
    prompts: Iterable[str | list[Message] | Row],
    vectors: VectorsLike = None,
    *,
    max_new_tokens: int = 64,
    temperature: float | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """The model's reply to each prompt, in order.

    A reply ends at the token that ends a turn in the chat template, or at any `eos_token_id` of the model's
    generation_config.json. Decoding follows that file (`do_sample`, `temperature`, `top_k`, `top_p`, `min_p`,
    `repetition_penalty`), and is greedy where it does not sample. Its length limits are not read.

    prompts: texts, conversations as lists of messages, or rows (dicts, a DataFrame, a `datasets.Dataset`), of which the
    final answer is left out. vectors: active while decoding; LoRA vectors are merged into a copy of the weights first.
    max_new_tokens: the longest reply, in tokens. temperature: replaces the file's; 0 decodes greedily. sampling: all
    settings, in place of the file. progress: called with the number of replies done after each batch; None: a progress
    line in a notebook or a terminal.

    Raises UserError for a prompt that cannot be read, leaves no room for the reply, or has token ids unknown to the
    model; and for settings that are out of range or, in the file, not supported.
    """
    model = as_model(model)
    max_new_tokens = check(PositiveInt, max_new_tokens, "max_new_tokens")
    if max_new_tokens >= model.architecture.max_length:
        raise UserError(
            f"max_new_tokens is {max_new_tokens}: the model takes {model.architecture.max_length} tokens in all, "
            "prompt and reply; lower it"
        )
    if temperature is not None:
        temperature = check(NonNegativeFloat, temperature, "temperature")
        if 0 < temperature < _COLDEST:
            raise UserError(f"temperature is {temperature:g}: use 0 for the likeliest token, or at least {_COLDEST:g}")
    if sampling is None:
        sampling = Sampling.of(model.metadata.generation or {}, temperature)
    elif temperature is not None:
        raise UserError("temperature and sampling are both given: put the temperature into sampling")
    seed = check(_Seed, seed, "seed")
    batch_size = check(PositiveInt, batch_size, "batch_size")
    backbone, adapters = merge_adapters(model.backbone, as_vectors(vectors, model))
    encoded = [_prompt_ids(model, *prompt, max_new_tokens) for prompt in as_conversations(prompts)]
    with reply_progress(len(encoded), progress) as on_replies:
        replies = generate_tokens(
            backbone,
            encoded,
            adapters,
            max_new_tokens=max_new_tokens,
            stop=model.stop_tokens,
            batch_size=batch_size,
            sampling=sampling,
            seed=seed,
            dtype=compute_dtype(),
            progress=on_replies,
        )
    return [decoded(model.tokenizer, tokens) for tokens in replies]


def ask(
    model: Model,
    prompts: Iterable[str | list[Message] | Row],
    vectors: VectorsLike = None,
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Greedy replies for scoring, including reasoning (see `turns.answer_of`); arguments are as in `generate`.

    If the chat template writes an empty thought into every answer, its tokens do not count toward `max_new_tokens`. If
    it begins a thought in the prompt, the reply starts with that mark, so that thought and answer can be separated.
    """
    conversations = [messages for _, messages in as_conversations(prompts)]
    replies = generate(
        model,
        conversations,
        vectors,
        max_new_tokens=max_new_tokens + empty_thought(model.tokenizer),
        sampling=GREEDY,
        batch_size=batch_size,
        progress=progress,
    )
    return [begun_thought(model.tokenizer, asked) + reply for asked, reply in zip(conversations, replies)]


def decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of a reply: special tokens are left out, except those that begin or end a thought."""
    marks = special_marks(tokenizer)
    if marks.isdisjoint(tokens):
        return tokenizer.decode(tokens, skip_special_tokens=True)
    kept = [token for token in tokens if token in marks or token not in tokenizer.all_special_ids]
    return tokenizer.decode(kept, skip_special_tokens=False)


def logits(model: Model, tokens: Any, vectors: VectorsLike = None) -> jax.Array:
    """The plain forward pass: token ids `[B, T]` -> next-token logits `[B, T, V]`, float32.

    Raises UserError if the tokens are not integers of that shape, or not token ids of the model.
    """
    model = as_model(model)
    ids = _token_ids(tokens, model.architecture)
    return _logits(model.backbone, ids, as_vectors(vectors, model), dtype=compute_dtype())


_Seed = Annotated[int, Bounds(at_least=0, at_most=2**32 - 1)]

_COLDEST = 1e-4
"""Below, logits divided by the temperature leave float32's range or its precision."""


def as_model(model: Any, frozen_weights: Precision = "float32") -> Model:
    """The model itself, or the one that a name, folder or hub id names (`sv.load`), in this precision.

    Raises UserError for all else.
    """
    if isinstance(model, str | os.PathLike):
        name = path("model", model, "a name or a folder") if not isinstance(model, str) else model
        return load(name, frozen_weights)
    check_model("model", model)
    return model


def check_model(name: str, model: Any) -> None:
    """Raise UserError for what is neither a model nor what `sv.load` takes."""
    fix = "pass what sv.load returned, or a name or folder that sv.load takes"
    instance(name, model, (Model, str, os.PathLike), fix)


def check_not_loaded(frozen_weights: Precision | None, model: Model) -> None:
    """Raise UserError if `frozen_weights`, which is for models that a call loads, is given with a loaded model."""
    if frozen_weights is not None:
        raise UserError(
            f"frozen_weights={frozen_weights!r} is for a model that is loaded here, and {model.name!r} is loaded "
            f"already: leave it out, or load the model with sv.load(NAME, {frozen_weights!r})"
        )


def as_vectors(vectors: Any, model: Model, name: str = "vectors") -> tuple[Adapter, ...]:
    """One or several vectors, each a value or a file, as a tuple of adapters that fit the model; None: an empty tuple.

    Raises UserError for anything else, and for the files that `load_vectors` refuses.
    """
    if vectors is None:
        return ()
    if isinstance(vectors, list | tuple):
        check_distinct(item for item in vectors if item is not None)
        adapters = tuple(adapter for item in vectors if item is not None for adapter in as_vectors(item, model, name))
        check_different(adapters)
        return adapters
    if isinstance(vectors, str | os.PathLike):
        vectors = load_vectors(path(name, vectors, "the path of a vectors file"), model)
    fix = "pass what sv.train_vectors or sv.load_vectors returned, the path of a vectors file, or None"
    adapter = instance(name, vectors, Adapter, fix)
    check_fits(adapter, model)
    return (adapter,)


def check_fits(adapter: Adapter, model: Model) -> None:
    """Raise UserError for an adapter of another shape or another model, and for the task LoRA that is already merged
    into the model's weights, as it would act twice. All processes must call this."""
    if adapter is model.adapter:
        raise UserError(
            f"this task LoRA is merged into the weights of {model.name!r} already, and would act twice: leave it out, "
            "or pass the model that it was trained on"
        )
    if hasattr(adapter, "check"):
        adapter.check(model.architecture)
    check_origin(adapter, model)


def as_conversations(prompts: Any) -> list[tuple[str, list[Message]]]:
    """Each prompt's name in error messages ("prompt 3"), and its messages up to the assistant's turn.

    Raises UserError if `prompts` is not a collection of texts, conversations and rows.
    """
    if isinstance(prompts, str | bytes):
        raise UserError(f"prompts is {shown(prompts)}, a single text: pass a list, [text]")
    if isinstance(prompts, Mapping) and not hasattr(prompts, "num_rows"):
        raise UserError(f"prompts is {shown(prompts)}: pass a list of prompts; a single row goes into a list, [row]")
    prompts = records_of(prompts)
    if isinstance(prompts, Mapping) or hasattr(prompts, "num_rows"):
        prompts = as_rows(prompts, needs_answer=False, name="prompts")
    if isinstance(prompts, set | frozenset) or not isinstance(prompts, Iterable):
        raise UserError(f"prompts is {shown(prompts)}: pass a list of texts, conversations or rows")
    return [(f"prompt {number}", _conversation(prompt, f"prompt {number}")) for number, prompt in enumerate(prompts, 1)]


def _conversation(prompt: Any, where: str) -> list[Message]:
    if isinstance(prompt, str):
        return normalize({"messages": [{"role": "user", "content": str(prompt)}]}, where)["messages"]
    if isinstance(prompt, Mapping):
        if "role" in prompt and "messages" not in prompt:
            raise UserError(f"{where} is a single message: a conversation is a list of messages, in a list of prompts")
        row = normalize(prompt, where)
        return row["messages"] if response_of(row) is None else row["messages"][:-1]
    if isinstance(prompt, list | tuple):
        row = normalize({"messages": prompt}, where)
        if response_of(row) is not None:
            raise UserError(f"{where} ends with the assistant's turn: leave that turn out to have it answered anew")
        return row["messages"]
    raise UserError(f"{where} is {shown(prompt)}: pass a text, a list of messages, or a row")


def _prompt_ids(model: Model, where: str, messages: list[Message], max_new_tokens: int) -> np.ndarray:
    a = model.architecture
    try:
        tokens = prompt_tokens(model.tokenizer, messages, sys.maxsize)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    room = a.max_length - max_new_tokens
    if len(tokens) > room:
        raise UserError(
            f"{where} has {len(tokens)} tokens: the model takes {a.max_length} in all, which with max_new_tokens="
            f"{max_new_tokens} leaves {room} for a prompt; shorten the prompt or lower max_new_tokens"
        )
    if not len(tokens):
        raise UserError(f"{where} has no tokens: the chat template leaves it empty")
    check_token_ids(tokens, a.vocab_size, where)
    return tokens


def _token_ids(tokens: Any, architecture: Architecture) -> jax.Array:
    if isinstance(tokens, jax.core.Tracer):
        return jnp.asarray(tokens)
    fix = "pass token ids [B, T], such as model.tokenizer([text])['input_ids']"
    if isinstance(tokens, str | bytes | Mapping):
        raise UserError(f"tokens is {shown(tokens)}: {fix}")
    spread = isinstance(tokens, jax.Array) and not tokens.is_fully_addressable
    try:
        ids = tokens if spread else np.asarray(tokens)
    except (TypeError, ValueError) as error:  # rows of different lengths
        raise UserError(f"tokens cannot be made one array [B, T]: {fix}, all rows of one length") from error
    if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"tokens has shape {ids.shape} and type {ids.dtype}: {fix}")
    if architecture.learned_positions and ids.shape[1] > architecture.max_length:
        raise UserError(f"tokens has {ids.shape[1]} positions, the model {architecture.max_length}: shorten the rows")
    if not spread:
        check_token_ids(ids, architecture.vocab_size, "tokens")
    return jnp.asarray(ids, jnp.int32)


@partial(jax.jit, static_argnames="dtype")
def _logits(decoder, tokens, adapters, *, dtype):
    return decoder.logits(decoder(tokens, adapters=adapters, options=ForwardOptions(dtype)))


def frozen_precision(asked: Precision | None = None) -> Precision:
    """The precision of weights that are not trained: `asked`, else bfloat16 on accelerators, which compute in it
    anyway, and float32 on CPU."""
    return asked or ("float32" if platform() == "cpu" else "bfloat16")


def compute_dtype() -> DTypeLike:
    """The dtype of forward passes: bfloat16 on accelerators, float32 on CPU."""
    return jnp.float32 if platform() == "cpu" else jnp.bfloat16
