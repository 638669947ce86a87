"""Requests to an LLM judge at an endpoint that speaks the OpenAI chat protocol.

The server is not trusted: each attempt has a time limit from the connection to the last byte, bodies have a maximum
size and are never decompressed, redirects are not followed, and waits that it asks for are cut to a minute.
"""

import asyncio
import base64
import binascii
import contextlib
import dataclasses
import email.utils
import itertools
import json
import logging
import math
import os
import queue
import re
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from secvec_jax.checks import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, checked
from secvec_jax.errors import UserError
from secvec_jax.evaluation.replies import clip
from secvec_jax.redaction import redact

OPENAI = "https://api.openai.com/v1"

_LARGEST_BODY = 4 * 2**20
"""Maximum size of an answer in bytes; a verdict has a few hundred."""
_LONGEST_WAIT = 60.0
"""Maximum seconds before an attempt is repeated, whatever the server asks for."""
_STOP_SECONDS = 3.0
"""Seconds that open requests have to be cancelled after Ctrl-C or an error, before they are abandoned."""
_log = logging.getLogger(__name__)


@checked
@dataclasses.dataclass(frozen=True)
class JudgeRequests:
    """Requests to the judge."""

    key_variable: str = "OPENAI_API_KEY"
    """environment variable with the key, or with "Basic" and base64 of user:password; never written to a file"""
    concurrency: PositiveInt = 8
    """concurrent requests"""
    retries: NonNegativeInt = 6
    """retries after a refused connection, a timeout, a 429 or a 5xx, with exponential backoff; a wait that the server
    asks for is cut to 60 seconds"""
    timeout: PositiveFloat = 120.0
    """seconds per attempt, from the connection to the last byte of the answer"""
    verdict_tokens: PositiveInt = 512
    """maximum tokens per verdict, including its reasoning"""
    temperature: NonNegativeFloat | None = 0.0
    """sampling temperature of the judge; none: do not send one"""

    def __post_init__(self) -> None:
        # Do not echo the value: it may be a key that was passed by mistake.
        if not re.fullmatch(r"[A-Za-z_]\w*", self.key_variable, re.ASCII):
            raise UserError("key_variable must be the name of an environment variable, such as OPENAI_API_KEY")

    @property
    def key(self) -> str:
        """The key, or "" if the variable is not set. Raises UserError if it cannot be sent in a header."""
        key = os.environ.get(self.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"${self.key_variable} contains characters that are invalid in a key: set it again")
        return key


@checked
@dataclasses.dataclass(frozen=True)
class Judge:
    """A judge model and the OpenAI-compatible endpoint that serves it, such as http://127.0.0.1:8000/v1."""

    model: str
    url: str = OPENAI
    asking: JudgeRequests = JudgeRequests()

    def __post_init__(self) -> None:
        check_url(self.url, self.asking)


def check_judge(name: str, url: str, asking: JudgeRequests) -> None:
    """Raise UserError for an invalid endpoint, and for settings of a judge if no judge is named."""
    check_url(url, asking)
    if not name and (url != OPENAI or asking != JudgeRequests()):
        raise UserError("there are settings for a judge, but no judge is named: name its model with --judge")


def check_url(url: str, asking: JudgeRequests) -> None:
    """Raise UserError if a judge's URL is invalid or contains credentials, since the URL is saved with the run."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    hidden = "@" in url or redact(url, os.environ.get(asking.key_variable, "").strip()) != url
    if hidden:
        raise UserError(
            f"the judge's URL contains a key or a password: remove it and set ${asking.key_variable} to the key "
            '(for a user and a password, to "Basic" and base64 of user:password)'
        )
    if not usable or parts.query or parts.fragment or not url.isprintable() or " " in url:
        raise UserError(f"{url!r} is not a valid judge URL: use one such as http://127.0.0.1:8000/v1")


def request_of(judge: Judge, question: str) -> dict[str, Any]:
    """Return the request's content: everything that a verdict depends on."""
    body = {
        "model": judge.model,
        "messages": [{"role": "user", "content": question}],
        "max_completion_tokens": judge.asking.verdict_tokens,
    }
    return body if judge.asking.temperature is None else body | {"temperature": judge.asking.temperature}


Answer = tuple[str, tuple[int, int]] | None
"""A verdict with its (prompt, completion) tokens; None for an answer that is not a chat completion."""


def answers(judge: Judge, questions: Sequence[str]) -> Generator[tuple[str, Answer]]:
    """Yield each question with its answer, in the order in which they arrive; closing it cancels the open requests.

    Raises UserError if the endpoint rejects the key, the model or a request, or if it cannot be reached or keeps
    failing after all retries. The requests run in an event loop of another thread, since a notebook's thread has one
    already: tasks, unlike threads, can be cancelled while they wait for a server.
    """
    if not questions:
        return
    endpoint = _Endpoint(judge)
    arrived: queue.Queue[tuple[str, Answer] | BaseException] = queue.Queue()
    pending = iter(questions)

    async def ask_in_turn() -> None:
        for question in pending:
            arrived.put((question, await endpoint.ask(question)))

    async def ask_all() -> None:
        try:
            async with endpoint.client, asyncio.TaskGroup() as group:
                for _ in range(min(judge.asking.concurrency, len(questions))):
                    group.create_task(ask_in_turn())
        except BaseExceptionGroup as errors:
            arrived.put(errors.exceptions[0])
        except Exception as error:
            arrived.put(error)

    loop = asyncio.new_event_loop()
    task = loop.create_task(ask_all())

    def run() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
        loop.close()

    thread = threading.Thread(target=run, name="judge", daemon=True)
    thread.start()
    try:
        for _ in questions:
            answer = arrived.get()
            if isinstance(answer, BaseException):
                raise answer
            yield answer
    finally:
        with contextlib.suppress(RuntimeError):  # the loop is closed: all is done
            loop.call_soon_threadsafe(task.cancel)
        thread.join(_STOP_SECONDS)


def check_answers(judge: Judge) -> None:
    """Send one short question. Raises UserError as `answers` does, and if the answer is not a chat completion."""
    for _, answer in answers(judge, ["Answer with the single word: ready"]):
        if answer is None:
            raise no_chat_endpoint(judge)


def no_chat_endpoint(judge: Judge) -> UserError:
    """Return the error for a server whose answers are not chat completions."""
    return UserError(
        f"the server at {judge.url} does not speak the OpenAI chat protocol: check --judge-url (it often ends in /v1)"
    )


class _Malformed(Exception):
    """The server's answer is not one that a chat endpoint sends."""


class _Endpoint:
    """Sends one judge's requests."""

    def __init__(self, judge: Judge):
        import httpx  # imported lazily: few runs need it

        key = judge.asking.key
        self._judge, self._secrets = judge, _secrets(judge.asking)
        self._attempts = judge.asking.retries + 1
        self._told = -math.inf
        try:
            self._url = httpx.URL(f"{judge.url.rstrip('/')}/chat/completions")
        except httpx.InvalidURL:
            raise UserError(
                f"{judge.url!r} is not a valid judge URL: use one such as http://127.0.0.1:8000/v1"
            ) from None
        self._failures = (httpx.HTTPError, httpx.StreamError, OSError)
        self.client = httpx.AsyncClient(
            headers={
                "Authorization": key if key.startswith(_BASIC) else f"Bearer {key or 'none'}",
                "Content-Type": "application/json",
                "Accept-Encoding": "identity",  # a compressed body could decompress to gigabytes
            },
            timeout=None,  # a limit on each read would not end a slow answer: `_attempt` limits the whole
            limits=httpx.Limits(max_connections=judge.asking.concurrency),
            # A redirect would send prompts and replies to an address that the user did not choose.
            follow_redirects=False,
        )

    async def ask(self, question: str) -> Answer:
        """Send a request, and again after passing failures. Raises UserError if it is rejected or keeps failing."""
        content = json.dumps(request_of(self._judge, question)).encode()
        for attempt in itertools.count(1):
            try:
                status, headers, body = await self._attempt(content)
            except _Malformed:
                return None
            except TimeoutError:
                problem, headers, error = "timed out", {}, self._unreachable("timed out")
            except self._failures:
                problem, headers, error = "no answer", {}, self._unreachable("could not be reached")
            else:
                if 200 <= status < 300:
                    return self._read(body)
                problem, error = str(status), UserError(self._describe(status, headers, body))
                if status not in (408, 409, 429) and status < 500:
                    raise error from None
            if attempt == self._attempts:
                raise error from None
            await self._wait(_delay(headers, attempt), problem, attempt)
        raise AssertionError("not reached")

    async def _attempt(self, content: bytes) -> tuple[int, Mapping[str, str], bytes]:
        """Return the status, the headers and the body; only the first bytes of a body that is too large."""
        body = bytearray()
        async with (
            asyncio.timeout(self._judge.asking.timeout),
            self.client.stream("POST", self._url, content=content) as response,
        ):
            succeeded = 200 <= response.status_code < 300
            if response.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
                if succeeded:
                    raise _Malformed
                return response.status_code, response.headers, b""
            async for part in response.aiter_raw():
                body += part
                if len(body) > _LARGEST_BODY:
                    if succeeded:
                        raise _Malformed
                    break
        return response.status_code, response.headers, bytes(body)

    async def _wait(self, seconds: float, problem: str, attempt: int) -> None:
        now = time.monotonic()
        if seconds >= 1 and now - self._told > 10:  # once for all concurrent requests
            self._told = now
            _log.warning(
                "the judge at %s: %s; waiting %.0f s before attempt %d of %d",
                self._judge.url, problem, seconds, attempt + 1, self._attempts,
            )  # fmt: skip
        await asyncio.sleep(seconds)

    def _read(self, body: bytes) -> Answer:
        try:
            completion = json.loads(body)
            text = completion["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return None
        if text is not None and not isinstance(text, str):
            return None
        usage = completion.get("usage")
        counts = usage if isinstance(usage, dict) else {}
        tokens = (_count(counts.get("prompt_tokens")), _count(counts.get("completion_tokens")))
        return redact(text or "", *self._secrets), tokens

    def _unreachable(self, problem: str) -> UserError:
        return UserError(
            f"the judge at {self._judge.url} {problem} (attempts: {self._attempts}): check that it is running, "
            "then rerun the same command to resume"
        )

    def _describe(self, status: int, headers: Mapping[str, str], body: bytes) -> str:
        """Return the message for an HTTP error status: what failed and how to fix it."""
        judge = self._judge
        if 300 <= status < 400:
            try:
                to = urlsplit(headers.get("location", ""))
                target = redact(f"{to.scheme}://{to.netloc}", *self._secrets) if to.netloc else "another path"
            except ValueError:
                target = "an address that is not valid"
            return (
                f"the judge at {judge.url} redirects to {target} ({status}); redirects are not followed: if prompts "
                "and replies may be sent there, pass that URL as --judge-url"
            )
        if status in (401, 403):
            return f"the judge at {judge.url} rejected the key ({status}): set ${judge.asking.key_variable}"
        if status == 404:
            return f"the judge at {judge.url} has no such model or path ({judge.model!r}, 404)"
        if status == 429 or status >= 500:
            return (
                f"the judge at {judge.url} still fails with {status} after {self._attempts} attempts: try again "
                "later or with a lower --concurrency; rerun the same command to resume"
            )
        # Redact before clipping, or part of a key could remain.
        reason = clip(redact(body.decode(errors="replace"), *self._secrets), 100)
        return f"the judge at {judge.url} rejected the request ({status}): {reason}"


def _delay(headers: Mapping[str, str], attempt: int) -> float:
    """Return the seconds to wait after an attempt: those that the server asks for, or twice as many as before."""
    asked: float | None = None
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        if "retry-after-ms" in headers:
            asked = float(headers["retry-after-ms"]) / 1000
        elif "retry-after" in headers:
            after = headers["retry-after"]
            is_number = re.fullmatch(r"[\d.]+", after)
            asked = float(after) if is_number else email.utils.parsedate_to_datetime(after).timestamp() - time.time()
    usual = min(0.5 * 2 ** min(attempt - 1, 10), 8.0)
    return min(asked, _LONGEST_WAIT) if asked is not None and asked >= 0 else usual


def _count(tokens: Any) -> int:
    """Return an endpoint's token count, or 0 if it is not a plausible number."""
    return tokens if isinstance(tokens, int) and 0 <= tokens < 10**9 else 0


_BASIC = "Basic "


def _secrets(asking: JudgeRequests) -> list[str]:
    """Return the forms in which a server may echo the key."""
    key = asking.key
    if not key.startswith(_BASIC):
        return [key]
    encoded = key.removeprefix(_BASIC).strip()
    try:
        decoded = base64.b64decode(encoded).decode()
    except (binascii.Error, UnicodeDecodeError):
        return [encoded]
    return [encoded, decoded, decoded.partition(":")[2]]
