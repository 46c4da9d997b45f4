"""Exceptions for mistakes of the user, and for signals."""

from __future__ import annotations


class UsageError(ValueError):
    """A mistake of the user. The message is one sentence that names the key, the value and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """


class Stopped(KeyboardInterrupt):
    """A signal has ended a training, whose last step is saved.

    `number`: the signal. The command line exits with 128 + `number`, as shells report the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class SaidElsewhere(UsageError):  # noqa: N818 - the base class ends in Error
    """A `UsageError` that another rank prints, so this rank exits without printing it."""


def root(error: BaseException) -> str:
    """Return the first line of the first error that led to `error`, such as a connection that was refused."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return str(error).split("\n")[0] or type(error).__name__
