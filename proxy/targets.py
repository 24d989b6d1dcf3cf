"""A model's upstreams as a request chooses among them; built once per configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from time import monotonic
from typing import TYPE_CHECKING

from proxy.routing import fallbacks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from proxy import schema
    from proxy.breaker import Breaker
    from proxy.config import Config
    from proxy.upstream import Upstream


class Target:
    """One upstream of one model: a `routing.Candidate`.

    label: the configured name of the model, for metrics; None on routes without one.
    model: its name there; None: as the caller wrote it.
    fallback: the name under which it stands in for another model; None: it is what was asked for.
    """

    __slots__ = ("fallback", "label", "model", "tier", "upstream", "weight")

    def __init__(
        self,
        upstream: Upstream,
        label: str | None = None,
        settings: schema.Target | None = None,
        fallback: str | None = None,
    ) -> None:
        self.upstream = upstream
        self.label = label
        self.model = (settings.model if settings is not None else None) or fallback
        self.weight = settings.weight if settings is not None else 1.0
        self.tier = settings.tier if settings is not None else 1
        self.fallback = fallback

    @property
    def in_flight(self) -> int:
        return self.upstream.in_flight

    @property
    def available(self) -> bool:
        return self.upstream.available(monotonic())

    @property
    def ready(self) -> bool:
        return self.upstream.ready(monotonic())


#: The targets of a model, then those of each model to fall back to.
Groups = tuple[tuple[Target, ...], ...]


def use(groups: Groups) -> None:
    """A reload closes none of them before `unuse`: each may still be asked. (Two plain calls: a context
    manager costs a request an object and 0.3 us more.)"""
    for group in groups:
        for target in group:
            target.upstream.users += 1


def unuse(groups: Groups) -> None:
    """After `use`, once."""
    for group in groups:
        for target in group:
            target.upstream.users -= 1


class Targets:
    """Every configured model's."""

    def __init__(self, settings: Config, upstreams: Mapping[str, Upstream]) -> None:
        self.default: Groups = ((Target(upstreams[settings.default_upstream]),),)
        self._settings = settings
        self._known = {label: (label, self._groups_of(label, upstreams)) for label in settings.models}
        _join_pools([groups for _, groups in self._known.values()], upstreams.values())

    def find(self, model: str) -> tuple[str, Groups] | None:
        """The configured name of what a caller asked for, and whom to ask. None: no such model."""
        known = self._known.get(model)
        if known is not None:
            return known
        found = self._settings.match_model(model)
        return None if found is None else self._known[found[0]]

    def _groups_of(self, label: str, upstreams: Mapping[str, Upstream]) -> Groups:
        models = self._settings.models

        def listed(name: str) -> Sequence[str]:
            found = self._settings.match_model(name)
            return () if found is None else found[1].fallback

        chain = list(fallbacks(label, listed))
        own = tuple(Target(upstreams[each.name], label, each) for each in models[label].upstreams)
        groups = [own]
        for name in chain[1:]:
            found = self._settings.match_model(name)
            assert found is not None  # checked with the configuration
            groups.append(
                tuple(Target(upstreams[each.name], found[0], each, name) for each in found[1].upstreams)
            )
        return tuple(groups)


def _join_pools(models: Iterable[Groups], upstreams: Iterable[Upstream]) -> None:
    """An upstream is in the pool of each model that it serves (`breaker`: at most half of one is ejected)."""
    pools: dict[Breaker, list[tuple[Breaker, ...]]] = {each.breaker: [] for each in upstreams}
    for own, *_ in models:
        pool = tuple(target.upstream.breaker for target in own)
        for breaker in set(pool):
            pools[breaker].append(pool)
    for breaker, joined in pools.items():
        breaker.pools = tuple(joined)
