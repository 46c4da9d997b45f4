"""The folders of sets of pictures."""

from __future__ import annotations

from pathlib import Path

from ppcl.config import Config
from ppcl.pictures.sets import set_folder
from ppcl.report.sheets import _is_own


def test_own_prompts_named_shapes_are_not_taken_for_the_benchmark(tmp_path: Path) -> None:
    config = Config()
    config.generate.prompt = "Shapes!"
    folder = set_folder(tmp_path, config, {})
    assert folder.name.startswith("shapes-prompts-")
    assert _is_own(folder, {})
    config.generate.prompt = "Shapes of things"
    assert set_folder(tmp_path, config, {}).name.startswith("shapes-of-things-")
