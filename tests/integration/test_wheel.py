"""The wheel is all that a user needs: it runs in an empty folder, without the repository.

`make test` runs it unpacked, on the libraries of the tests. `make test-wheel` also installs it into an empty
environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import REPOSITORY

CONSTRAINTS = REPOSITORY / "constraints.txt"
TEACHER_FOLDERS = [path for path in (REPOSITORY / "src" / "ppcl" / "assets").iterdir() if path.is_dir()]
TEACHERS = """
import ppcl
for name in {names!r}:
    pipeline = ppcl.teacher(name)
    assert len(pipeline.transformer.transformer_blocks) > 9 and ppcl.sampling(name)["num_inference_steps"]
print(ppcl.__file__)
"""
# Of `experiment=demo`, every stage in a few seconds.
SHORT = [
    "probe.num_batches=2", "probe.num_heldout_batches=1", "probe.batch_size=8", "method.num_samples=2",
    "method.num_timesteps=2", "method.batch_size=4", "distill.steps=2", "distill.batch_size=4", "width.steps=2",
    "width.num_batches=2", "budget.num_batches=1", "finetune.steps=2", "finetune.batch_size=4",
    "benchmark.prompts_per_category=1", "benchmark.latency_repeats=1", "generate.variants=[teacher,ppcl-finetuned]",
    "model.sampling.num_inference_steps=2",
]  # fmt: skip


@dataclass
class Installed:
    """A Python that has ppcl from the wheel, and an empty folder to run it in."""

    python: Path
    package: Path
    environment: dict[str, str]
    folder: Path

    def __call__(self, *arguments: str) -> str:
        command = [str(self.python), *arguments]
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout


def call(*command: str | Path) -> None:
    done = subprocess.run([*map(str, command)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with the suite's own hatchling, so that it takes no network."""
    folder = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ".")
    (found,) = folder.glob("ppcl-*.whl")
    return found


@pytest.fixture(scope="module", params=["unpacked", "installed"])
def installed(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    place, folder = tmp_path_factory.mktemp("place"), tmp_path_factory.mktemp("empty")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if request.param == "unpacked":
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place)
        return Installed(Path(sys.executable), place, environment | {"PYTHONPATH": str(place)}, folder)
    if "PPCL_TEST_WHEEL" not in os.environ:
        pytest.skip("`make test-wheel` does this: it takes minutes")
    call(sys.executable, "-m", "venv", place)
    python = place / "bin" / "python"
    torch = next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch=="))
    install = (python, "-I", "-m", "pip", "install", "--quiet")  # isolated: it is given no package of this process
    call(*install, torch)
    call(*install, "-c", CONSTRAINTS, wheel)
    return Installed(python, place, environment, folder)


def test_it_holds_code_configuration_and_teachers(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"ppcl", "hydra_plugins"}
    for tracked in ("conf/config.yaml", "conf/experiment/demo.yaml", "report/template.html.j2", "py.typed"):
        assert f"ppcl/{tracked}" in names
    for teacher in TEACHER_FOLDERS:
        assert f"ppcl/assets/{teacher.name}/model_index.json" in names
    assert "ppcl/assets/shapes_features.safetensors" in names


def test_it_helps(installed: Installed) -> None:
    assert "Typical commands:" in installed("-m", "ppcl", "--help")


def test_it_runs_the_demo(installed: Installed) -> None:
    installed("-m", "ppcl", "experiment=demo", *SHORT)
    for made in ("report/report.html", "export/model_index.json", "finetuned/ppcl.json", "plan/choice.json"):
        assert (installed.folder / "runs" / "demo" / made).is_file(), made


def test_it_ships_the_teachers(installed: Installed) -> None:
    names = sorted(path.name for path in TEACHER_FOLDERS)
    file = installed("-c", TEACHERS.format(names=names)).split()[-1]
    assert Path(file).is_relative_to(installed.package)
