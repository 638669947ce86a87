"""How the next token is chosen: greedily, or sampled as transformers does it, by the model's or a caller's settings.

The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from secvec_jax.checks import Bounds, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, checked
from secvec_jax.errors import UserError

_TOP_K = 50
"""transformers' top-k where a model is sampled from and generation_config.json does not give one."""

_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "typical_p": (1.0,),
    "top_h": (),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "guidance_scale": (1.0,),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "sequence_bias": ([], {}),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "stop_strings": ([],),
    "watermarking_config": (),
}
"""Settings of generation_config.json that change replies in ways this library does not support, and their values
that do not."""


@checked
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits; the default is greedy.

    temperature: 0 takes the likeliest token. top_k: sample from this many of the likeliest tokens; 0: from all. top_p:
    from the smallest set of tokens whose probabilities add up to this. min_p: from tokens whose probability is at least
    this fraction of the likeliest token's. repetition_penalty: divides the positive logits of tokens that have occurred
    and multiplies the negative ones, in greedy decoding too.

    Raises UserError for a value outside its range.
    """

    temperature: NonNegativeFloat = 0.0
    top_k: NonNegativeInt = 0
    top_p: Annotated[float, Bounds(above=0, at_most=1)] = 1.0
    min_p: Fraction = 0.0
    repetition_penalty: PositiveFloat = 1.0

    @classmethod
    def of(cls, generation: Mapping[str, Any], temperature: float | None = None) -> "Sampling":
        """The settings of a generation_config.json. temperature: replaces the file's, if given.

        Raises UserError for settings of the file that this library does not support, unless a temperature is given.
        """
        samples = bool(generation.get("do_sample"))
        if temperature is None:
            for key, harmless in _UNSUPPORTED.items():
                if (value := generation.get(key)) is not None and value not in harmless:
                    raise UserError(
                        f"generation_config.json has {key} {str(value)[:40]}, which is not supported: remove it there, "
                        "or give a temperature (0 for greedy decoding), with which it is left out"
                    )
        values = {
            name: generation[name]
            for name in ("top_k", "top_p", "min_p", "repetition_penalty")
            if generation.get(name) is not None
        }
        values = ({"top_k": _TOP_K} if samples else {}) | values
        given_temperature = generation.get("temperature")
        values["temperature"] = (1.0 if given_temperature is None else given_temperature) if samples else 0.0
        try:
            settings = cls(**values)
        except UserError as error:
            raise UserError(f"generation_config.json: {error}") from error
        return settings if temperature is None else dataclasses.replace(settings, temperature=temperature)


GREEDY = Sampling()
"""The likeliest token, whatever the model's own settings: how models are scored."""


def choose(logits: jax.Array, occurred: jax.Array | None, key: jax.Array, sampling: Sampling) -> jax.Array:
    """The next tokens `[B]` from logits `[B, V]`. occurred: `[B, V]`, which tokens a row has had, for the penalty."""
    if occurred is not None:
        penalized = jnp.where(logits < 0, logits * sampling.repetition_penalty, logits / sampling.repetition_penalty)
        logits = jnp.where(occurred, penalized, logits)
    if sampling.temperature == 0:
        return _first_largest(logits)
    return jax.random.categorical(key, _truncated(logits / sampling.temperature, sampling)).astype(jnp.int32)


def _truncated(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits with -inf at the tokens that are not sampled from; the likeliest token always is."""
    size = logits.shape[-1]
    if 0 < sampling.top_k < size:
        smallest = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        count = jnp.maximum(jnp.sum(before < sampling.top_p, axis=-1, keepdims=True), 1)
        logits = jnp.where(logits < jnp.take_along_axis(ordered, count - 1, axis=-1), -jnp.inf, logits)
    if sampling.min_p > 0:
        bound = logits.max(axis=-1, keepdims=True) + math.log(sampling.min_p)
        logits = jnp.where(logits < bound, -jnp.inf, logits)
    return logits


def _first_largest(logits: jax.Array) -> jax.Array:
    """`argmax` in two passes that XLA's CPU backend vectorizes."""
    places = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(logits == logits.max(axis=-1, keepdims=True), places, places[-1]), axis=-1)
