"""Turns errors of Hydra, OmegaConf and the file system into one sentence each. Importing this loads neither."""

from __future__ import annotations

import errno
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager

from ppcl.config import Config
from ppcl.errors import UsageError
from ppcl.options import declared, unknown_key
from ppcl.paths import conf_dir


@contextmanager
def in_words() -> Iterator[None]:
    """Turn errors of Hydra and OmegaConf, and failures to read or write files, into `UsageError` within the context."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except UsageError:
        raise
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(sentence(error)) from error
    except Exception as error:
        failure = failed_access(error)
        if failure is None:
            raise
        raise failure from error


def told(error: BaseException) -> str:
    """Return why a command has failed, as one sentence; an error that nobody expected begins with its class."""
    if is_unexpected(error):
        return f"{type(error).__name__}: {error}".rstrip(": ")
    assert isinstance(error, Exception)
    return sentence(failed_access(error) or error)


def is_unexpected(error: BaseException) -> bool:
    """Return whether an error is neither a user's mistake nor a failure to read or write a file."""
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, (UsageError, OmegaConfBaseException)):
        return False
    return not isinstance(error, Exception) or failed_access(error) is None


# Patterns in OmegaConf's messages about a wrong value, and what the value should have been.
_KINDS = {
    r"to Integer|type hint 'int'": "a whole number",
    r"to Float|type hint 'float'": "a number",
    r"valid bool|type hint 'bool'": "true or false",
    r"not a ListConfig|to List": "a list",
    r"not a DictConfig|to Dict|Cannot assign": "a group of keys",
}


def sentence(error: Exception) -> str:
    """Return an error as one sentence, which names the override that caused it if that is known."""
    text = " ".join(str(error).split())
    if isinstance(error, UsageError):
        return text
    override = getattr(error, "override", None)  # an override that Hydra could not parse
    if override is not None:
        if "=" not in override:
            return f"{override} is no override: write KEY=VALUE, such as experiment=try; `ppcl --help` lists more."
        return _unreadable(override)
    found = re.match(r"Could not override '([^']*)'|Could not delete from config\. '([^']*)' does not exist", text)
    if found:
        return unknown_key((found[1] or found[2]).strip("."), Config())
    full_key = getattr(error, "full_key", None)
    if full_key and "Interpolation key" in text:
        return of_key(full_key, text)
    found = re.match(r"Could not append to config\. An item is already at '([^']*)'", text)
    if found:
        return f"+{found[1]} adds a key that is there already: write it without the +."
    found = re.match(r"Ambiguous value for argument '(.*?)' 1\. To use", text)
    if found:
        key, _, value = found[1].partition("=")
        if (conf_dir() / key).is_dir():
            return f"{found[1]} names several choices: name one, or add --multirun for a run of each."
        return (
            f"{found[1]} gives several values: write '{key}=[{value}]' for a list, '{key}=\"{value}\"' for text with a "
            "comma, or add --multirun for a run of each."
        )
    found = re.match(r"Error merging override (.*)$", str(error), re.DOTALL)
    cause = " ".join(str(error.__cause__).split()) if error.__cause__ is not None else ""
    kind = next((words for pattern, words in _KINDS.items() if re.search(pattern, cause)), None)
    if found and kind:
        return _wrong_kind(found[1], cause, kind)
    if found and re.search("is not Optional|does not support deletion", cause):
        key = found[1].lstrip("+~").partition("=")[0]
        return f"{found[1]}: {key} must have a value; give it one, or leave this out."
    if error.__cause__ is not None:
        text += ": " + str(error.__cause__).splitlines()[0]
    return text


def of_key(key: str, message: str) -> str:
    """Return OmegaConf's `message` about `key` or its value as a sentence."""
    if re.match(r"Key '.*' (is )?not in", message):
        return unknown_key(key, Config())
    found = re.match(r"Interpolation key '(.*?)' not found", message)
    if found is None:
        return f"{key}: {message.splitlines()[0]}."
    what = f"${{{found[1]}}}"
    return f"{key}: {what} stands for the value of a key {found[1]}, and there is none; write \\{what} for the text."


def printable(text: str) -> str:
    """Return `text` with control characters written as escapes, such as a line break as `\\n`."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _unreadable(override: str) -> str:
    """Return the sentence for an override that Hydra cannot parse, with that override as it has to be typed."""
    key, _, value = override.partition("=")
    start = f"{printable(override)} cannot be read"
    if value[:1] in ("[", "{"):
        return f"{start}: close its brackets and quotes, and write text in it in quotes, as '{key}=[\"TEXT\"]'."
    if value.startswith("~"):
        return f"{start}: write {key}=$HOME{printable(value[1:])} for your home folder."
    text = value.strip("\"'") if value[:1] in ("'", '"') else value
    quoted = f'"{text}"' if '"' not in text else "'" + text.replace("'", "\\'") + "'"
    typed = shlex.quote(f"{key}={quoted}")
    if "'" in text and not re.search(r'["$`\\!]', text):
        typed = f'"{key}=\\"{text}\\""'
    return f"{start}: text with such characters needs quotes of its own inside those of the shell: {printable(typed)}"


def _wrong_kind(override: str, cause: str, kind: str) -> str:
    """Return the sentence for an override whose value is not of the right kind, such as `a number`."""
    key, _, given = override.lstrip("+").partition("=")
    told = re.search(r"Value '(.*?)'", cause)
    value = told[1] if told else given
    default = next((item.value for item in declared(Config()) if item.name == key), None)
    if kind == "a list":
        remedy = f"; write '{key}=[{given}]'"
    elif isinstance(default, (bool, int, float)):
        remedy = f"; write one, such as {key}={str(default).lower()}"
    else:
        remedy = ""
    return f"{override}: {value!r} is not {kind}{remedy}."


def failed_access(error: Exception) -> UsageError | None:
    """Return a failure to read or write a file as a `UsageError` with the system's reason; None for other errors."""
    found = re.search(r"\(os error (\d+)\)", str(error))  # the wording of safetensors
    if isinstance(error, OSError) and (error.filename or error.errno):
        reason = f"{error.filename or 'writing'}: {error.strerror}"
    elif found:
        reason = f"writing: {os.strerror(int(found[1]))}"
    elif "PytorchStreamWriter failed" in str(error):
        reason = "writing a checkpoint failed: is the disk full?"
    else:
        return None
    few = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
    remedy = "after `ulimit -n 4096` " if few else ""
    return UsageError(f"{reason}; finished files are intact, and {remedy}the same command continues from them.")
