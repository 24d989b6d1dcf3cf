"""Somebody who does nothing wrong: `python -m tests.hostile.good_caller PORT` asks one request after the
other until its standard input ends, and prints how many milliseconds each took, in order of size.

A process of its own, so that it waits for Headrace and not for the attackers in the test's process.
"""

from __future__ import annotations

import http.client
import selectors
import sys
from time import monotonic

_PAUSE_S = 0.005
_LEAST = 300
_BODY = b'{"model":"m","messages":[{"role":"user","content":"hi"}]}'


def ask(port: int) -> float:
    """On a connection of its own: it has to be accepted as well."""
    began_at = monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", "/v1/chat/completions", _BODY, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert (answer.status, b'"choices"' in answer.read()) == (200, True)
    connection.close()
    return (monotonic() - began_at) * 1000


def main(port: int) -> None:
    took: list[float] = []
    with selectors.DefaultSelector() as end:
        end.register(sys.stdin, selectors.EVENT_READ)
        while not end.select(_PAUSE_S) or len(took) < _LEAST:
            took.append(ask(port))
    print(*(f"{each:.3f}" for each in sorted(took)))


if __name__ == "__main__":
    main(int(sys.argv[1]))
