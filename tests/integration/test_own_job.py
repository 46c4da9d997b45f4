"""A newcomer's own job: a pipeline folder, 200 pictures with captions, one command, defaults but for the steps."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import succeed
from PIL import Image
from safetensors import safe_open

from ppcl.data.worlds import shapes

SHARE = 0.6
SHORT = ["distill.steps=40", "width.steps=10", "finetune.steps=40"]

# Draws with the export where ppcl cannot be imported.
SCRIPT = """
import sys
sys.modules["ppcl"] = None
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipeline("a red circle", height=32, width=32, num_inference_steps=2).images[0].save(sys.argv[2])
"""


@pytest.fixture(scope="module")
def place(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the teacher and the pictures."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "model").symlink_to(teacher)
    (folder / "pictures").mkdir()
    with (folder / "pictures" / "metadata.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["file_name", "text"])
        for number in range(200):
            scene = shapes.make_scene(9, number)
            image = Image.fromarray(shapes.render(scene.objects))
            image.resize((64, 64), Image.Resampling.NEAREST).save(folder / "pictures" / f"{number}.jpg")
            writer.writerow([f"{number}.jpg", scene.caption])
    return folder


def parameters(folder: Path) -> int:
    total = 0
    for file in (folder / "transformer").glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            total += sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    return total


def test_one_command_prunes_draws_and_exports(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    said = succeed("experiment=prune", "model.path=model", "data.path=pictures", f"budget.params={SHARE}", *SHORT).out
    assert "pictures: 200 pictures" in said  # the data, and not the toy world
    run = place / "runs" / "pruned"

    captions = {row["text"] for row in csv.DictReader((place / "pictures" / "metadata.csv").open())}
    manifests = sorted(run.glob("images/*/*/manifest.json"))
    assert {path.parent.name for path in manifests} == {"teacher", "removed", "ppcl-finetuned"}
    drawn = [json.loads(line)["prompt"] for line in (manifests[0].parent / "prompts.jsonl").read_text().splitlines()]
    assert drawn
    assert set(drawn) <= captions

    (report,) = run.rglob("report.json")
    rows = {row["name"]: row for row in json.loads(report.read_text())["variants"]}
    assert all(row["scores"] is None for row in rows.values())  # never the toy score
    assert rows["teacher"]["velocity_error"] == rows["teacher"]["latent_distance"] == 0
    assert 0 < rows["ppcl-finetuned"]["velocity_error"] < rows["removed"]["velocity_error"]
    page = report.with_name("report.html").read_text()
    assert any(caption in page for caption in drawn)

    assert parameters(run / "export") <= SHARE * parameters(place / "model")
    environment = os.environ | {"HF_MODULES_CACHE": str(place / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(run / "export"), "drawn.png"],
        cwd=place, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Image.open(place / "drawn.png").size == (32, 32)
