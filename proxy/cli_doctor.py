"""`headrace doctor`: a URL in, findings out; the work is `doctor`."""

from __future__ import annotations

import argparse
from urllib.parse import urlsplit

import uvloop

from proxy import doctor
from proxy.cli_source import Source
from proxy.errors import OperationError


def doctor_parser(parser: argparse.ArgumentParser, _: Source) -> None:
    parser.description = "Asks a public address as a caller does; exit code 1 if there is a problem."
    parser.set_defaults(run=_doctor)
    parser.add_argument("url", metavar="URL", help="e.g. https://llm.example.com")
    parser.add_argument("--key", metavar="KEY", help="also one short chat stream, which costs a few tokens")
    parser.add_argument("--model", metavar="NAME", help="of that chat; left out: the key's first")
    parser.add_argument(
        "--patience",
        type=float,
        default=doctor.Options().patience_s,
        metavar="SECONDS",
        help="how long a stream is kept silent, at most 300; 0: not at all; default 65, for nginx cuts at 60",
    )
    parser.add_argument("--json", action="store_true", help="a JSON document instead of text")


def _doctor(arguments: argparse.Namespace) -> int:
    """Needs no configuration: it may run anywhere."""
    url = arguments.url if "://" in arguments.url else f"https://{arguments.url}"
    if not url.startswith(("http://", "https://")) or not urlsplit(url).hostname:
        raise OperationError(f"expected a URL such as https://llm.example.com, got {arguments.url!r}")
    options = doctor.Options(arguments.patience, arguments.key, arguments.model)
    report = uvloop.run(doctor.examine(url, options))
    print(report.json() if arguments.json else report.text())
    return 0 if report.healthy else 1
