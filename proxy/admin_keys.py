"""/admin/keys on the admin listener: what `headrace keys` does, for programs."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from proxy import key_commands
from proxy.config import Config
from proxy.errors import OperationError
from proxy.key_order import parse_order
from proxy.keys import load_pepper
from proxy.keystore import opened
from proxy.keystore.base import KeyStore

_Verb = Callable[[web.Request, KeyStore], Awaitable[Any]]


class AdminKeys:
    """settings: the configuration in use. The store is opened for each request: they are rare, and a server
    in open mode has none of its own."""

    def __init__(self, settings: Callable[[], Config]) -> None:
        self._settings = settings

    def add_routes(self, router: web.UrlDispatcher) -> None:
        router.add_get("/admin/keys", self._with_store(self._list))
        router.add_post("/admin/keys", self._with_store(self._create))
        router.add_get("/admin/keys/{id}", self._with_store(self._show))
        router.add_delete("/admin/keys/{id}", self._with_store(self._revoke))
        router.add_post("/admin/keys/{id}/rotate", self._with_store(self._rotate))

    def _with_store(self, verb: _Verb) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            async with opened(self._settings().auth.database) as store:
                document = await verb(request, store)
            return web.Response(body=msgspec.json.encode(document), content_type="application/json")

        return handle

    async def _list(self, _: web.Request, store: KeyStore) -> object:
        return {"keys": [key_commands.document(record) for record in await store.list_all()]}

    async def _create(self, request: web.Request, store: KeyStore) -> object:
        try:
            order = parse_order(msgspec.json.decode(await request.read()))
        except (ValueError, RecursionError):
            raise OperationError("expected a JSON object") from None
        settings = self._settings()
        return key_commands.document(
            *await key_commands.create(store, self._pepper(), settings.plans, order, time.time())
        )

    async def _show(self, request: web.Request, store: KeyStore) -> object:
        return key_commands.document(await key_commands.show(store, request.match_info["id"]))

    async def _revoke(self, request: web.Request, store: KeyStore) -> object:
        key_id = request.match_info["id"]
        return key_commands.document(await key_commands.revoke(store, key_id, time.time()))

    async def _rotate(self, request: web.Request, store: KeyStore) -> object:
        key_id = request.match_info["id"]
        return key_commands.document(*await key_commands.rotate(store, self._pepper(), key_id, time.time()))

    def _pepper(self) -> bytes:
        auth = self._settings().auth
        return load_pepper(auth.pepper, auth.database)
