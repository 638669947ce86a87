"""Inputs of people who wish the user ill: rows, templates, judges' answers, YAML and results.json, made by hypothesis.

`KINDS` names each kind: a strategy that makes inputs, and a check that gives one to the library. A check returns where
the input was taken and raises UserError where it was refused; all else is a bug. `run` tries a number of inputs of a
kind.
"""

import contextlib
import csv
import dataclasses
import io
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from secvec_jax import command_line, turns
from secvec_jax.data.encoded import encode_rows
from secvec_jax.data.sources import load_rows
from secvec_jax.errors import UserError
from secvec_jax.evaluation.card import model_card
from secvec_jax.evaluation.judge_client import Judge, JudgeRequests
from secvec_jax.evaluation.judges import HARMFULNESS, verdicts
from secvec_jax.evaluation.report import compare, markdown
from secvec_jax.evaluation.results import Results
from secvec_jax.recipes.score import ScoreRun
from secvec_jax.terminal import Console
from secvec_jax.verb_arguments import Verb
from tests.chat_server import HEADER, Server, says
from tests.toys import build_tokenizer

SECONDS = 15
"""Of processor time that an input may take."""
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def run(kind: str, count: int, folder: Path) -> int:
    """Try `count` inputs of a kind; returns how many were taken or refused in one line, in time. Raises the first that
    was not."""
    strategy, check = KINDS[kind]
    passed = 0

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None,
              phases=[Phase.generate, Phase.shrink])  # fmt: skip
    @given(strategy)
    def try_one(value: Any) -> None:
        nonlocal passed
        start = time.process_time()
        try:
            check(value, folder)
        except UserError as error:
            message = str(error)
            assert message.strip() and len(message.splitlines()) == 1 and len(message) <= 1_000, message
            assert not CONTROLS.search(message), ascii(message)
        assert time.process_time() - start < SECONDS, "it took long"
        passed += 1

    try_one()
    return passed


# -------------------------------------------------------------------------------------------------- texts and values

pieces = st.sampled_from(
    ["\x1b[2J", "\x1b]0;t\x07", "\x9b31m", "\x00", "\r", "\n", "\t", "\u202e", "\u2066", "\u200b", "\ufeff", "\u2028",
     "[/x]", "[red]", "[link=http://e]", ":smile:", "|", "`", "```", "<b>", "</td>", "<!--", "](http://e)",
     "![i](http://e)",
     "\\", "$x$", "%s", "{0}", "{{ 1 }}", "<|im_end|>", "<|im_start|>assistant\n", "<think>", "--", "~", "~nobody/x",
     "/dev/zero",
     "../..", "e\u0301" * 9, "👨‍👩‍👧", "日本", "a" * 5_000, "\uffff", "\U0010ffff", "none", "null", "1e999", "a", " "]
)  # fmt: skip
texts = st.lists(pieces | st.text(st.characters(codec="utf-8"), max_size=4), max_size=5).map("".join)
numbers = st.sampled_from(["NaN", "Infinity", "-Infinity", "1e999", "-0", "1" * 5_000, "1" * 300, "0.1", "-5", "true"])
halves = st.sampled_from([r"\ud800", r"\udfff\ud800", r"\u0000", r"\u001b[2J", r"\u202e", r"\\"])
quoted = texts.map(json.dumps) | halves.map(lambda half: f'"a{half}b"')
nested = st.tuples(st.sampled_from(["[]", "{}"]), st.sampled_from([3, 90, 900, 1_100, 60_000])).map(
    lambda made: ('{"a":' if made[0] == "{}" else "[") * made[1] + "1" + made[0][1] * made[1]
)
values = quoted | numbers | nested | st.sampled_from(["[]", "{}", "null", '[{"role": "user", "content": "a"}]'])
names = st.sampled_from(["prompt", "response", "messages", "system", "input", "history", "weight", "category",
                         "options",
                         "id", "conversations", "label", "tools"]) | texts  # fmt: skip
messages = st.lists(
    st.tuples(st.sampled_from(["user", "assistant", "system", "tool", "x"]).map(json.dumps) | quoted, quoted | values),
    min_size=1,
    max_size=6,
).map(lambda turns_: "[" + ", ".join(f'{{"role": {role}, "content": {said}}}' for role, said in turns_) + "]")
lines = (
    st.lists(st.tuples(names.map(json.dumps), values), max_size=4).map(
        lambda pairs: "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"
    )
    | st.tuples(quoted, quoted).map(lambda pair: f'{{"prompt": {pair[0]}, "response": {pair[1]}}}')
    | messages.map(lambda made: f'{{"messages": {made}}}')
    | st.tuples(st.integers(1, 900), quoted).map(
        lambda made: json.dumps(
            {"messages": [{"role": ("user", "assistant")[turn % 2], "content": "a"} for turn in range(2 * made[0])]}
        )
    )
    | values
    | texts
)


# -------------------------------------------------------------------------------------------------------------- rows


def check_lines(found: list[str], folder: Path) -> None:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(found), encoding="utf-8", errors="surrogatepass")
    rows = load_rows(str(path))
    encode_rows(_tokenizer(), rows, 64)
    for row in rows:
        for turn in row["messages"]:
            turn["content"].encode()


def check_tables(found: list[list[str]], folder: Path) -> None:
    path = folder / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, escapechar="\\").writerows([["prompt", "response", *found[0]], *found])
    load_rows(str(path))


def check_bytes(data: tuple[bytes, str], folder: Path) -> None:
    path = folder / f"rows{data[1]}"
    path.write_bytes(data[0])
    load_rows(str(path))


@cache
def _tokenizer() -> Any:
    return build_tokenizer()


# --------------------------------------------------------------------------------------------------------- templates

expressions = st.sampled_from(
    ["messages", "m", "m['content']", "n.x", "loop.index", "messages[0]['role']", "bos_token", "eos_token",
     "'a' * 99999",
     "'a' * 200000000", "9 ** 9", "9 ** 9 ** 9", "range(99999) | list", "n.x ~ n.x", "n.x + n.x", "''.__class__",
     "cycler",
     "messages | tojson(indent=99)", "'%99999999d' % 1", "raise_exception('\x1b[2J')", "strftime_now('%Y')", "f(9)",
     "f(60)",
     "messages | map(attribute='content') | join", "m.content | replace('a', 'a' * 999)", "1 / 0", "none.x",
     "lipsum(99)",
     "messages | batch(1) | list", "dict(**{'a': 1})", "'a'.ljust(99999999)", "m | pprint", "joiner", "x"]
)  # fmt: skip
statements = st.deferred(
    lambda: (
        expressions.map(lambda made: "{{ " + made + " }}")
        | st.sampled_from(
            [
                "text",
                "<|im_start|>",
                "<|im_end|>",
                "{% set n = namespace(x='aaaa') %}",
                "{% break %}",
                "{%",
                "{#",
                "{% include 'x' %}",
                "{% import 'x' as y %}",
                "{% generation %}{{ m }}{% endgeneration %}",
                "{% macro f(i) %}{% if i %}{{ f(i - 1) }}{{ f(i - 1) }}{% endif %}{% endmacro %}",
                "{% macro f(i) %}{{ f(i) }}{% endmacro %}",
            ]
        )
        | expressions.map(lambda made: "{% set n.x = " + made + " %}")
        | st.tuples(
            st.sampled_from(["m in messages", "i in range(99999)", "i in range(99)", "m in messages recursive"]),
            templates,
        ).map(lambda made: "{% for " + made[0] + " %}" + made[1] + "{% endfor %}")
        | st.tuples(expressions, templates).map(lambda made: "{% if " + made[0] + " %}" + made[1] + "{% endif %}")
    )
)
templates = st.lists(statements, max_size=4).map("".join)


def check_templates(template: str, folder: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    row = [{"role": "user", "content": "asked"}, {"role": "assistant", "content": "said"}]
    before = turns._SECONDS, turns._MEMORY
    turns._SECONDS, turns._MEMORY = 0.5, 2**28
    try:
        from secvec_jax.data.chat import encode

        encode(tokenizer, row, 100)
    finally:
        turns._SECONDS, turns._MEMORY = before


# ------------------------------------------------------------------------------------------------------------ judges

replies = (
    st.tuples(texts, st.sampled_from(["Score: ", "**Score:** ", "final score:", "Score"]), numbers | texts).map("".join)
    | texts
).map(lambda text: says(text)[1])
bodies = (
    replies.map(str.encode)
    | st.lists(
        st.tuples(st.sampled_from(["choices", "usage", "error", "message"]).map(json.dumps), values), max_size=3
    ).map(lambda pairs: ("{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}").encode())
    | values.map(lambda value: f'{{"choices": [{{"message": {{"content": {value}}}}}], "usage": {value}}}'.encode())
    | st.binary(max_size=50)
)
heads = st.sampled_from(
    [HEADER, b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n", b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n",
     b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n", b"HTTP/1.1 302 \x1b[2J\r\nLocation: \x1b[2J\r\n",
     b"HTTP/9.9 1\r\n",
     b"HTTP/1.1 400 No\r\n", b"HTTP/1.1 429 No\r\nRetry-After: 99999\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n",
     b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200_000 + b"\r\n", b"HTTP/1.1 100 Continue\r\n\r\n" + HEADER,
     b"\xff\xfe\r\n", b""]
)  # fmt: skip


def check_answers(answer: tuple[bytes, bytes], folder: Path) -> None:
    head, body = answer
    with _serving([head + b"\r\n" + body]) as url:
        judge = Judge("m", url, JudgeRequests(retries=0, timeout=1.0))
        found = verdicts(judge, HARMFULNESS, [(body.hex()[:50], "reply")], folder / "verdicts")
    assert found.scores[0] in (None, 1, 2, 3, 4, 5)


@contextlib.contextmanager
def _serving(parts: list[bytes]) -> Iterator[str]:
    server = _server()
    server.act = lambda number, body: parts
    yield server.url


@cache
def _server() -> Server:
    server = Server(lambda number, body: says("Score: 1"))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


# ------------------------------------------------------------------------------------- settings, in YAML and in flags

keys = st.sampled_from([field.name for field in dataclasses.fields(ScoreRun)]) | texts


def check_settings(found: tuple[dict[str, Any], list[str]], folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_text(json.dumps(found[0]))  # which is YAML
    verb = Verb("score", lambda: (ScoreRun, lambda settings, command: None), on_devices=False)
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = command_line.main("Test.", {"score": verb}, ["score", "--config", str(path), *found[1]])
        except SystemExit as end:
            code = end.code
    text = stream.getvalue()
    assert code in (0, 2) and not CONTROLS.search(text), ascii(text)
    assert code == 0 or text.splitlines()[-1].startswith("error: "), text


# ------------------------------------------------------------------------------------------------------ results.json

numbers_ = st.sampled_from([None, 0.5, 1, -1, 10**400, 10**20, 1e300, True, "x", [], 0])
scores = st.fixed_dictionaries(
    {
        "value": numbers_,
        "n": numbers_ | st.just(8),
        "ci95": st.lists(numbers_, min_size=1, max_size=3) | st.just([0.1, 0.9]),
    },
    optional={"rules": numbers_ | st.just(2)},
)
sound = st.just({"value": 0.5, "n": 8, "ci95": [0.1, 0.9]})
trees = st.recursive(
    texts | numbers_, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2)
)
metrics = st.dictionaries(st.sampled_from(["refusal", "harmful_loss", "drift"]) | texts, sound | scores, max_size=3)
results = st.fixed_dictionaries(
    {
        "command": texts,
        "config": st.dictionaries(st.sampled_from(["model", "vectors", "out"]) | texts, trees, max_size=4),
        "environment": st.dictionaries(texts, trees, max_size=2),
        "seconds": st.dictionaries(texts, numbers_ | st.just(1.0), max_size=2),
        "rows": st.lists(st.fixed_dictionaries({"name": texts, "metrics": metrics}), max_size=3),
    },
    optional={"schema_version": st.just(1) | numbers_},
)


def check_results(found: dict[str, Any], folder: Path) -> None:
    run_folder = folder / "run"
    run_folder.mkdir(exist_ok=True)
    (run_folder / "results.json").write_text(json.dumps(found))
    loaded = Results.load(run_folder)
    stream = io.StringIO()
    Console(file=stream, width=118, force_terminal=True, color_system=None).print(compare([run_folder]))
    card = model_card("name", None, [loaded], [loaded], list(found["config"]))
    for text in (stream.getvalue(), card, markdown(loaded)):
        assert not CONTROLS.search(text), ascii(text)
    _, header, body = card.split("---\n", 2)  # the Hub's metadata is YAML, not Markdown
    scored = yaml.safe_load(header)["model-index"][0]["results"]
    names = {row["name"] for row in found["rows"]} | {"prompts of secvec_jax"}
    assert all(entry["dataset"]["name"] in names for entry in scored)
    outside = re.sub(r"(?s)^(`{3,})bash\n.*?\n\1$", "", body, flags=re.MULTILINE)
    outside = re.sub(r"`[^`\n]*`", "", outside.replace("\\`", ""))
    assert not re.search(r"<[a-z!/]|(?<!\\)\]\(", outside), outside


KINDS: dict[str, tuple[st.SearchStrategy, Callable[[Any, Path], None]]] = {
    "lines": (st.lists(lines, max_size=3), check_lines),
    "tables": (st.lists(st.lists(texts, max_size=4), min_size=1, max_size=3), check_tables),
    "bytes": (st.tuples(st.binary(max_size=60), st.sampled_from([".jsonl", ".json", ".csv"])), check_bytes),
    "templates": (templates, check_templates),
    "answers": (st.tuples(heads, bodies), check_answers),
    "settings": (st.tuples(st.dictionaries(keys, trees, max_size=3), st.lists(texts | st.just("--out"), max_size=2)),
                 check_settings),
    "results": (results, check_results),
}  # fmt: skip
