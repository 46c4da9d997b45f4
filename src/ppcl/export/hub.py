"""Sends an export that is whole on disk to the Hugging Face Hub.

Uploads go through huggingface_hub, which commits once for a folder of this size and, asked again, sends only
what is not there yet.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ppcl.errors import UsageError

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def check_repo_id(repo_id: str) -> None:
    """Refuse what the Hub would not take as a repository's name; asks nobody."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(
            f"export.push_to_hub={repo_id} is no repository's name, which is like owner/name: {_line(error)}"
        ) from None


def push(
    folder: Path,
    repo_id: str,
    *,
    single_file: Path | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    api: HfApi | None = None,
) -> str:
    """Upload `folder`, and `single_file` beside its contents, to a repository that is made if need be.

    Returns its address. Raises `UsageError` with the command for later where the Hub is out of reach, knows no
    token or refuses, and where `private` was asked of a repository that everybody sees.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HTTPError

    api = api or HfApi()
    try:
        if not (api.token or get_token()):
            raise PermissionError("no token is set, `hf auth login` saves one")
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(url.repo_id).private:  # the Hub ignores the wish for one that exists
            raise UsageError(
                f"export.private=true: {url.repo_id} exists and is public; name another export.push_to_hub, or make "
                "that repository private first."
            )
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            commit_message=commit_message,
            ignore_patterns=["*.tmp"],  # of a process that was killed while it wrote the card
        )
        if single_file is not None:
            name = f"{url.repo_id.rpartition('/')[2]}.safetensors"
            api.upload_file(
                path_or_fileobj=single_file, path_in_repo=name, repo_id=url.repo_id, commit_message=commit_message
            )
    except UsageError:
        raise
    # RuntimeError is what hf_xet raises where an upload breaks off, ValueError what a refused commit ends with.
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"export.push_to_hub={repo_id} was not sent ({_line(error).rstrip('.')}): {folder} is whole on disk, and "
            f"`{later(folder, repo_id, private)}` sends it later, as does the same command again."
        ) from None
    return str(url)


def later(folder: Path, repo_id: str, private: bool | None = None) -> str:
    """The shell command that sends `folder`."""
    return shlex.join(["hf", "upload", repo_id, str(folder), ".", *(["--private"] if private else [])])


def _line(error: Exception) -> str:
    """The first line of what an error says, or its name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
