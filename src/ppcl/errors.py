"""Errors raised for a user's mistake."""

from __future__ import annotations


class UsageError(ValueError):
    """A mistake in what was asked for: one sentence that names the key, the value and the remedy.

    The command line prints it without a traceback and exits with 2.
    """


class SaidElsewhere(UsageError):  # noqa: N818 - of that one
    """A mistake that another rank of this run prints."""
