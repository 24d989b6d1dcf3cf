"""`headrace keys …`: flags in, text or JSON out; the work is `key_commands`."""

from __future__ import annotations

import argparse
import time
from typing import Any

import msgspec
import uvloop

from proxy import key_commands
from proxy.cli_source import Source, config_flag
from proxy.config import Config
from proxy.identity import KeyRecord
from proxy.key_order import DEFAULT_PLAN, KeyOrder
from proxy.keys import load_pepper
from proxy.keystore import opened
from proxy.keystore.base import KeyStore


def keys_parser(parser: argparse.ArgumentParser, source: Source) -> None:
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    create = _verb(verbs, source, "create", "make a key; its secret is shown this once")
    create.add_argument("--name", required=True, help="whose it is, for people")
    create.add_argument("--plan", default=DEFAULT_PLAN)
    create.add_argument("--models", metavar="A,B", help="the models it may use; left out: all")
    create.add_argument("--expires", metavar="30d", help="a duration or a date")
    create.add_argument("--ip", metavar="CIDR", action="append", help="where it may be used from; repeatable")
    create.add_argument("--budget-day", metavar="USD")
    create.add_argument("--budget-month", metavar="USD")
    _verb(verbs, source, "list", "all keys")
    for name, text in (
        ("show", "one key"),
        ("revoke", "end a key, everywhere within a second"),
        ("rotate", "give a key another secret; the old one ends"),
    ):
        _verb(verbs, source, name, text).add_argument("id", metavar="ID")


def _verb(verbs: Any, source: Source, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, parents=[config_flag()], help=text)
    parser.add_argument("--json", action="store_true", help="a JSON document instead of text")
    parser.set_defaults(run=lambda arguments: _keys(name, arguments, source.settings(arguments)))
    return parser


def _keys(verb: str, arguments: argparse.Namespace, settings: Config) -> int:
    print(uvloop.run(_run(verb, arguments, settings)))
    return 0


async def _run(verb: str, arguments: argparse.Namespace, settings: Config) -> str:
    now = time.time()
    async with opened(settings.auth.database) as store:
        if verb == "list":
            records = await store.list_all()
            if arguments.json:
                return _json([key_commands.document(record) for record in records])
            return key_commands.table(records, now)
        record, secret = await _one(verb, arguments, settings, store)
    return (
        _json(key_commands.document(record, secret))
        if arguments.json
        else key_commands.describe(record, secret)
    )


async def _one(
    verb: str, arguments: argparse.Namespace, settings: Config, store: KeyStore
) -> tuple[KeyRecord, str | None]:
    """The record, and the secret where one was made."""
    now = time.time()
    if verb == "show":
        return await key_commands.show(store, arguments.id), None
    if verb == "revoke":
        return await key_commands.revoke(store, arguments.id, now), None
    pepper = load_pepper(settings.auth.pepper, settings.auth.database)
    if verb == "rotate":
        return await key_commands.rotate(store, pepper, arguments.id, now)
    fields = KeyOrder.__struct_fields__
    order = KeyOrder(**{name: getattr(arguments, name) for name in fields})
    return await key_commands.create(store, pepper, settings.plans, order, now)


def _json(document: object) -> str:
    return msgspec.json.format(msgspec.json.encode(document), indent=2).decode()
