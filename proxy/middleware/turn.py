"""While streams run, new requests wait here for their turn of the event loop: see `turnstile`.

Inside `observe` and `errors`: who leaves while it waits has its log line, and a drain its answer. Without
streams nobody is to be protected, and turns that are cut short cost a tenth of a short request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from proxy.core import Core


def must_wait(core: Core) -> bool:
    """Then at `core.turnstile`."""
    return core.metrics.streams_active.total > 0
