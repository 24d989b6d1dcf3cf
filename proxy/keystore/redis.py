"""The key store of many machines: Redis.

Four keys, all of one hash slot, so that it works on a cluster too: `meta` (version, epoch), `revision` (a
counter), `records` (id -> JSON), `revisions` (ids by the revision of their last write). Writes compare and
set in one Lua script, and so is a look at the changes one script: nobody sees half of a write.

A Redis that holds keys has to keep them: appendonly yes. One that has lost them has no epoch, and counts as
failed, not as empty.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import msgspec

from proxy.errors import StartError
from proxy.identity import KeyRecord
from proxy.keystore.base import (
    Changes,
    Cursor,
    IdTaken,
    KeyStoreFailed,
    NewSecret,
    decode,
    encode,
    in_order,
    revoked,
    rotated,
)

if TYPE_CHECKING:
    from redis.asyncio import Redis

#: Of the records and keys below.
_VERSION = 1
#: Seconds for a connection, and for each answer: a cache that is 2 s behind had better say so.
_TIMEOUT_S = 2.0
_PREFIX = "headrace:{keys}:"
_META, _REVISION, _RECORDS, _REVISIONS = (
    _PREFIX + name for name in ("meta", "revision", "records", "revisions")
)
_ABSENT = b""

#: KEYS all four; ARGV id, the record that is expected (empty: none), the new one, an epoch in case there is
#: none, the version. -1: it was another record.
_WRITE = """
local old = redis.call('HGET', KEYS[3], ARGV[1])
if (old or '') ~= ARGV[2] then return -1 end
redis.call('HSETNX', KEYS[1], 'epoch', ARGV[4])
redis.call('HSETNX', KEYS[1], 'version', ARGV[5])
local revision = redis.call('INCR', KEYS[2])
redis.call('HSET', KEYS[3], ARGV[1], ARGV[3])
redis.call('ZADD', KEYS[4], revision, ARGV[1])
return revision
"""

#: KEYS all four; ARGV the cursor's epoch and revision. Epoch, revision, 1 for a whole reading, the records.
_CHANGES = """
local epoch = redis.call('HGET', KEYS[1], 'epoch')
if not epoch then return {} end
local revision = tonumber(redis.call('GET', KEYS[2]) or '0')
local since = tonumber(ARGV[2])
local whole = 0
if epoch ~= ARGV[1] or since > revision then
  since = 0
  whole = 1
end
local answer = {epoch, revision, whole}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[4], '(' .. since, '+inf')) do
  local record = redis.call('HGET', KEYS[3], id)
  if record then answer[#answer + 1] = record end
end
return answer
"""


class RedisKeys:
    """A KeyStore in Redis, over `redis://` or `rediss://`."""

    def __init__(self, url: str) -> None:
        """Raises StartError: the client is not installed, or the URL is none."""
        try:
            from redis.asyncio import Redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError:
            raise StartError("auth.database: Redis needs its client: pip install 'headrace[redis]'") from None
        parts = urlsplit(url)
        #: Without user and password.
        self._shown = f"{parts.scheme}://{parts.hostname}:{parts.port or 6379}"
        try:
            # No retries inside the client: the next look at the changes is one.
            self._client: Redis = Redis.from_url(
                url,
                socket_connect_timeout=_TIMEOUT_S,
                socket_timeout=_TIMEOUT_S,
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise StartError(f"auth.database: {self._shown}: {error}") from None
        self._keys = [_META, _REVISION, _RECORDS, _REVISIONS]
        self._write = self._client.register_script(_WRITE)
        self._changes = self._client.register_script(_CHANGES)

    async def prepare(self) -> None:
        try:
            with self._failing():
                await _answer(self._client.hsetnx(_META, "epoch", secrets.token_hex(8)))
                await _answer(self._client.hsetnx(_META, "version", str(_VERSION)))
                version = int(await _answer(self._client.hget(_META, "version")))
        except KeyStoreFailed as failure:
            raise StartError(f"{failure}: start it, or name another store") from failure
        if version > _VERSION:
            raise StartError(
                f"auth.database: {self._shown} was made by a newer Headrace (keys of version {version}, "
                f"this one knows {_VERSION}): upgrade, or name another store"
            )

    async def create(self, record: KeyRecord) -> None:
        with self._failing():
            if not await self._swap(record.id, _ABSENT, record):
                raise IdTaken(record.id)

    async def list_all(self) -> list[KeyRecord]:
        with self._failing():
            return in_order([decode(raw) for raw in await _answer(self._client.hvals(_RECORDS))])

    async def get(self, key_id: str) -> KeyRecord | None:
        with self._failing():
            raw = await self._raw(key_id)
            return None if raw is None else decode(raw)

    async def revoke(self, key_id: str, now: float) -> KeyRecord | None:
        return await self._change(key_id, lambda record: revoked(record, now))

    async def rotate(self, key_id: str, secret: NewSecret) -> KeyRecord | None:
        return await self._change(key_id, lambda record: rotated(record, secret))

    async def changes(self, since: Cursor) -> Changes:
        with self._failing():
            answer = await self._changes(keys=self._keys, args=[since.epoch, since.revision])
            if not answer:
                raise KeyStoreFailed(f"auth.database: {self._shown} has lost its keys")
            epoch, revision, whole, *records = answer
            cursor = Cursor(epoch.decode(), int(revision))
            return Changes([decode(raw) for raw in records], cursor, bool(whole))

    async def close(self) -> None:
        await self._client.aclose()

    async def _change(self, key_id: str, change: Callable[[KeyRecord], KeyRecord]) -> KeyRecord | None:
        with self._failing():
            while (raw := await self._raw(key_id)) is not None:
                changed = change(decode(raw))
                if await self._swap(key_id, raw, changed):
                    return changed
            return None

    async def _raw(self, key_id: str) -> bytes | None:
        return cast("bytes | None", await _answer(self._client.hget(_RECORDS, key_id)))

    async def _swap(self, key_id: str, expected: bytes, record: KeyRecord) -> bool:
        arguments: list[str | bytes] = [key_id, expected, encode(record), secrets.token_hex(8), str(_VERSION)]
        return int(await self._write(keys=self._keys, args=arguments)) > 0

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """The client's exceptions as one; their text may quote what was sent."""
        from redis.exceptions import RedisError

        try:
            yield
        except (RedisError, OSError, TimeoutError) as error:
            text = f"auth.database: {self._shown} does not answer ({type(error).__name__})"
            raise KeyStoreFailed(text) from error
        except (msgspec.MsgspecError, ValueError) as error:
            raise KeyStoreFailed(f"auth.database: {self._shown}: a record cannot be read") from error


async def _answer(command: Awaitable[Any] | Any) -> Any:
    """The client's types speak of both of its kinds, the blocking one and the awaited one."""
    return await command
