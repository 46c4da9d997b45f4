"""Folders of pictures are claimed by one command each, however many want them at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ppcl.artifacts.files import read_json
from ppcl.artifacts.headers import Header
from ppcl.pictures.sets import claim_variant


def header(model: int) -> Header:
    return Header("ppcl.images", {"model": model})


def test_models_that_begin_at_once_share_no_folder(tmp_path: Path) -> None:
    models = [model for model in range(8) for _ in range(2)]
    with ThreadPoolExecutor(len(models)) as pool:
        found = list(pool.map(lambda model: claim_variant(tmp_path / "ppcl", header(model)), models))
    assert tmp_path / "ppcl" in found
    owners = {folder: model for model, folder in zip(models, found, strict=True)}
    for model, folder in zip(models, found, strict=True):  # two commands of one model may share theirs
        assert owners[folder] == model
        assert read_json(folder / "unfinished.json", "The claim") == header(model).to_json()
        assert [path.name for path in folder.iterdir()] == ["unfinished.json"]


def test_unfinished_and_complete_pictures_keep_their_folder(tmp_path: Path) -> None:
    mine, other = (claim_variant(tmp_path / "ppcl", header(model)) for model in (1, 2))
    (mine / "unfinished.json").rename(mine / "manifest.json")
    for model, folder in ((1, mine), (2, other), (1, mine)):
        assert claim_variant(tmp_path / "ppcl", header(model)) == folder
    assert not (mine / "unfinished.json").exists()
