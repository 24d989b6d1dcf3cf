"""JSON Web Tokens of our own, for the command line. Beside `key_commands`, which needs no cryptography."""

from __future__ import annotations

from proxy.config import Config
from proxy.errors import OperationError
from proxy.jwtauth import signing_keys, token_rules
from proxy.key_order import duration, known_plan
from proxy.webtoken import issue_token


def issue(config: Config, subject: str, plan: str, ttl: str, now: float) -> str:
    """A JWT for `subject`, signed with the configured secret. Raises OperationError."""
    settings = config.auth.jwt
    if settings is None or "HS256" not in settings.algorithms:
        raise OperationError("auth.jwt: tokens can be issued only with algorithms: [HS256] and a secret")
    rules = token_rules(settings, signing_keys(settings))
    lifetime_s = duration("ttl", ttl)
    try:
        return issue_token(rules, subject, known_plan(plan, config.plans), lifetime_s, now)
    except ValueError as error:
        raise OperationError(f"subject: {error}") from None
