"""Who may ask the admin listener: the token, and what a browser may do there.

A browser asks on behalf of whatever page it shows, and from where the operator sits. So a page of another
origin gets nothing here but an answer to a link:

- `Sec-Fetch-Site` and `Origin` say where a request comes from (Fetch Metadata, W3C; RFC 6454 7). Every
  browser sends `Origin` with what changes something (Firefox since 70, the others before), so that no form
  and no script of elsewhere stops a stream. Programs send neither.
- Where no token is asked for, `Host` has to be an address or a name that no public DNS has: a page whose own
  name suddenly means 127.0.0.1 (DNS rebinding) is of the same origin as far as its browser can tell.
"""

from __future__ import annotations

import binascii
import hmac
from base64 import b64decode
from collections.abc import Mapping
from ipaddress import ip_address
from urllib.parse import urlsplit


def token_offered(fields: Mapping[str, str], token: str) -> bool:
    """Whether `Authorization` is the token: as Bearer, or as the password of Basic, whatever the user, which
    is how a browser asks its user for it (RFC 7617). Compared in constant time."""
    scheme, _, value = fields.get("Authorization", "").partition(" ")
    if scheme == "Basic":
        try:
            _, colon, value = (
                b64decode(value, validate=True).decode("utf-8", "surrogateescape").partition(":")
            )
        except (binascii.Error, ValueError):
            return False
        if not colon:
            return False
    elif scheme != "Bearer":
        return False
    return hmac.compare_digest(value.encode("utf-8", "surrogateescape"), token.encode())


def challenge(fields: Mapping[str, str]) -> str:
    """`WWW-Authenticate`: only who opens a page is asked for a password; a program would misunderstand it."""
    opens_a_page = "text/html" in fields.get("Accept", "")
    return 'Bearer, Basic realm="headrace admin", charset="UTF-8"' if opens_a_page else "Bearer"


def from_elsewhere(method: str, fields: Mapping[str, str]) -> bool:
    """Whether a page of another origin asks. Following a link to here is no asking: that page sees nothing of
    the answer."""
    origin = fields.get("Origin")
    # Schemes are not compared: whoever ends TLS in front of this listener does not tell.
    if origin is not None and origin.partition("://")[2] != fields.get("Host", ""):
        return True
    if fields.get("Sec-Fetch-Site", "none") in ("same-origin", "none"):
        return False
    opened = fields.get("Sec-Fetch-Mode") == "navigate" and fields.get("Sec-Fetch-Dest") == "document"
    return not (method == "GET" and opened)


def host_is_local(host: str) -> bool:
    """`Host` names an address, this machine, or a name without a dot: none that a stranger can own."""
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        if "." not in name or name.endswith(".localhost"):
            return True
        ip_address(name)
    except ValueError:
        return False
    return True
