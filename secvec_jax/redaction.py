"""Keys and passwords kept out of messages, files and reports."""

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
"""Characters of a secret that is looked for in text. A shorter one, such as the "none" of a server without keys, is
part of too many words."""


def redact(text: str, *secrets: str) -> str:
    """The text without credentials in URLs (`user:password@`, `?api_key=`), and without the given secrets.

    A secret is also removed as JSON, a URL and HTTP's basic authentication spell it.
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
