"""Uploads a complete export to the Hugging Face Hub.

huggingface_hub makes one commit for a folder of this size. If an upload is repeated, it sends only the missing files.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ppcl.errors import UsageError

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def check_repo_id(repo_id: str) -> None:
    """Raise `UsageError` for a name that the Hub would not accept as a repository's; needs no network."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(
            f"export.push_to_hub={repo_id} is not a repository's name, such as owner/name: {_line(error)}"
        ) from None


def check_token(repo_id: str) -> None:
    """Raise `UsageError` if this machine has no token for the Hub; needs no network."""
    from huggingface_hub import get_token

    if not get_token():
        raise UsageError(
            f"export.push_to_hub={repo_id} needs a token of the Hub, and none is set: run `hf auth login`, or set "
            "HF_TOKEN, or leave it out."
        )


def push(
    folder: Path,
    repo_id: str,
    *,
    single_file: Path | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    api: HfApi | None = None,
) -> str:
    """Upload the contents of `folder`, and `single_file` beside them, to a repository; create it if it does not exist.

    Returns the repository's URL. `private=None` is the account's default for a new repository. Raises `UsageError` if
    the Hub cannot be reached, if no token is set or if the Hub refuses; the sentence holds a command that uploads
    later. Raises it too for `private=True` and a repository that exists and is public.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HTTPError

    api = api or HfApi()
    try:
        if not (api.token or get_token()):
            raise PermissionError("no token is set, `hf auth login` saves one")
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(url.repo_id).private:  # the Hub ignores `private` for an existing one
            raise UsageError(
                f"export.private=true: {url.repo_id} exists and is public; name another export.push_to_hub, or make "
                "that repository private first."
            )
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            commit_message=commit_message,
            ignore_patterns=["*.tmp"],  # left by a process that was killed while it wrote the card
        )
        if single_file is not None:
            name = f"{url.repo_id.rpartition('/')[2]}.safetensors"
            api.upload_file(
                path_or_fileobj=single_file, path_in_repo=name, repo_id=url.repo_id, commit_message=commit_message
            )
    except UsageError:
        raise
    # hf_xet raises RuntimeError when an upload breaks off; a refused commit ends in ValueError.
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"export.push_to_hub={repo_id} was not sent ({_line(error).rstrip('.')}): {folder} is complete on disk; "
            f"send it later with `{later(folder, repo_id, private)}`, or run the same command again."
        ) from None
    return str(url)


def later(folder: Path, repo_id: str, private: bool | None = None) -> str:
    """Return the shell command that uploads `folder`."""
    return shlex.join(["hf", "upload", repo_id, str(folder), ".", *(["--private"] if private else [])])


def _line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
