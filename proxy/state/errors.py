"""What a store raises, and nothing else."""

from __future__ import annotations


class StoreUnavailable(Exception):
    """The store gave no answer in time: `limits.on_store_failure` decides. The text says why; no secrets."""
