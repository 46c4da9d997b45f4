"""Exceptions for mistakes of the user."""

from __future__ import annotations


class UsageError(ValueError):
    """A mistake of the user. The message is one sentence that names the key, the value and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """


class SaidElsewhere(UsageError):  # noqa: N818 - the base class ends in Error
    """A `UsageError` that another rank prints, so this rank exits without printing it."""
