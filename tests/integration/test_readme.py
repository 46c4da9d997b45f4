"""Every command and every Python call in the README runs, in the README's order and in one folder.

Real models and long trainings are replaced by tiny ones; everything else is as a reader would paste it.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import REPOSITORY, ppcl
from PIL import Image
from test_import_published import model as published  # noqa: F401 - a fixture
from test_lora import lora  # noqa: F401 - a fixture

from ppcl.data.worlds import shapes
from ppcl.export.single_file import parts_of
from ppcl.families.dit import ORIGINAL
from ppcl.families.dit.tiny import build_pipeline as build_dit
from ppcl.pictures.arrays import write_npz
from ppcl.pictures.inception import Inception
from tests.pipelines_tiny import wan

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
WIDEST = 120  # columns; a screen

# What stands in the README, and what is run in its place.
TINY = "model=auto model.path=DIR intervals.transformer_blocks=[[1,2],[3,4]]"
SETS = "width.source=given width.names=[transformer_blocks.5.text,transformer_blocks.0.ffn]"
REPLACED = {
    r"model=qwen_image model\.path=Qwen/Qwen-Image (.*)intervals=qwen_image_paper width=qwen_image_paper": (
        rf"{TINY} {SETS} \1"
    ),
    r"model=qwen_image ('stages=\[import_published\]'.*) intervals=qwen_image_paper": r"model=auto model.path=DIR \1",
    r"model\.path=WAN22": f"model.path=WAN22 {' '.join(map(shlex.quote, wan.SETTINGS))}",
    r"--nproc-per-node 8": "--nproc-per-node 2",
    r"=16": "=4",
    r"=50000": "=4",
    r"trials=\d+": "trials=3",
}
SHORT = [
    *("distill.steps=2", "distill.batch_size=4", "width.steps=1", "width.num_batches=2"),
    *("finetune.steps=2", "finetune.batch_size=4", "probe.num_batches=2", "probe.num_heldout_batches=1"),
    *("probe.batch_size=8", "method.num_samples=4", "method.num_timesteps=2", "method.batch_size=4"),
    *("model.sampling.num_inference_steps=2", "benchmark.prompts_per_category=1", "benchmark.latency_repeats=2"),
    *("budget.num_batches=1", "trainer=cpu", "trainer.num_threads=1", "trainer.progress=false", "logger=none"),
]


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Every shell command of the README in its order, each on one line."""
    lines = "\n".join(code_blocks("bash")).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip()]


def snippets() -> list[str]:
    """The Python examples that are whole programs; classes are tested where they belong."""
    return [block for block in code_blocks("python") if not re.search(r"^class |^@dataclass", block, re.MULTILINE)]


@pytest.fixture(scope="module")
def place(
    teacher: Path,
    lora: Path,  # noqa: F811
    published: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder in which a reader works, with all that the commands name."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "DIR").symlink_to(teacher)
    (folder / "PUBLISHED").symlink_to(published)
    shutil.copy(lora, folder / "style.safetensors")
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    for name in ("PICTURES", "SHARDS"):
        (folder / name).mkdir()
        with (folder / name / "metadata.csv").open("w", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerow(["file_name", "text"])
            for number in range(24):
                scene = shapes.make_scene(5, number)
                Image.fromarray(shapes.render(scene.objects)).save(folder / name / f"{number}.png")
                writer.writerow([f"{number}.png", scene.caption])
    write_dit(folder)
    wan.build_22(folder / "WAN22")
    return folder


def write_dit(folder: Path) -> None:
    """Write a small DiT, pictures of two of its classes, a reference, and weights of Inception that are random."""
    pipeline = build_dit(0, 6)
    pipeline.save_pretrained(folder / "DIT")
    state = pipeline.transformer.state_dict()
    original = {
        part.key: torch.cat([state[name] for name in part.sources[: 1 if part.repeated else None]])
        for part in parts_of(ORIGINAL, state)
    }
    torch.save(original, folder / "DiT-XL-2-256x256.pt")
    for name in ("a red circle", "a cross"):
        (folder / "imagenet" / "train" / name).mkdir(parents=True)
        for number in range(12):
            shutil.copy(folder / "PICTURES" / f"{number}.png", folder / "imagenet" / "train" / name)
    write_npz(sorted((folder / "PICTURES").glob("*.png"))[:4], folder / "VIRTUAL_imagenet256_labeled.npz")
    torch.save(Inception().state_dict(), folder / "pt_inception-2015-12-05-6726825d.pth")


def tiny(command: str, place: Path) -> list[str]:
    """The words of a command with what a real model or a long training needs replaced."""
    for pattern, replacement in REPLACED.items():
        command = re.sub(pattern, replacement, command)
    if "[3-5],[6-7]" in command:  # intervals of a real model; these are those that were detected here
        plan = json.loads((place / "runs" / "small" / "plan" / "plan.json").read_text())
        pairs = plan["intervals"]["transformer_blocks"]
        command = command.replace("[3-5],[6-7]", ",".join(f"[{u}-{v}]" for u, v in pairs))
    return shlex.split(command, comments=True)


def run(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    arguments = words[words.index("ppcl") + 1 :]
    counting = arguments[-1] == "stages=[plan]" and "experiment=" not in "".join(arguments)
    if not counting and not any(
        argument in ("compare", "npz") or argument.startswith("run=") for argument in arguments
    ):
        arguments = [*arguments, *(item for item in SHORT if not _given(item, arguments))]
    if words[0] == "torchrun":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:3]]
        done = subprocess.run(
            [*launcher, "-m", "ppcl", *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return
    outcome = ppcl(*arguments)
    assert outcome.code == 0, outcome.err


def _given(item: str, arguments: list[str]) -> bool:
    return any(argument.startswith(item.partition("=")[0] + "=") for argument in arguments)


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_runs(command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = tiny(command, place)
    if words[0] == "make":  # the targets themselves install, or take long
        assert re.search(rf"^{words[1]}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    elif words[0] in (".", "pip"):
        pytest.skip("installing is tried by make test-wheel")
    else:
        run(words, place, monkeypatch)


@pytest.mark.parametrize("number", range(len(snippets())))
def test_a_program_of_the_readme_runs(number: int, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    exec(compile(snippets()[number], f"README, program {number}", "exec"), {})


def test_the_readme_fits_a_screen() -> None:
    lines = [line for line in README.splitlines() if not line.startswith("![")]
    assert [line for line in lines if len(line) > WIDEST] == []


def test_every_link_within_the_readme_leads_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]*)\)", README)) <= anchors
    assert all((REPOSITORY / path).exists() for path in re.findall(r"\]\((?!#|https?:)([^)]*)\)", README))
