"""Remove keys and passwords from messages, files and reports."""

import base64
import json
import re
from urllib.parse import quote, quote_plus

MASK = "***"

_USER_INFO = re.compile(r"(?<=://)[^\s\"'<>]*@")
_KEY_PARAMETER = re.compile(
    r"(?<=[?&;#])((?:[\w.-]*(?:key|token|secret|passw|pwd|auth|credential|signature)[\w.-]*|sig|code)=)[^&;#\s\"'<>]+",
    re.IGNORECASE,
)
_SHORTEST = 6
"""Minimum length of a secret that is masked. Shorter ones, such as "none" for a server without keys, occur in ordinary
words."""


def redact(text: str, *secrets: str) -> str:
    """Return the text with credentials in URLs (`user:password@`, `?api_key=`) and the given secrets masked.

    Secrets are also masked in the forms in which JSON, URLs and HTTP basic authentication encode them.
    """
    for secret in secrets:
        if len(secret) >= _SHORTEST:
            spellings = {
                secret,
                json.dumps(secret)[1:-1],
                repr(secret)[1:-1],
                quote(secret),
                quote(secret, safe=""),
                quote_plus(secret),
                base64.b64encode(secret.encode()).decode(),
            }
            for spelling in sorted(spellings, key=len, reverse=True):
                text = text.replace(spelling, MASK)
    return _KEY_PARAMETER.sub(rf"\1{MASK}", _USER_INFO.sub(f"{MASK}@", text))
