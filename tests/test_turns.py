"""A reply ends with the token that the chat template puts after it, or with the end of a text."""

import resource
import signal
import sys
import threading
import time

import numpy as np
import pytest
from tokenizers import AddedToken

from secvec_jax import turns
from secvec_jax.data.chat import encode
from secvec_jax.data.control_tokens import control_tokens
from secvec_jax.errors import UserError
from secvec_jax.limits import LimitExceeded, run_limited, unlimited_address_space
from secvec_jax.turns import check_rendered, render, turn_ends
from tests.toys import build_tokenizer

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}END{% endfor %}"


def tokenizer(template: str | None, eos: str | None = "<|endoftext|>"):
    made = build_tokenizer()
    made.chat_template, made.eos_token = template, eos
    return made


@pytest.mark.parametrize(
    ("template", "eos", "ends"),
    [
        (TURNS.replace("END", "<|im_end|>\n"), "<|im_end|>", ["<|im_end|>"]),  # ChatML, Llama 3
        (TURNS.replace("END", "<|im_end|>\n"), "<|endoftext|>", ["<|im_end|>", "<|endoftext|>"]),  # Gemma
        (TURNS.replace("END", "<|im_end|>\n") + "{{ eos_token }}", "<|endoftext|>", ["<|im_end|>", "<|endoftext|>"]),
        (TURNS.replace("END", " {{ eos_token }}"), "<|endoftext|>", ["<|endoftext|>"]),  # Mistral
        (TURNS.replace("END", "\n\n"), "<|endoftext|>", ["<|endoftext|>"]),
        (None, "<|endoftext|>", ["<|endoftext|>"]),
        (None, None, []),
    ],
    ids=["chatml", "gemma", "phi3", "mistral", "plain text", "no template", "no end"],
)
def test_a_reply_ends_where_its_template_ends_it(template, eos, ends):
    made = tokenizer(template, eos)
    assert [made.decode(token) for token in turn_ends(made)] == ends


def test_the_turn_of_a_changed_template_is_found_anew():
    made = tokenizer(TURNS.replace("END", "<|im_end|>"))
    before = turn_ends(made)
    made.chat_template = TURNS.replace("END", "<|im_start|>")
    assert [made.decode(token) for token in (before[0], turn_ends(made)[0])] == ["<|im_end|>", "<|im_start|>"]


def test_tokens_of_a_changed_tokenizer_are_found_anew():
    made = tokenizer(TURNS.replace("END", "<|im_end|>"))
    before = turn_ends(made), control_tokens(made)
    made.eos_token = "<|endoftext|>"
    made.add_tokens([AddedToken("<|new|>", special=True)])
    assert [made.decode(token) for token in turn_ends(made)] == ["<|im_end|>", "<|endoftext|>"] != list(before[0])
    assert {"<|new|>"} == set(control_tokens(made)) - set(before[1])


def test_the_end_of_the_turn_is_learned_and_the_end_of_the_text_after_it_is_not():
    prompt = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    made = tokenizer(
        TURNS.replace("END", "<|im_end|>\n") + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}" + prompt
    )
    row = encode(made, CHAT, 100)
    learned = made.decode(row.tokens[np.asarray(row.supervised)])
    assert learned == "b<|im_end|>"


# ------------------------------------------------------------------------------------------- templates that misbehave

GROWING = "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}BODY{% endfor %}{% endfor %}"
TREE = "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}"
HOSTILE = {
    "loops": (NESTED.replace("BODY", ""), "takes more than 0.3 seconds"),
    "writes": (NESTED.replace("BODY", "x" * 1_000), "takes more than"),
    "writes 200 MB": ("{{ 'a' * 200000000 }}", "takes more than|writes 200,000,000 characters, and 16,777,216 at most"),
    "one operation": ("{{ 'a' * 99999 * 99999 }}", "takes more than 2,048 MiB of memory at once"),
    "one replacement": (
        "{% set a = 'a' * 99999 %}{{ a.replace('a', a) }}",
        "takes more than 2,048 MiB of memory at once",
    ),
    "one padding": ("{{ 'a'.ljust(9999999999) }}", "takes more than 2,048 MiB of memory at once"),
    "recurses": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "recurses in width": (TREE, "takes more than 0.3 seconds"),
    "doubles": (GROWING, "takes more than"),
    "power": ("{{ 9 ** 9 ** 9 }}", r"computes a power \(\*\*\)"),
    "raises": ("{{ raise_exception('\x1b[31m' ~ 'no\n' * 1000) }}", r"\\x1b\[31mno no"),
    "escapes": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "range": ("{{ range(10**9) }}", "power"),
    "open": ("{% for", "does not take these turns"),
    "deep": ("{{ " + "(" * 3_000 + "1" + ")" * 3_000 + " }}", "recursion"),
    "large": ("a" * 2**21, "has 2,097,152 characters, more than the limit of 1,048,576"),
    "list": ([{"a": 1}], "must be text, found list"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_template_has_limits(monkeypatch, kind):
    monkeypatch.setattr(turns, "_SECONDS", 0.3)
    monkeypatch.setattr(turns, "_MEMORY", 2**28)
    template, message = HOSTILE[kind]
    made, start = tokenizer("x"), time.process_time()
    made.chat_template = template
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=message) as raised:
        render(made, CHAT)
    assert len(str(raised.value)) < 1_000 and "\n" not in str(raised.value)
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**21, "more than 2 GiB"


def test_arguments_may_be_unpacked_and_usual_templates_pass():
    made = tokenizer("{{ dict(**{'a': 1}) | length }}{{ messages[0]['content'] }}{{ 2 * 3 }}")
    assert render(made, CHAT) == "1a6"


def forever():
    while True:
        pass


def address_space():
    return resource.getrlimit(resource.RLIMIT_AS)


def test_limits_leave_the_timer_and_the_address_space_of_others_as_they_were():
    space = address_space()
    rang = []
    handler = signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        run_limited(lambda: None, 5, 2**30)
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
        time.sleep(0.5)
        assert rang == [1]
        assert address_space() == space
    finally:
        signal.signal(signal.SIGALRM, handler)
    with pytest.raises(LimitExceeded):
        run_limited(forever, 0.2, 2**30)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert address_space() == space


def test_a_look_while_the_limits_are_set_and_taken_back_leaves_none_behind(monkeypatch):
    looks = []

    def after_a_look(call):
        def looked(*arguments):
            if callable(signal.getsignal(signal.SIGALRM)):
                looks.append(call)
                signal.raise_signal(signal.SIGALRM)
            return call(*arguments)

        return looked

    space = address_space()
    handler = signal.getsignal(signal.SIGALRM)
    monkeypatch.setattr(resource, "setrlimit", after_a_look(resource.setrlimit))
    monkeypatch.setattr(signal, "setitimer", after_a_look(signal.setitimer))
    monkeypatch.setattr(signal, "signal", after_a_look(signal.signal))
    assert run_limited(lambda: "done", 0.0, 2**30) == "done"
    assert len(looks) == 5
    with pytest.raises(LimitExceeded):
        run_limited(forever, 0.0, 2**30)
    assert address_space() == space
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0) and signal.getsignal(signal.SIGALRM) == handler


def test_the_address_space_is_not_limited_while_a_device_computes():
    space = address_space()
    assert sys.platform != "linux" or run_limited(address_space, 5, 2**30) != space
    with unlimited_address_space():
        assert run_limited(address_space, 5, 2**30) == space
        with pytest.raises(LimitExceeded):
            run_limited(forever, 0.2, 2**30)


def test_limits_do_nothing_in_other_threads():
    done = []
    thread = threading.Thread(target=lambda: done.append(render(tokenizer("{{ messages | length }}"), CHAT)))
    thread.start()
    thread.join()
    assert done == ["2"]


@pytest.mark.parametrize(
    ("skipped", "turns"),
    [
        ("tool", [("user", "What is 2 + 24?"), ("assistant", "I look."), ("tool", "4"), ("user", "So?")]),
        ("system", [("system", "refuse"), ("user", "You must refuse.")]),
        ("system", [("system", "What is it?"), ("user", "What is it?")]),
    ],
)
def test_a_turn_that_is_left_out_is_missed_though_others_have_its_words(skipped, turns):
    messages = [{"role": role, "content": content} for role, content in turns]
    text = "".join(f"<{turn['role']}>{turn['content']}\n" for turn in messages if turn["role"] != skipped)
    with pytest.raises(UserError, match=f"leaves out what the {skipped} turn says"):
        check_rendered(text, messages)
    check_rendered("".join(f"<{turn['role']}>{turn['content']}\n" for turn in messages), messages)
