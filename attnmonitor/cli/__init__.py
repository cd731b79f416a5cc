"""The command line: ``attnmonitor scan``, ``report``, ``watch``, ``replay`` and ``demo``."""

from attnmonitor.cli.commands import main

__all__ = ["main"]
