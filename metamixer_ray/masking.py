"""Secrets in texts that are shown or kept: passwords of URIs, keys in queries and options become ``***``."""

import re

MASK = "***"

# What follows a colon that isn't the number of a port.
_NO_PORT = r":(?!\d+(?:[/?#\s]|$))"
# After the scheme: user and password. A password may hold anything, blanks and @ too, and a user an @, as in
# postgresql://admin@server:password@server.example/db.
_PASSWORDS = (
    re.compile(r"(?<=://)[^\s:/@]*:\S*@"),
    re.compile(rf"(?<=://)[^\s:/]*{_NO_PORT}\S*@"),
    re.compile(rf"(?<=://)[^\s:/@]*{_NO_PORT}(?=\S)[^\n@'\"]*@"),
    # Of a database nothing but where it is.
    re.compile(r"((?:postgres|mysql|mariadb|mssql|oracle|sqlserver)[a-z\d_+]*://)\S*@", re.IGNORECASE),
)
# A token stands there alone. Elsewhere than on the web a name alone is no secret: abfs://container@account.
_TOKEN = re.compile(r"(https?://)[^\s/?#@]+@")
_QUERY_SECRET = re.compile(
    r"([?&;][^=&\s]*(?:token|pass|pwd|secret|signature|sig|key|credential|auth(?!or)|odbc_connect)[^=&\s]*=)[^&\s]+",
    re.IGNORECASE,
)
_OPTION_SECRET = re.compile(r"((?:^|\s)--?[\w-]*(?:token|password|passwd|secret|api-key)[\w-]*[=\s])\S+", re.IGNORECASE)


def masked(text: str) -> str:
    """``text`` with users and passwords of URIs, and secrets in queries and options, replaced by ``***``."""
    for password in _PASSWORDS:
        text = password.sub(lambda found: "".join(found.groups()) + f"{MASK}@", text)
    text = _TOKEN.sub(rf"\1{MASK}@", text)
    text = _QUERY_SECRET.sub(rf"\1{MASK}", text)
    return _OPTION_SECRET.sub(rf"\1{MASK}", text)


def is_masked(text: str) -> bool:
    """Whether something of a URI was masked, so that it leads nowhere any more."""
    return f"://{MASK}@" in text or f"={MASK}" in text
