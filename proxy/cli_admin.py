"""What the commands ask of a running server, through its admin listener."""

from __future__ import annotations

import aiohttp

from proxy import listen
from proxy.config import Config
from proxy.errors import StartError


async def ask(settings: Config, method: str, path: str) -> tuple[int, bytes]:
    """Status and body. Raises StartError if nobody answers."""
    address = settings.admin_address
    unix = address.unix_path
    connector = aiohttp.UnixConnector(unix) if unix else aiohttp.TCPConnector()
    base = listen.url(address, address.port, "http")
    headers = {"Authorization": f"Bearer {settings.admin_token}"} if settings.admin_token else {}
    try:
        async with (
            aiohttp.ClientSession(connector=connector, trust_env=False) as session,
            session.request(method, f"{base}{path}", headers=headers) as response,
        ):
            return response.status, await response.read()
    except (aiohttp.ClientError, OSError) as error:
        raise StartError(f"no server answers at {settings.admin}: start it, or give --admin") from error
