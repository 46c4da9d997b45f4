"""Uploads with the real huggingface_hub, to a server on this machine or to an address where nobody listens."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub
from huggingface_hub import HfApi

from ppcl.errors import UsageError
from ppcl.export.hub import check_repo_id, later, push

NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        yield server


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=TOKEN)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    export = tmp_path / "a run" / "export"
    (export / "transformer").mkdir(parents=True)
    (export / "README.md").write_text("---\nlibrary_name: diffusers\n---\n\n# T\n", encoding="utf-8")
    (export / "transformer" / "config.json").write_text("{}", encoding="utf-8")
    (export / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 1000)
    (export / ".README.md.123.tmp").write_text("half", encoding="utf-8")
    return export


@pytest.mark.parametrize("name", ["a/b/c", "own er/name", "owner/", "/name", "owner/name.git", "a--b/c", ""])
def test_a_malformed_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"^export\.push_to_hub=.* is not a repository's name, such as owner/name"):
        check_repo_id(name)


def test_good_names_pass() -> None:
    check_repo_id("owner/Qwen-Image_35.b")
    check_repo_id("name")


def test_everything_arrives_in_a_new_repository(hub: Hub, api: HfApi, folder: Path, tmp_path: Path) -> None:
    single = tmp_path / "export.safetensors"
    single.write_bytes(b"one")
    url = push(folder, "owner/small", single_file=single, private=True, commit_message="Prune", api=api)
    assert url == f"{hub.endpoint}/owner/small"
    repo = hub.repos["owner/small"]
    assert repo["private"]
    assert set(repo["commits"]) == {"Prune"}
    expected = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    del expected[".README.md.123.tmp"]
    assert repo["files"] == expected | {"small.safetensors": b"one"}


def test_a_name_alone_is_the_accounts_and_a_second_time_replaces_files(hub: Hub, api: HfApi, folder: Path) -> None:
    push(folder, "small", api=api)
    assert list(hub.repos) == ["me/small"]
    assert not hub.repos["me/small"]["private"]
    (folder / "README.md").write_text("# with scores\n", encoding="utf-8")
    push(folder, "small", api=api)
    assert hub.repos["me/small"]["files"]["README.md"] == b"# with scores\n"


def test_private_does_not_go_into_a_public_repository(hub: Hub, api: HfApi, folder: Path) -> None:
    push(folder, "owner/open", api=api)
    commits = list(hub.repos["owner/open"]["commits"])
    with pytest.raises(UsageError, match=r"^export\.private=true: owner/open exists and is public") as caught:
        push(folder, "owner/open", private=True, api=api)
    assert "hf upload" not in str(caught.value)  # which would not mind
    assert hub.repos["owner/open"]["commits"] == commits


def assert_says_what_to_do(error: UsageError, folder: Path, repo_id: str) -> None:
    text = str(error)
    assert "\n" not in text
    assert text.startswith(f"export.push_to_hub={repo_id} was not sent (")
    assert f"{folder} is complete on disk" in text
    command = later(folder, repo_id)
    assert f"`{command}`" in text
    assert shlex.split(command) == ["hf", "upload", repo_id, str(folder), "."]


def test_without_a_network(folder: Path) -> None:
    with pytest.raises(UsageError) as caught:
        push(folder, "owner/small", api=HfApi(endpoint=NOBODY, token=TOKEN))
    assert_says_what_to_do(caught.value, folder, "owner/small")


def test_without_a_token(hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UsageError, match="hf auth login") as caught:
        push(folder, "owner/small", api=HfApi(endpoint=hub.endpoint))
    assert_says_what_to_do(caught.value, folder, "owner/small")
    assert not hub.repos


def test_a_token_that_is_refused(hub: Hub, folder: Path) -> None:
    with pytest.raises(UsageError, match="401") as caught:
        push(folder, "owner/small", api=HfApi(endpoint=hub.endpoint, token="hf_wrong"))
    assert_says_what_to_do(caught.value, folder, "owner/small")
    assert "hf_wrong" not in str(caught.value)


def test_an_upload_that_breaks_off_is_made_up_for_by_the_next(hub: Hub, api: HfApi, folder: Path) -> None:
    hub.fail_commits = 1
    with pytest.raises(UsageError, match="403 Forbidden: You have exceeded your storage limit") as caught:
        push(folder, "owner/small", api=api)
    assert_says_what_to_do(caught.value, folder, "owner/small")
    push(folder, "owner/small", api=api)
    assert "README.md" in hub.repos["owner/small"]["files"]
