"""Evaluate a secvec_jax model, with or without vectors, in lm-evaluation-harness.

`HarnessModel` implements the interface of the harness's own backends, so all its tasks run: multiple choice by
likelihood, perplexity over rolling windows, and free generation. Prompts are truncated and split as in the Hugging Face
backend, which gives the same numbers. On a cluster, every process makes all requests, and each batch is sharded over
the whole mesh.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from secvec_jax.data.chat import Example
from secvec_jax.errors import UserError
from secvec_jax.evaluation.likelihood import likelihoods
from secvec_jax.inference import compute_dtype
from secvec_jax.model.adapter import Adapter, as_adapters
from secvec_jax.model.generate import generate_tokens
from secvec_jax.model.hub import Model
from secvec_jax.model.sampling import Sampling
from secvec_jax.turns import render
from secvec_jax.vectors.lora import merge_adapters

OnRequest = Callable[[str, int, int], None]
"""Progress callback: the kind of request, the number of requests done, and their total."""

_REPLY = 256
"""The default maximum reply length in tokens, as in the harness's own backends."""
_SAMPLING = {"do_sample", "temperature", "until", "max_gen_toks"}


class HarnessModel(TemplateLM):
    """A backend for `lm_eval.simple_evaluate(HarnessModel(model, vectors), tasks=[...])`."""

    def __init__(
        self,
        model: Model,
        vectors: Adapter | tuple[Adapter, ...] | None = None,
        on_request: OnRequest = lambda what, done, total: None,
        batch_size: int = 64,
        seed: int = 0,
    ):
        super().__init__()
        backbone, self.adapters = merge_adapters(model.backbone, as_adapters(vectors))
        self.model = model.with_backbone(backbone)
        self.tokenizer = model.tokenizer
        self.batch_size, self.seed = batch_size, seed
        self._on_request = on_request

    @property
    def max_length(self) -> int:
        """The context length of the model, in tokens."""
        return self.model.architecture.max_length

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that a text without a context is conditioned on: BOS, or end-of-text without one."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, for the harness's caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return token ids, with the tokenizer's special tokens unless the text already begins with them."""
        begin = self.tokenizer.decode(self.prefix_token_id)
        if add_special_tokens is None:
            add_special_tokens = False if begin and string.startswith(begin) else None
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **special)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text, in the model's chat template."""
        return render(self.tokenizer, chat_history, add_generation_prompt, not add_generation_prompt)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        examples = [_example(context, continuation, self.max_length) for _, context, continuation in requests]
        total = len(examples)
        return likelihoods(
            self.model, examples, self.adapters, lambda done: self._on_request("likelihoods", done, total)
        )

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts in nats, summed over windows that share no predicted token."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            rolled = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, rolled):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return replies, each cut at its first stop sequence; prompts that are too long are truncated on the left.

        Raises UserError for sampling settings other than the temperature, and if the reply length leaves no room for a
        prompt.
        """
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        replies: dict[int, str] = {}
        for members in groups.values():
            settings = normalize_gen_kwargs(requests[members[0]].args[1], _REPLY)
            contexts = [requests[number].args[0] for number in members]
            texts = self._replies(contexts, settings, len(replies), len(requests))
            replies |= dict(zip(members, texts, strict=True))
        return [replies[number] for number in range(len(requests))]

    def _replies(self, contexts: list[str], settings: Any, before: int, total: int) -> list[str]:
        if unknown := sorted(key for key in settings if key not in _SAMPLING and settings[key] is not None):
            raise UserError(
                f"a task sets {unknown[0]} for generation, which is not supported: remove it from gen_kwargs"
            )
        tokens = settings["max_gen_toks"]
        room = self.max_length - tokens
        if room < 1:
            raise UserError(
                f"replies of {tokens} tokens leave no room for a prompt in the model's context of {self.max_length}"
            )
        replies = generate_tokens(
            self.model.backbone,
            [np.asarray(self.tok_encode(context)[-room:], np.int32) for context in contexts],
            self.adapters,
            max_new_tokens=tokens,
            stop=self.model.stop_tokens,
            batch_size=self.batch_size,
            sampling=Sampling(settings["temperature"] if settings["do_sample"] else 0.0),
            seed=self.seed,
            dtype=compute_dtype(),
            progress=lambda done: self._on_request("replies", before + done, total),
        )
        until = handle_stop_sequences(settings["until"], eos=self.tokenizer.decode(self.eot_token_id))
        texts = (self.tokenizer.decode(reply, skip_special_tokens=True) for reply in replies)
        return [postprocess_generated_text(text, until, None) for text in texts]


def _example(context: list[int], continuation: list[int], longest: int) -> Example:
    """Return the continuation after as much of its context as fits the model's context length."""
    tokens = np.asarray([*context, *continuation][-(longest + 1) :], np.int32)
    return Example(tokens, np.arange(len(tokens)) >= len(tokens) - min(len(continuation), longest))
