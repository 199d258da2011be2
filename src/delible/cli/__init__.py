"""The command line: thin wrappers around the functions of the same names."""

from delible.cli.main import main

__all__ = ["main"]
