"""Secrets in texts that are shown or kept: passwords of URIs, keys in queries and options become ``***``."""

import re

MASK = "***"

# Repetitions are bounded, or a long text of the wrong kind would take minutes.
# What follows a colon that isn't the number of a port.
_NO_PORT = r":(?!\d+(?:[/?#\s:,;.)'\"\]]|$))"
# After the scheme: user and password. A password may hold anything, blanks and @ too, and a user an @, as in
# postgresql://admin@server:password@server.example/db. In prose more may be masked than was secret.
_PASSWORDS = (
    re.compile(rf"(?<=://)[^\s:/]{{0,200}}{_NO_PORT}(?=\S)[^\n]{{0,2000}}@"),
    re.compile(r"(?<=://)[^\s:/@]{0,200}:\S{0,2000}@"),
    # Of a database nothing but where it is.
    re.compile(r"((?:postgres|mysql|mariadb|mssql|oracle|sqlserver)[a-z\d_+]{0,50}://)[^\n]{0,2000}@", re.IGNORECASE),
)
# A token stands there alone. Elsewhere than on the web a name alone is no secret: abfs://container@account.
_TOKEN = re.compile(r"(https?://)[^\s/?#@]{1,2000}@")
_QUERY_SECRET = re.compile(
    r"([?&;][^=&\s]{0,50}(?:token|pass|pwd|secret|signature|sig|key|credential|auth(?!or)|odbc_connect)[^=&\s]{0,50}=)"
    r"[^&\s]{1,4000}",
    re.IGNORECASE,
)
_OPTION_SECRET = re.compile(
    r"((?:^|\s)--?[\w-]{0,50}(?:token|password|passwd|secret|api-key)[\w-]{0,50}[=\s])\S+", re.IGNORECASE
)


def masked(text: str) -> str:
    """``text`` with users and passwords of URIs, and secrets in queries and options, replaced by ``***``."""
    for password in _PASSWORDS:
        text = password.sub(lambda found: "".join(found.groups()) + f"{MASK}@", text)
    text = _TOKEN.sub(rf"\1{MASK}@", text)
    text = _QUERY_SECRET.sub(rf"\1{MASK}", text)
    return _OPTION_SECRET.sub(rf"\1{MASK}", text)


def masked_uri(uri: str) -> str:
    """The same of what is one URI, or a path: there is no prose around it in which to look for its end."""
    scheme, mark, rest = uri.partition("://")
    user, at, place = rest.rpartition("@")
    if mark and at and ":" in user:
        return masked(f"{scheme}://{MASK}@{place}")
    return masked(uri)


def is_masked(text: str) -> bool:
    """Whether something of a URI was masked, so that it leads nowhere any more."""
    return f"://{MASK}@" in text or f"={MASK}" in text
