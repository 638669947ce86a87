"""Small things to train: a random decoder, a model with a tokenizer, random examples."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from secvec_jax.data.chat import Example
from secvec_jax.inference import logits
from secvec_jax.model.architecture import Architecture
from secvec_jax.model.decoder import Decoder, leaf_name
from secvec_jax.model.hub import Model

VOCABULARY = 320

_SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "A security vector says that this behavior is already there.",
    "def add(a, b): return a + b  # 12345 + 67890",
    "What is the capital of France? The capital of France is Paris.",
]
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ARCHITECTURE = Architecture(
    "llama",
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_length=512,
)


def random_decoder(seed: int = 0, gain: float = 8.0, architecture: Architecture = ARCHITECTURE) -> Decoder:
    """A decoder whose matrices are `gain` times the usual start, so that its layers matter.

    The numbers are drawn here: what tests measure does not depend on the order in which modules are initialized.
    """
    return _random_decoder(architecture, seed, gain)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _random_decoder(architecture: Architecture, seed: int, gain: float) -> Decoder:
    names = ["embed", *architecture.projections]
    names += ["position_embed"] if architecture.learned_positions else []
    names += [] if architecture.tied_head else ["head"]
    keys = {name: jax.random.fold_in(jax.random.key(seed), number) for number, name in enumerate(names)}

    def drawn(path: tuple, leaf: jax.Array) -> jax.Array:
        name = leaf_name(path).removeprefix("layers.").removesuffix(".kernel")
        return 0.02 * jax.random.normal(keys[name], leaf.shape) * gain if name in keys else leaf

    return jax.tree_util.tree_map_with_path(drawn, Decoder(architecture, nnx.Rngs(0)))


def build_tokenizer(texts: Sequence[str] = tuple(_SENTENCES), vocabulary: int = VOCABULARY):
    """A byte-level BPE of a few sentences with a ChatML template, as a transformers tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=_CHATML,
        clean_up_tokenization_spaces=False,
    )


@functools.cache
def tiny_model() -> Model:
    return Model(random_decoder(), build_tokenizer(), "tiny")


def example(prompt: list[int], reply: list[int]) -> Example:
    tokens = np.asarray([*prompt, *reply], np.int32)
    return Example(tokens, np.arange(len(tokens)) >= len(prompt))


def losses_alone(model: Model, row: Example, vectors: Any = None) -> np.ndarray:
    """A row's losses at its supervised tokens, by the plain forward pass over that row alone.

    What is behind a token changes nothing for it, so rows are filled up to one length and share a program.
    """
    count = len(row.tokens)
    line = np.zeros((1, -(-count // 96) * 96), np.int32)
    line[0, :count] = row.tokens
    log_p = np.asarray(jax.nn.log_softmax(logits(model, line, vectors)))[0, : count - 1]
    losses = -log_p[np.arange(count - 1), row.tokens[1:]]
    return losses[row.supervised[1:]]


def random_examples(
    count: int, seed: int = 0, head: int = 0, longest: int = 12, vocabulary: int = 320
) -> list[Example]:
    """Rows of one reply, of many lengths; the first `head` tokens are the same in all."""
    rng = np.random.default_rng(seed)
    begin = rng.integers(3, vocabulary, head).tolist()
    rows = []
    for _ in range(count):
        prompt, reply = (rng.integers(3, vocabulary, rng.integers(2, longest // 2 + 1)).tolist() for _ in range(2))
        rows.append(example([*begin, *prompt], reply))
    return rows
