"""The caller's request rate, decided from the head alone: before a byte of the body is read."""

from __future__ import annotations

from collections.abc import Awaitable

from proxy.context import Context


def arrive(ctx: Context) -> Awaitable[None] | None:
    """Raises LimitExceeded, here or from what it returns: a store that has to be waited for."""
    endpoint, principal = ctx.endpoint, ctx.principal
    if principal is None or endpoint is None or not endpoint.costs:
        return None
    core = ctx.core
    return core.admission.arrive(ctx, principal, core.config.plans[principal.plan])
