"""Pictures as official scorers read them: the folders of GenEval and DPG-Bench, and the .npz of ADM's evaluator.

`layouts/geneval/SET/VARIANT/` has a folder for each prompt, `00000/` and so on, with the prompt's line of
`evaluation_metadata.jsonl` in `metadata.jsonl`, and its pictures in `samples/`. `layouts/dpg/SET/VARIANT/` has one
picture for each prompt, under the name of the prompt's file. Several pictures of a prompt are tiles of it: two in a
row, from left to right and from top to bottom. `layouts/npz/SET/VARIANT.npz` is one array with all pictures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ppcl.artifacts.files import atomic_path, link_or_copy
from ppcl.context import Run
from ppcl.pictures.arrays import write_npz
from ppcl.pictures.images import image_folder, picture_path, read_picture, save_image
from ppcl.validation.prompts import OwnPrompt


def write_layout(run: Run, variant: str) -> Path:
    """Write a variant's pictures in the layout `generate.layout`, and return its folder or its file.

    Pictures in folders are hard links to those of the set where that is possible. Raises `UsageError` for pictures of
    different sizes in the layout `npz`.
    """
    pictures, layout = image_folder(run, variant), str(run.config.generate.layout)
    folder = run.folder / "layouts" / layout / pictures.parent.name / pictures.name
    if layout == "npz":
        target = folder.with_name(f"{folder.name}.npz")
        write_npz([picture_path(pictures, number) for number in range(len(run.prompts))], target)
        return target
    each = run.benchmark.images_per_prompt
    for number, prompt in enumerate(run.prompts[::each]):
        files = [picture_path(pictures, each * number + index) for index in range(each)]
        if layout == "geneval":
            _write_geneval(folder / f"{number:05d}", prompt.fact, files)
        else:
            _write_dpg(folder / f"{prompt.fact.name}.png", files)
    return folder


def _write_geneval(folder: Path, prompt: OwnPrompt, files: Sequence[Path]) -> None:
    """Write the folder of one prompt: `metadata.jsonl`, and `samples/0000.png` and so on."""
    with atomic_path(folder / "metadata.jsonl") as temporary:
        temporary.write_text(json.dumps(prompt.record) + "\n", encoding="utf-8")
    for index, file in enumerate(files):
        _link(file, folder / "samples" / f"{index:04d}.png")


def _write_dpg(path: Path, files: Sequence[Path]) -> None:
    """Write the picture of one prompt: its only picture, or its pictures as tiles."""
    if len(files) == 1:
        _link(files[0], path)
        return
    tiles = [read_picture(file) for file in files]
    width, height = tiles[0].size
    whole = Image.new("RGB", (2 * width, -(-len(tiles) // 2) * height))
    for index, tile in enumerate(tiles):
        whole.paste(tile, (index % 2 * width, index // 2 * height))
    save_image(whole, path)


def _link(source: Path, target: Path) -> None:
    """Make `target` the same picture as `source`, also where it was an earlier one."""
    link_or_copy(source, target)
