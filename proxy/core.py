"""What all requests of one process share. Built once by `server.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy.errors import ModelNotFound, Overloaded
from proxy.retry import RetryBudget
from proxy.turnstile import Turnstile

if TYPE_CHECKING:
    from proxy import config
    from proxy.admission import Admission
    from proxy.authenticator import Authenticator
    from proxy.context import Context
    from proxy.identity import Principal
    from proxy.ledger_row import RowSink
    from proxy.log import RequestLog
    from proxy.metrics import Metrics
    from proxy.schema import Plan
    from proxy.targets import Groups, Targets
    from proxy.upstream import Upstream


class Bodies:
    """The bytes of all request bodies that are held at once; past the limit new ones are refused."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def take(self, size: int) -> None:
        if self.held + size > self.limit:
            raise Overloaded
        self.held += size

    def give_back(self, size: int) -> None:
        self.held -= size


class Core:
    """The process: its configuration, its upstreams, its running requests."""

    def __init__(
        self,
        settings: config.Config,
        upstreams: dict[str, Upstream],
        metrics: Metrics,
        request_log: RequestLog,
        started_at: float,
    ) -> None:
        self.config = settings
        self.upstreams = upstreams
        self.targets: Targets  # of these upstreams: set whenever they are
        self.retry_budget = RetryBudget(settings.retry.budget)
        self.metrics = metrics
        self.request_log = request_log
        self.started_at = started_at  # wall clock, seconds: `created` of the models list
        self.ledger: RowSink  # set before the first request
        self.admission: Admission  # set before the first request, and by a reload
        self.authenticator: Authenticator | None = None  # None: open
        self.running: set[Context] = set()
        self.ended: list[Context] = []  # of them, those that wait to be settled
        self.draining_for_usage = 0  # requests that are read on for their usage, their callers gone
        self.bodies = Bodies(settings.max_buffered_bytes)
        self.turnstile = Turnstile()
        self.draining = False  # answers close their connection
        self.refusing = False  # and there are no new requests

    def plan_of(self, principal: Principal | None) -> Plan | None:
        """The plan that limits a caller; open mode has none."""
        return None if principal is None else self.config.plans[principal.plan]

    def route(self, model: str | None) -> tuple[str, Groups]:
        """The configured name of a model (the metric label), and whom to ask.

        None is a route without a model: `default_upstream`. Raises ModelNotFound.
        """
        if model is None:
            return "none", self.targets.default
        found = self.targets.find(model)
        if found is None:
            raise ModelNotFound
        return found
