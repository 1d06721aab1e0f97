"""Secrets in texts that are shown or kept: passwords of URIs, keys in queries and options become ``***``."""

import re

MASK = "***"

# After the scheme: user and password; a password may hold anything but blanks.
_PASSWORD = re.compile(r"(?<=://)[^\s:/@]*:\S*@")
# A token stands there alone. Elsewhere than on the web a name alone is no secret: abfs://container@account.
_TOKEN = re.compile(r"(https?://)[^\s/?#@]+@")
_QUERY_SECRET = re.compile(
    r"([?&;][^=&\s]*(?:token|password|passwd|pwd|secret|signature|sig|key|credential)[^=&\s]*=)[^&\s]+",
    re.IGNORECASE,
)
_OPTION_SECRET = re.compile(r"((?:^|\s)--?[\w-]*(?:token|password|passwd|secret|api-key)[\w-]*[=\s])\S+", re.IGNORECASE)


def masked(text: str) -> str:
    """``text`` with users and passwords of URIs, and secrets in queries and options, replaced by ``***``."""
    text = _PASSWORD.sub(f"{MASK}@", text)
    text = _TOKEN.sub(rf"\1{MASK}@", text)
    text = _QUERY_SECRET.sub(rf"\1{MASK}", text)
    return _OPTION_SECRET.sub(rf"\1{MASK}", text)


def is_masked(text: str) -> bool:
    """Whether something of a URI was masked, so that it leads nowhere any more."""
    return f"://{MASK}@" in text or f"={MASK}" in text
