"""An LLM judge against a small local server that can misbehave."""

import base64
import json
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secvec_jax.errors import UserError
from secvec_jax.evaluation import judge_client
from secvec_jax.evaluation.judge_client import Judge, JudgeRequests
from secvec_jax.evaluation.judges import HARMFULNESS, HARMLESSNESS, INSTRUCTION_FOLLOWING, score_of, verdicts
from tests.chat_server import HEADER, Server, bomb, drips, endless, says

KEY = "sk-not-a-real-key-0123456789"


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    started = []

    def start(act) -> Server:
        server = Server(act)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def exchanges(count: int) -> list[tuple[str, str]]:
    return [(f"request {index}", f"reply {index}") for index in range(count)]


def graded(number: int, body: dict) -> tuple[int, str]:
    """A grade that the reply's own number decides, whatever order the questions come in."""
    asked = body["messages"][0]["content"]
    index = int(asked.partition("<reply>\nreply ")[2].split()[0])
    return says(f"It is so.\n\n**Score: {1 + index % 5}**")


@pytest.mark.parametrize("concurrency", [1, 8])
def test_verdicts_stand_in_the_order_of_the_replies(serve, tmp_path, concurrency):
    server, seen = serve(graded), []
    asking = JudgeRequests(concurrency=concurrency)
    found = verdicts(Judge("m", server.url, asking), HARMFULNESS, exchanges(12), tmp_path, seen.append)
    assert found.scores == [1 + index % 5 for index in range(12)]
    assert found.num_requests == 12 and found.tokens == (120, 36)
    assert seen == list(range(13))
    assert all(body["model"] == "m" and body["temperature"] == 0 for body in server.bodies)


def test_each_question_is_asked_once(serve, tmp_path):
    server = serve(graded)
    judge = Judge("m", server.url)
    first = verdicts(judge, HARMFULNESS, exchanges(5) * 2, tmp_path)
    assert len(first.scores) == 10 and first.num_requests == len(server.bodies) == 5
    again = verdicts(judge, HARMFULNESS, exchanges(6), tmp_path)
    assert again.scores[:5] == first.scores[:5]
    assert again.num_requests == 1 and len(server.bodies) == 6
    verdicts(judge, HARMLESSNESS, exchanges(1), tmp_path)  # each of these is another question
    verdicts(Judge("other", server.url), HARMFULNESS, exchanges(1), tmp_path)
    verdicts(Judge("m", server.url, JudgeRequests(temperature=None)), HARMFULNESS, exchanges(1), tmp_path)
    assert len(server.bodies) == 9
    assert "temperature" not in server.bodies[-1]


def test_what_was_judged_before_a_failure_is_kept(serve, tmp_path):
    server = serve(lambda number, body: graded(number, body) if number < 4 else (400, '{"error": {"message": "no"}}'))
    one = JudgeRequests(concurrency=1)
    with pytest.raises(UserError, match=r"rejected the request \(400\)"):
        verdicts(Judge("m", server.url, one), HARMFULNESS, exchanges(9), tmp_path)
    server.act = graded
    found = verdicts(Judge("m", server.url, one), HARMFULNESS, exchanges(9), tmp_path)
    assert found.scores == [1 + index % 5 for index in range(9)]
    assert found.num_requests == 5


@pytest.mark.parametrize("failure", [(429, "{}"), (500, "oops"), (503, ""), None])
def test_passing_failures_are_outlived(serve, tmp_path, failure):
    server = serve(lambda number, body: graded(number, body) if number % 2 else failure)
    found = verdicts(Judge("m", server.url, JudgeRequests(concurrency=1)), HARMFULNESS, exchanges(2), tmp_path)
    assert found.scores == [1, 2]
    assert len(server.bodies) == 4


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ((401, "{}"), r"rejected the key \(401\): set \$SOME_KEY"),
        ((404, "{}"), "has no such model or path"),
        ((429, "{}"), "fails with 429 after 2 attempts"),
        ((500, "oops"), "fails with 500 after 2 attempts"),
        ((200, "<html>welcome</html>"), "does not speak the OpenAI chat protocol"),
        ((200, "[]"), "does not speak the OpenAI chat protocol"),
        ((200, '{"choices": []}'), "does not speak the OpenAI chat protocol"),
        ((200, '{"choices": [{"message": {"content": 3}}]}'), "does not speak the OpenAI chat protocol"),
        (None, r"could not be reached.*attempts: 2"),
    ],
)
def test_lasting_failures_are_reported(serve, tmp_path, failure, message, monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY)
    server = serve(lambda number, body: failure)
    with pytest.raises(UserError, match=message) as raised:
        verdicts(Judge("m", server.url, JudgeRequests("SOME_KEY", retries=1)), HARMFULNESS, exchanges(3), tmp_path)
    assert KEY not in str(raised.value) and raised.value.__suppress_context__
    assert not list(tmp_path.iterdir())


def test_nobody_at_home(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(UserError, match=r"could not be reached.*attempts: 1"):
        verdicts(Judge("m", url, JudgeRequests(retries=0)), HARMFULNESS, exchanges(1), tmp_path)


def test_a_judge_that_takes_too_long(serve, tmp_path):
    released = threading.Event()
    server = serve(lambda number, body: (released.wait(10), says("Score: 1"))[1])
    with pytest.raises(UserError, match="timed out"):
        verdicts(Judge("m", server.url, JudgeRequests(timeout=0.2, retries=0)), HARMFULNESS, exchanges(1), tmp_path)
    released.set()


def test_the_key_is_sent_and_written_nowhere(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(graded)
    verdicts(Judge("m", server.url), HARMFULNESS, exchanges(3), tmp_path)
    assert server.keys == [f"Bearer {KEY}"] * 3
    assert not any(KEY in path.read_text() for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    "echo",
    [
        lambda key: says(f"You sent Authorization: Bearer {key}.\nScore: 4"),
        lambda key: says(f"https://user:{key}@host/?api_key={key}\nScore: 4"),
        lambda key: (200, says("Score: 4")[1].replace("10", json.dumps(key))),
        lambda key: (400, json.dumps({"error": {"message": f"wrong key: {key}"}})),
        lambda key: (422, "x" * 70 + key),  # cut in the middle, were it cut first
        lambda key: (401, json.dumps({"error": {"message": f"wrong key: {key}"}})),
        lambda key: (307, f"http://user:{key}@127.0.0.1:9/v1?api_key={key}"),
    ],
)
def test_a_key_that_the_server_echoes_goes_nowhere(serve, tmp_path, monkeypatch, capfd, echo):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(lambda number, body: echo(KEY))
    try:
        assert verdicts(Judge("m", server.url), HARMFULNESS, exchanges(1), tmp_path).scores == [4]
    except UserError as error:
        print(error)
    seen = "".join(capfd.readouterr()) + "".join(path.read_text() for path in tmp_path.iterdir())
    assert seen and KEY[:12] not in seen


def test_basic_authentication_comes_from_the_environment(serve, tmp_path, monkeypatch):
    encoded = base64.b64encode(b"someone:a password").decode()
    monkeypatch.setenv("OPENAI_API_KEY", f"Basic {encoded}\n")
    server = serve(lambda number, body: says(f"{encoded}, a password\nScore: 2"))
    assert verdicts(Judge("m", server.url), HARMFULNESS, exchanges(1), tmp_path).scores == [2]
    assert server.keys == [f"Basic {encoded}"]
    (kept,) = tmp_path.iterdir()
    assert encoded not in kept.read_text() and "a password" not in kept.read_text()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_prompts_do_not_follow_a_redirect(serve, tmp_path, status):
    other = serve(graded)
    server = serve(lambda number, body: (status, f"{other.url}/chat/completions"))
    with pytest.raises(UserError, match=rf"redirects to {other.url[:-3]} \({status}\); redirects are not followed"):
        verdicts(Judge("m", server.url, JudgeRequests(retries=0)), HARMFULNESS, exchanges(2), tmp_path)
    assert other.bodies == []


def test_a_redirect_to_an_invalid_address_is_one_line(serve, tmp_path):
    server = serve(lambda number, body: (302, "http://[bad"))
    with pytest.raises(UserError, match=r"redirects to an address that is not valid \(302\)"):
        verdicts(Judge("m", server.url, JudgeRequests(retries=0)), HARMFULNESS, exchanges(2), tmp_path)


@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{KEY}@127.0.0.1:8000/v1",
        f"http://user:pa/ss{KEY}@127.0.0.1:8000/v1",
        f"https://{KEY}@judge.example/v1",
        f"https://judge.example/v1?api_key={KEY}",
        f"https://judge.example/v1?version=1&Subscription-Key={KEY}",
        f"https://judge.example/v1#access_token={KEY}",
        f"https://judge.example/{KEY}/v1",  # the key that the variable holds
    ],
)
def test_a_url_with_a_key_is_refused_and_not_repeated(monkeypatch, url):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(UserError, match=r"contains a key or a password.*set \$OPENAI_API_KEY") as raised:
        Judge("m", url)
    assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    "url", ["", "judge", "ftp://judge/v1", "http://", "http://judge:port/v1", "http://[::1/v1", "http://a b/v1",
            "http://judge/v1?version=1", "http://judge/v1\n"]
)  # fmt: skip
def test_what_is_no_url_is_refused(url):
    with pytest.raises(UserError, match="is not a valid judge URL"):
        Judge("m", url)


def test_a_key_in_place_of_its_variables_name_is_not_repeated():
    with pytest.raises(UserError, match="must be the name of an environment variable") as raised:
        JudgeRequests(key_variable=KEY)
    assert KEY not in str(raised.value)


@pytest.mark.parametrize("key", ["two\nlines-of-a-key", "schlüssel-zum-judge"])
def test_a_key_that_no_header_can_hold_is_refused(tmp_path, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match=r"\$OPENAI_API_KEY contains characters") as raised:
        verdicts(Judge("m", "http://127.0.0.1:9/v1"), HARMFULNESS, exchanges(1), tmp_path)
    assert key not in str(raised.value)


def test_what_names_no_grade_counts_as_unreadable_and_is_not_kept(serve, tmp_path):
    texts = ["I would say four.", "Score: 6", None, "Score: 2", "Score: 2\nScore: 3", "Score: " + "9" * 5000]
    server = serve(lambda number, body: says(texts[number]))
    found = verdicts(Judge("m", server.url, JudgeRequests(concurrency=1)), HARMFULNESS, exchanges(6), tmp_path)
    assert found.scores == [None, None, None, 2, None, None]
    assert found.readable == [2] and len(list(tmp_path.iterdir())) == 1
    server.act = lambda number, body: says("Score: 4")
    again = verdicts(Judge("m", server.url), HARMFULNESS, exchanges(6), tmp_path)
    assert again.scores == [4, 4, 4, 2, 4, 4] and again.num_requests == 5


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"verdict": 3}', "\x00"])
def test_a_broken_verdict_on_disk_is_asked_for_again(serve, tmp_path, broken):
    server = serve(graded)
    verdicts(Judge("m", server.url), HARMFULNESS, exchanges(1), tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.write_text(broken)
    assert verdicts(Judge("m", server.url), HARMFULNESS, exchanges(1), tmp_path).scores == [1]
    assert len(server.bodies) == 2


@pytest.mark.parametrize("rubric", [HARMFULNESS, HARMLESSNESS, INSTRUCTION_FOLLOWING])
def test_a_question_holds_the_exchange_and_every_grade(rubric):
    asked = rubric.ask("the {request}", "the {reply}")
    assert "<request>\nthe {request}\n</request>" in asked and "<reply>\nthe {reply}\n</reply>" in asked
    assert all(f"{number}: {grade}" in asked for number, grade in enumerate(rubric.grades, 1))
    assert score_of(asked) is None


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Score: 3", 3), ("score : 3", 3), ("**Score:** 5", 5), ("**Score: 1**.", 1), ("> Score: `2`", 2),
        ("### Final score: 4/5", 4), ("Score: 4 out of 5", 4), ("Harmful.\nScore: 2\n", 2), ("Score: 2\nScore: 2", 2),
        ("Score: 0", None), ("Score: 6", None), ("Score: 55", None), ("Score: -4", None), ("Score: 4.5", None),
        ("Score: 3-4", None), ("Score: 3 or 4", None), ("Score (1-5): 4", None), ("Score: 4/10", None),
        ("The score is 4", None), ("4", None), ("Score:", None), ("underscore: 4", None), ("Score: N", None),
    ],
)  # fmt: skip
def test_reading_a_grade(text, score):
    assert score_of(text) == score


@given(st.text(st.sampled_from("Scorescore:*_ \n0123456789.-/outf5")))
def test_no_text_breaks_the_reading(text):
    assert score_of(text) in (None, 1, 2, 3, 4, 5)


@given(st.text(), st.integers(1, 5))
def test_a_last_line_is_read_after_any_text_that_names_no_score(text, grade):
    said = f"{text.replace(':', '')}\nScore: {grade}"
    assert score_of(said) == grade


@given(st.text(), st.text())
def test_any_exchange_can_be_put_to_the_judge(prompt, reply):
    assert prompt in HARMFULNESS.ask(prompt, reply) and reply in HARMFULNESS.ask(prompt, reply)


def test_settings_check_themselves():
    for wrong in ({"concurrency": 0}, {"timeout": 0}, {"verdict_tokens": -1}, {"retries": -1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            JudgeRequests(**wrong)


# ------------------------------------------------------------------------------------------------ a hostile server

COMPLETION = json.loads(says("Score: 1")[1])
NOT_KEPT = {
    "endless": lambda: endless(),
    "bomb": lambda: bomb(),
    "deep": lambda: (200, "[" * 100_000),
    "deep objects": lambda: (200, '{"a":' * 100_000),
    "huge number": lambda: (200, '{"choices": ' + "9" * 10_000 + "}"),
    "no choices": lambda: (200, json.dumps(COMPLETION | {"choices": []})),
    "null choices": lambda: (200, json.dumps(COMPLETION | {"choices": None})),
    "a list": lambda: (200, "[1]"),
    "not JSON": lambda: (200, "\x1b[2J<html>"),
    "not UTF-8": lambda: [HEADER + b"\r\n\xff\xfe\xff"],
    "score 1e999": lambda: says("Score: 1e999"),
    "score -5": lambda: says("Score: -5"),
    "stars": lambda: says("5/5 stars"),
    "huge score": lambda: says("Score: " + "5" * 5_000),
    "blank lines": lambda: says("\n" * 300_000 + "x"),
    "marks": lambda: says("Score" + "*" * 300_000 + "x"),
}


NO_COMPLETION = (
    "endless", "bomb", "deep", "deep objects", "huge number", "no choices", "null choices", "a list", "not JSON",
    "not UTF-8",
)  # fmt: skip


@pytest.mark.parametrize("kind", NOT_KEPT)
def test_what_is_no_verdict_is_counted_and_not_kept(serve, tmp_path, kind):
    # The time of this process, so that no other program decides.
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    server = serve(lambda number, body: NOT_KEPT[kind]() if number else graded(number, body))
    judge = Judge("m", server.url, JudgeRequests(concurrency=1))
    if kind in NO_COMPLETION:
        with pytest.raises(UserError, match=r"3 of 4 answers of the server at .* were not chat completions"):
            verdicts(judge, HARMFULNESS, exchanges(4), tmp_path)
    else:
        found = verdicts(judge, HARMFULNESS, exchanges(4), tmp_path)
        assert found.scores == [1, None, None, None] and found.num_requests == 4
    assert len(list(tmp_path.iterdir())) == 1
    assert time.process_time() - start < 5, "it took long"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 2**10, "it took much memory"


@pytest.mark.parametrize(
    "usage", [None, [], "x", {"prompt_tokens": None, "completion_tokens": -1}, {"prompt_tokens": 10**30}]
)
def test_a_verdict_is_kept_whatever_its_usage_says(serve, tmp_path, usage):
    server = serve(lambda number, body: (200, json.dumps(COMPLETION | {"usage": usage})))
    found = verdicts(Judge("m", server.url), HARMFULNESS, exchanges(2), tmp_path)
    assert found.scores == [1, 1] and found.tokens == (0, 0)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "before", [b"", b"HTTP/1.1 200 OK\r\nX: ", HEADER + b"\r\n"], ids=["nothing", "header", "body"]
)
def test_an_answer_that_drips_has_a_limit(serve, tmp_path, before):
    server, start = serve(lambda number, body: drips(before, b"x")), time.monotonic()
    with pytest.raises(UserError, match=r"timed out|could not be reached"):
        verdicts(Judge("m", server.url, JudgeRequests(timeout=0.3, retries=0)), HARMFULNESS, exchanges(9), tmp_path)
    assert time.monotonic() - start < 3


def test_an_endless_error_is_an_error(serve, tmp_path):
    server = serve(lambda number, body: endless(b"400 Bad Request"))
    with pytest.raises(UserError, match=r"rejected the request \(400\)"):
        verdicts(Judge("m", server.url), HARMFULNESS, exchanges(1), tmp_path)


@pytest.mark.parametrize("after", [b"1000000000", b"99999999999999999999999999", b"Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_wait_that_a_server_asks_for_is_cut_and_reported(serve, tmp_path, monkeypatch, caplog, after):
    monkeypatch.setattr(judge_client, "_LONGEST_WAIT", 1.0)
    refused = b"HTTP/1.1 429 Wait\r\nContent-Length: 0\r\nRetry-After: " + after + b"\r\n\r\n"
    server = serve(lambda number, body: graded(number, body) if number else [refused])
    assert verdicts(Judge("m", server.url), HARMFULNESS, exchanges(1), tmp_path).scores == [1]
    assert "429; waiting 1 s before attempt 2 of 7" in caplog.text


@pytest.mark.parametrize("after", ["", "-1", "nan", "inf", "soon", "1.2.3", "Fri, 99 Foo 9999"])
def test_a_wait_that_cannot_be_read_is_the_usual_one(after):
    assert judge_client._delay({"retry-after": after}, 1) == 0.5
    assert judge_client._delay({"retry-after-ms": after}, 3) in (2.0, 60.0)


@pytest.mark.parametrize("concurrency", [1, 16])
def test_ctrl_c_ends_the_waiting_and_keeps_the_verdicts(serve, tmp_path, concurrency):
    server = serve(lambda number, body: graded(number, body) if number < 4 else drips())
    asking = JudgeRequests(concurrency=concurrency, timeout=600)
    start = time.monotonic()

    def interrupt_once_it_waits() -> None:
        while time.monotonic() < start + 2 and (len(server.bodies) < 5 or len(list(tmp_path.iterdir())) < 4):
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt_once_it_waits, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        verdicts(Judge("m", server.url, asking), HARMFULNESS, exchanges(40), tmp_path)
    assert time.monotonic() - start < 4
    assert len(list(tmp_path.iterdir())) == 4
    assert not [thread for thread in threading.enumerate() if thread.name == "judge"]
    server.act = graded
    assert verdicts(Judge("m", server.url), HARMFULNESS, exchanges(40), tmp_path).num_requests == 36


def test_a_cache_that_takes_no_verdict_names_the_cure(serve, tmp_path):
    server = serve(lambda number, body: says("Score: 3"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"verdicts are kept in the cache folder: set SECVEC_CACHE to "):
        verdicts(Judge("m", server.url), HARMFULNESS, exchanges(1), tmp_path / "file" / "verdicts")
