"""What Headrace has to know of a multipart form: its field `model`, and where that stands.

The form itself is forwarded as it came. It is looked through piece by piece: what is kept between two pieces
is less than one header block. Framing is RFC 2046 5.1.1, fields are RFC 7578.

Servers do not agree on what a careless form says (bare line feeds, a delimiter in the middle of a line, two
`name`s, two `model`s), so a form that could be read in two ways would let a caller be authorised for one
model and served another. Whatever no well-behaved client writes is refused, not interpreted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import unquote

import msgspec

from proxy.errors import BadRequest

#: How much of a form is looked at for its model (contract section 6).
WINDOW_BYTES = 65536
_MAX_MODEL_CHARS = 128
_MAX_MODEL_BYTES = 4 * _MAX_MODEL_CHARS  # of UTF-8
_MAX_HEADERS_BYTES = 8192
_MAX_PADDING_BYTES = 64
#: More parts than that are work for nothing (Starlette's bound).
_MAX_PARTS = 1000

# RFC 2046 5.1.1: 1 to 70 bchars, no space at the end. Unquoted they are also `token` (RFC 9110 5.6.2).
_PARAMETER = re.compile(
    r"[ \t]*;[ \t]*([A-Za-z0-9!#$%&'*+.^_`|~-]+)=(?:([A-Za-z0-9!#$%&'*+.^_`|~-]+)|\"((?:[^\"\\\r\n]|\\.)*)\")"
)
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")
_TOKEN = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_PLAIN_TEXT = re.compile(r"text/plain(?:[ \t]*;[ \t]*charset=\"?(?:utf-8|us-ascii)\"?)?", re.IGNORECASE)
_BREAK = re.compile(rb"[\r\n\0]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def is_form(content_type: str) -> bool:
    """Is this the media type multipart/form-data, with whatever parameters?"""
    return content_type.partition(";")[0].strip().lower() == "multipart/form-data"


def boundary_of(content_type: str) -> bytes:
    """The boundary that a Content-Type names. Raises BadRequest."""
    parameters = _parameters(content_type[len(content_type.partition(";")[0]) :])
    boundary = None if parameters is None else parameters.get("boundary")
    if boundary is None or not _BOUNDARY.fullmatch(boundary):
        raise BadRequest("bad_request", "The form's boundary is missing or not valid.")
    return boundary.encode()


def _parameters(text: str) -> dict[str, str] | None:
    """`; name=value; …` by name in lower case, quoted pairs as they stand; None if it is anything else, or
    names one twice."""
    found: dict[str, str] = {}
    at = 0
    while match := _PARAMETER.match(text, at):
        name, plain, quoted = match.groups()
        if name.lower() in found:
            return None
        found[name.lower()] = quoted if plain is None else plain
        at = match.end()
    return found if not text[at:].strip(" \t;") else None


class Field(msgspec.Struct, frozen=True):
    """A value and where it stands: `start` to `end`, in bytes from the form's beginning."""

    value: str
    start: int
    end: int


class FormScan:
    """Looks through a form for its model. Raises BadRequest: `duplicate_key`, or a form that is none."""

    __slots__ = ("_begins", "_delimiter", "_here", "_kept", "_parts", "_reads_model", "_step", "model")

    def __init__(self, boundary: bytes) -> None:
        self._delimiter = b"--" + boundary
        self._kept = b""
        self._begins = 0  # where `_kept` begins in the form
        self._here = 0  # what is before this in `_kept` is done with
        self._parts = 0
        self._reads_model = False
        self._step: Callable[[], bool] = self._first_delimiter
        self.model: Field | None = None

    def feed(self, data: bytes) -> None:
        """The next bytes, in pieces of any size."""
        self._kept += data
        while self._step():
            pass
        self._kept = self._kept[self._here :]
        self._begins += self._here
        self._here = 0

    # Each step looks at `_kept` from `_here` on; False: it needs more bytes.

    def _first_delimiter(self) -> bool:
        """RFC 2046 allows text before it: no client writes any, and servers differ on what it is."""
        if self._kept.startswith(self._delimiter):
            return self._go(len(self._delimiter), self._rest_of_line)
        if not self._delimiter.startswith(self._kept):
            raise _malformed()
        return False

    def _rest_of_line(self) -> bool:
        """Behind a delimiter: `--` after the last one, else blanks and a line break."""
        near = self._kept[self._here : self._here + _MAX_PADDING_BYTES]
        if near.startswith(b"--"):
            return self._go(self._here + 2, self._epilogue)
        blanks = len(near) - len(near.lstrip(b" \t"))
        if near.startswith(b"\r\n", blanks):
            return self._go(self._here + blanks + 2, self._headers)
        if len(near) == _MAX_PADDING_BYTES or near[blanks:] not in (b"", b"\r", b"-"):
            raise _malformed()
        return False

    def _headers(self) -> bool:
        near = self._kept[self._here : self._here + _MAX_HEADERS_BYTES]
        block, end, _ = near.partition(b"\r\n\r\n")
        if self._delimiter in block or block.startswith(b"\r\n"):
            raise _malformed()  # a part without an end to its headers, or without any
        if not end:
            if len(near) == _MAX_HEADERS_BYTES:
                raise _malformed()
            return False
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise _malformed()
        self._reads_model = _names_the_model(block)
        if self._reads_model and self.model is not None:
            raise BadRequest("duplicate_key", "The field 'model' is given more than once.", param="model")
        return self._go(self._here + len(block) + len(end), self._body)

    def _body(self) -> bool:
        """Up to the next delimiter, which stands at the beginning of a line and nowhere else."""
        found = self._kept.find(self._delimiter, self._here)
        size = len(self._kept) - self._here if found < 0 else found - self._here
        if self._reads_model and size > _MAX_MODEL_BYTES + len(self._delimiter) + 2:
            raise _not_a_model()
        if found < 0:
            if not self._reads_model:
                # The beginning of a delimiter may be here already, and the line break before it.
                self._here = max(self._here, len(self._kept) - len(self._delimiter) - 1)
            return False
        if size < 2 or not self._kept.startswith(b"\r\n", found - 2):
            raise _malformed()
        if self._reads_model:
            self.model = self._model(found - 2)
        return self._go(found + len(self._delimiter), self._rest_of_line)

    def _model(self, end: int) -> Field:
        raw = self._kept[self._here : end]
        start = self._begins + self._here
        try:
            value = raw.decode()
        except UnicodeDecodeError:
            raise _not_a_model() from None
        if len(value) > _MAX_MODEL_CHARS or _CONTROL.search(value):
            raise _not_a_model()
        return Field(value, start, start + len(raw))

    def _epilogue(self) -> bool:
        if self._kept.find(self._delimiter, self._here) >= 0:
            raise _malformed()
        self._here = max(self._here, len(self._kept) - len(self._delimiter) + 1)
        return False

    def _go(self, here: int, step: Callable[[], bool]) -> bool:
        self._here = here
        self._step = step
        return True


def _names_the_model(block: bytes) -> bool:
    """Is this header block that of the field `model`? Raises BadRequest if servers might differ on it."""
    fields: dict[bytes, str] = {}
    for line in block.split(b"\r\n"):
        name, colon, value = line.partition(b":")
        # A folded line begins with a blank; bare CR and LF are line breaks to some.
        if not colon or not _TOKEN.fullmatch(name) or name.lower() in fields or _BREAK.search(value):
            raise _malformed()
        fields[name.lower()] = value.decode("utf-8", "surrogateescape").strip(" \t")
    kind, _, rest = fields.get(b"content-disposition", "").partition(";")
    parameters = _parameters(f";{rest}" if rest else "")
    if parameters is None or kind.strip().lower() != "form-data" or "name*" in parameters:
        raise _malformed()
    field = parameters.get("name", "")
    # `mod\el` and `%6dodel` are a model to some; no client writes them.
    if unquote(field.replace("\\", "")).strip().lower() != "model":
        return False
    if field != "model" or parameters.keys() & {"filename", "filename*"} or not _is_plain_text(fields):
        raise _not_a_model()
    return True


def _is_plain_text(fields: dict[bytes, str]) -> bool:
    coding = fields.get(b"content-transfer-encoding", "binary").lower()
    if coding not in ("7bit", "8bit", "binary"):
        return False
    return _PLAIN_TEXT.fullmatch(fields.get(b"content-type", "text/plain")) is not None


def _malformed() -> BadRequest:
    return BadRequest("bad_request", "The form is not well-formed multipart/form-data.")


def _not_a_model() -> BadRequest:
    return BadRequest("bad_request", "The field 'model' has a wrong type or value.", param="model")


def with_model(window: bytes, model: Field, name: str) -> bytes:
    """The beginning of a form with another model name; all other bytes are its own."""
    return window[: model.start] + name.encode() + window[model.end :]
