"""Keys and passwords are taken out of text, and nothing else is."""

import base64
import json
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secvec_jax.redaction import redact

few = settings(max_examples=50)
keys = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=6, max_size=20)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("http://user:pass@host/v1", "http://***@host/v1"),
        ("see https://token@host:8000/v1, twice", "see https://***@host:8000/v1, twice"),
        ("http://user:p@ss/word@host/v1", "http://***@host/v1"),
        ("http://host/v1?api_key=abc&x=1", "http://host/v1?api_key=***&x=1"),
        ("http://host/v1?x=1&access_token=abc", "http://host/v1?x=1&access_token=***"),
        ("http://host/v1?sig=abc", "http://host/v1?sig=***"),
    ],
)
def test_credentials_in_urls(text, kept):
    assert redact(text) == kept


@pytest.mark.parametrize(
    "text",
    ["http://127.0.0.1:8000/v1", "owner/name@main", "mail me@host", "a key=value", "runs/x?y=1", "train[:500]", ""],
)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text
    assert redact(text, "none", "") == text


@few
@given(keys, st.text(max_size=10), st.text(max_size=10))
def test_a_known_secret_in_any_spelling(key, before, after):
    basic = base64.b64encode(key.encode()).decode()
    for spelled in (key, json.dumps(key)[1:-1], repr(key)[1:-1], quote(key), quote(key, safe=""), basic):
        assert spelled not in redact(f"{before} {spelled} {after}", key).replace("***", "")
