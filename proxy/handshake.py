"""What the opening of a WebSocket says: subprotocols, a credential among them, the model in the query.

A page cannot set header fields on a WebSocket, so OpenAI's browser SDKs send their key as a subprotocol,
`openai-insecure-api-key.<key>`, next to `realtime` (openai-node, `realtime/websocket.ts`). Whatever is
selected is echoed in the answer's head, so these never leave this process: not upstream, not back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import quote, unquote_plus

from proxy.errors import BadRequest

_CREDENTIAL = "openai-insecure-api-key."
#: Whose account is billed is the operator's choice: as with the header fields of these names.
_KEPT_HERE = (_CREDENTIAL, "openai-organization.", "openai-project.")
_LONGEST_MODEL = 256


def subprotocols(lines: Sequence[str]) -> list[str]:
    """What the values of Sec-WebSocket-Protocol offer, in order (RFC 6455 section 11.3.4)."""
    return [name for line in lines for part in line.split(",") if (name := part.strip())]


def credentials(lines: Sequence[str]) -> list[str]:
    """The credentials among the subprotocols."""
    return [name[len(_CREDENTIAL) :] for name in subprotocols(lines) if name.lower().startswith(_CREDENTIAL)]


def passed_on(lines: Sequence[str]) -> list[str]:
    """The subprotocols that an upstream may learn of and select."""
    return [name for name in subprotocols(lines) if not name.lower().startswith(_KEPT_HERE)]


# ── the query ───────────────────────────────────────────────────────────────────────────────────────────


def asked_model(raw_path: str) -> str | None:
    """The model that a path's query names, None if it names none.

    Servers do not agree on which of two equal parameters counts, on `;` as a separator, nor on the case of
    names (ASP.NET ignores it), and Azure takes `deployment` for the model: a caller must not be authorised
    for one and served another.

    Raises:
        BadRequest: the model could be read in two ways.
    """
    _, _, query = raw_path.partition("?")
    names = [_name(pair) for pair in re.split("[&;]", query)]
    if "deployment" in names:
        raise BadRequest(
            "bad_request", "The parameter 'deployment' is not passed on: name a model.", param="deployment"
        )
    pairs = [pair for pair in query.split("&") if _name(pair) == "model"]
    if len(pairs) != names.count("model") or len(pairs) > 1:
        raise BadRequest("duplicate_key", "The parameter 'model' is given more than once.", param="model")
    value = unquote_plus(pairs[0].partition("=")[2]) if pairs else ""
    if len(value) > _LONGEST_MODEL:
        raise BadRequest("bad_request", "The parameter 'model' is too long.", param="model")
    return value or None


def names_its_session(raw_path: str) -> bool:
    """Does the query name, instead of a model, something that has one at the provider: a transcription
    session (its model comes in a message) or a call that already runs?"""
    pairs = [pair.partition("=") for pair in raw_path.partition("?")[2].split("&")]
    return any((name, value) == ("intent", "transcription") or name == "call_id" for name, _, value in pairs)


def with_model(raw_path: str, model: str) -> str:
    """The path with another model in its query; all other parameters stay as they are, byte by byte."""
    path, _, query = raw_path.partition("?")
    replaced = f"model={quote(model, safe='')}"
    return f"{path}?{'&'.join(replaced if _name(pair) == 'model' else pair for pair in query.split('&'))}"


def _name(pair: str) -> str:
    return unquote_plus(pair.partition("=")[0]).strip().lower()
