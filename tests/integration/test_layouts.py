"""The official scorers of GenEval and DPG-Bench find every picture where they look for it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
from commands import INTERVALS, succeed
from PIL import Image

SIZE = 32  # pixels per side that the tiny teacher draws


def drawn(settings: list[str], folder: Path, prompts: Path, layout: str, each: int) -> tuple[Path, list[np.ndarray]]:
    """Draw `prompts` with the variant `removed`; return the folder of the layout, and the pictures in their order."""
    own = [f"generate.prompt_file={prompts}", f"generate.num_images={each}", f"generate.layout={layout}"]
    command = [*settings, f"paths.runs_dir={folder}", "name=run", INTERVALS, *own, "generate.variants=[removed]"]
    for _ in range(2):  # drawn, and reused
        succeed(*command, "stages=[generate]")
    (pictures,) = (folder / "run" / "images").glob("*/removed")
    return folder / "run" / "layouts" / layout / pictures.parent.name / "removed", [
        np.asarray(Image.open(path)) for path in sorted(pictures.glob("0*.png"))
    ]


def test_geneval_finds_each_prompts_line_and_samples(settings: list[str], tmp_path: Path) -> None:
    """As `evaluation/evaluate_images.py` of djghosh13/geneval looks for them."""
    records = [
        {"tag": "single_object", "include": [{"class": name, "count": 1}], "prompt": f"a photo of a {name}"}
        for name in ("bench", "cow")
    ]
    metadata = tmp_path / "evaluation_metadata.jsonl"
    metadata.write_text("".join(json.dumps(record) + "\n" for record in records))
    root, pictures = drawn(settings, tmp_path, metadata, "geneval", 2)
    found = {}
    for subfolder in os.listdir(root):
        assert subfolder.isdigit()
        record = json.loads((root / subfolder / "metadata.jsonl").read_text())
        samples = sorted((root / subfolder / "samples").iterdir())
        assert all(re.match(r"\d+\.png", path.name) for path in samples)
        found[int(subfolder)] = record, [np.asarray(Image.open(path)) for path in samples]
    assert [found[number][0] for number in range(2)] == records
    np.testing.assert_array_equal(found[0][1] + found[1][1], pictures)


def test_dpg_finds_each_prompts_tiles_under_its_name(settings: list[str], tmp_path: Path) -> None:
    """As `dpg_bench/compute_dpg_bench.py` of TencentQQGYLab/ELLA cuts them, with 4 pictures of a prompt."""
    (tmp_path / "prompts").mkdir()
    for name in ("midjourney_2", "100"):
        (tmp_path / "prompts" / f"{name}.txt").write_text(f"a red circle of {name}\n")
    root, pictures = drawn(settings, tmp_path, tmp_path / "prompts", "dpg", 4)
    assert sorted(os.listdir(root)) == ["100.png", "midjourney_2.png"]
    corners = [(0, 0), (SIZE, 0), (0, SIZE), (SIZE, SIZE)]
    tiles = [
        np.asarray(Image.open(root / name).crop((x, y, x + SIZE, y + SIZE)))
        for name in sorted(os.listdir(root))
        for x, y in corners
    ]
    np.testing.assert_array_equal(tiles, pictures)


def test_npz_has_the_pictures_of_every_variant_in_their_order(settings: list[str], tmp_path: Path) -> None:
    """As `evaluations/evaluator.py` of openai/guided-diffusion reads them."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    root, pictures = drawn(settings, tmp_path, tmp_path / "prompts.txt", "npz", 2)
    assert os.listdir(root.parent) == ["removed.npz"]
    with np.load(f"{root}.npz") as found:
        np.testing.assert_array_equal(found["arr_0"], pictures)
