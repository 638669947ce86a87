"""An Inspect (inspect_ai) model API for our decoder: any Inspect task runs on it, with or without vectors.

    inspect eval task.py --model secvec_jax/runs/tuned
    inspect eval task.py --model secvec_jax/runs/aligned -M vectors=runs/vectors

After `secvec_jax/` comes what `sv.load` accepts. Inspect finds this module where secvec_jax is installed; in a clone,
the task's file has to import it. Requests that wait at the same time are decoded as one batch.
"""

import dataclasses
import queue
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import anyio
import numpy as np
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    Content,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    StopReason,
    modelapi,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from secvec_jax.checks import PositiveInt, check
from secvec_jax.data.chat import prompt_tokens
from secvec_jax.data.rows import Message
from secvec_jax.errors import UserError
from secvec_jax.inference import compute_dtype, decoded
from secvec_jax.limits import unlimited_address_space
from secvec_jax.model.generate import generate_tokens
from secvec_jax.model.hub import load
from secvec_jax.model.sampling import Sampling
from secvec_jax.turns import answer_of, begun_thought
from secvec_jax.vectors.lora import merge_adapters
from secvec_jax.vectors.store import load_several

_MAX_REPLY_TOKENS = 2048
"""Default length of a reply in tokens, or half of a shorter context; as in Inspect's local models."""

_QUIET_SECONDS = 0.1
"""Seconds without a new request after which a batch starts."""

_POLL_SECONDS = 0.02

_UNSUPPORTED = (
    "best_of", "frequency_penalty", "presence_penalty", "logit_bias", "num_choices", "logprobs", "top_logprobs",
    "prompt_logprobs", "response_schema", "modalities",
)  # fmt: skip
"""Settings of tasks that change replies and that this decoder does not support."""


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The settings that requests of one batch share. seed: None if the task sets none."""

    max_tokens: int
    sampling: Sampling
    seed: int | None


@dataclasses.dataclass(frozen=True)
class _Request:
    tokens: np.ndarray
    settings: _Settings
    reply: Future[list[int]]


@modelapi(name="secvec_jax")
class SecvecModel(ModelAPI):
    """A model of this package in Inspect.

    model_name: what `sv.load` takes. vectors: files or run directories of vectors to reply with. batch_size: the
    largest number of requests that are decoded together. Raises Inspect's PrerequisiteError, which it shows as one
    line, for a model or vectors that cannot be loaded.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),
        vectors: str | Sequence[str] | None = None,
        batch_size: int = 64,
        **unknown: Any,
    ):
        super().__init__(model_name, base_url, api_key, [], config)
        try:
            if unknown:
                argument = next(iter(unknown))
                raise UserError(f"unknown model argument {argument!r}: secvec_jax takes vectors and batch_size")
            self._batch_size = check(PositiveInt, batch_size, "batch_size")
            self._model = load(model_name)
            files = [vectors] if isinstance(vectors, str) else list(vectors or ())
            adapters = load_several(files, self._model) or ()
        except UserError as error:
            raise PrerequisiteError(str(error)) from error
        self._backbone, self._adapters = merge_adapters(self._model.backbone, adapters)
        self._waiting: queue.Queue[_Request] = queue.Queue()
        self._num_batches = 0
        threading.Thread(target=self._decode_forever, name="secvec_jax", daemon=True).start()

    def max_tokens(self) -> int | None:
        """The default length of a reply."""
        return min(_MAX_REPLY_TOKENS, self._model.architecture.max_length // 2)

    def max_connections(self) -> int:
        """The number of samples that Inspect requests at once: a batch."""
        return self._batch_size

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """The reply to a conversation.

        A prompt that leaves no room for a reply ends with the reason "model_length". Raises UserError for tools, for
        settings that this decoder does not have, and for turns that the chat template rejects.
        """
        settings = self._settings(tools, config)
        messages: list[Message] = [{"role": turn.role, "content": turn.text} for turn in input]
        if messages and messages[-1]["role"] == "assistant":
            raise UserError("the conversation ends with the assistant's turn, which cannot be continued: leave it out")
        tokens = prompt_tokens(self._model.tokenizer, messages, sys.maxsize)
        longest = self._model.architecture.max_length
        if len(tokens) + settings.max_tokens > longest:
            text = f"the prompt has {len(tokens)} tokens, and {settings.max_tokens} more do not fit into {longest}"
            return ModelOutput.from_content(self.model_name, text, "model_length")
        request = _Request(tokens, settings, Future())
        self._waiting.put(request)
        while not request.reply.done():
            await anyio.sleep(_POLL_SECONDS)
        reply = request.reply.result()
        text = begun_thought(self._model.tokenizer, messages) + decoded(self._model.tokenizer, reply)
        reason: StopReason = "max_tokens" if len(reply) >= settings.max_tokens else "stop"
        for end in config.stop_seqs or ():
            text, match, _ = text.partition(end)
            reason = "stop" if match else reason
        message = ChatMessageAssistant(content=_content(text), model=self.model_name, source="generate")
        total = len(tokens) + len(reply)
        return ModelOutput(
            model=self.model_name,
            choices=[ChatCompletionChoice(message=message, stop_reason=reason)],
            usage=ModelUsage(input_tokens=len(tokens), output_tokens=len(reply), total_tokens=total),
        )

    def _settings(self, tools: Sequence[ToolInfo], config: GenerateConfig) -> _Settings:
        if tools:
            raise UserError("tools are not supported by secvec_jax: use a task without tools")
        for name in _UNSUPPORTED:
            if getattr(config, name, None) not in (None, False, 1 if name in ("num_choices", "best_of") else None):
                raise UserError(f"{name} is not supported by secvec_jax: leave it out")
        sampling = Sampling.of(self._model.metadata.generation or {}, config.temperature)
        if config.top_k is not None:
            sampling = dataclasses.replace(sampling, top_k=config.top_k)
        if config.top_p is not None:
            sampling = dataclasses.replace(sampling, top_p=config.top_p)
        return _Settings(config.max_tokens or self.max_tokens() or _MAX_REPLY_TOKENS, sampling, config.seed)

    # ------------------------------------------------------------------------------------------ the thread that decodes

    def _decode_forever(self) -> None:
        while True:
            batch = [self._waiting.get()]
            while len(batch) < self._batch_size:
                try:
                    batch.append(self._waiting.get(timeout=_QUIET_SECONDS))
                except queue.Empty:
                    break
            groups: dict[_Settings, list[_Request]] = {}
            for request in batch:
                groups.setdefault(request.settings, []).append(request)
            for settings, requests in groups.items():
                self._decode(settings, requests)

    def _decode(self, settings: _Settings, requests: Sequence[_Request]) -> None:
        self._num_batches += 1
        try:
            with unlimited_address_space():  # Inspect's thread renders prompts meanwhile
                replies = generate_tokens(
                    self._backbone,
                    [request.tokens for request in requests],
                    self._adapters,
                    max_new_tokens=settings.max_tokens,
                    stop=self._model.stop_tokens,
                    batch_size=self._batch_size,
                    sampling=settings.sampling,
                    # The same prompt in several epochs is sampled anew, unless the task sets a seed.
                    seed=self._num_batches if settings.seed is None else settings.seed,
                    dtype=compute_dtype(),
                )
        except BaseException as error:  # the thread goes on; the request fails
            for request in requests:
                request.reply.set_exception(error)
            return
        for request, reply in zip(requests, replies, strict=True):
            request.reply.set_result(list(reply))


def _content(text: str) -> str | list[Content]:
    """A reply as scorers read it: a thought is kept separate from the answer."""
    answer = answer_of(text)
    if answer == text:
        return text
    start = text.rfind(answer) if answer else len(text)
    return [ContentReasoning(reasoning=text[:start].strip()), ContentText(text=answer)]
