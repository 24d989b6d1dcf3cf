"""Where a command's configuration comes from: -c, $HEADRACE_CONFIG, ./headrace.yaml, or the built-in one."""

from __future__ import annotations

import argparse
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

from proxy import config


def config_flag() -> argparse.ArgumentParser:
    """-c, as a parent: it is accepted before and after a command's name."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument(
        "-c", dest="config", metavar="FILE", default=argparse.SUPPRESS, help="configuration file"
    )
    return parent


@dataclass(frozen=True)
class Source:
    """environ: the process's own. folder: where it was started."""

    environ: MutableMapping[str, str]
    folder: Path

    def settings(self, arguments: argparse.Namespace) -> config.Config:
        """Raises ConfigError."""
        path = config.find(getattr(arguments, "config", None), self.environ, self.folder)
        return config.built_in(self.environ) if path is None else config.load(path, self.environ)

    def of_server(self, arguments: argparse.Namespace) -> config.Config:
        """The same, for a command to the running server that `--admin` may name. Raises ConfigError."""
        address = arguments.admin and arguments.admin.removeprefix("http://").rstrip("/")
        return config.with_overrides(self.settings(arguments), None, address)
