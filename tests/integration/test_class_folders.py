"""A DiT takes classes by name or number, as prompts and as folders in ImageNet's layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import ppcl, succeed
from PIL import Image
from safetensors.torch import load_file

from ppcl.command import prepare
from ppcl.data.cached import read_parts
from ppcl.data.worlds import shapes

QUICK = ["trainer=cpu", "trainer.num_threads=1", "trainer.progress=false", "logger=none"]
NAMES = shapes.all_captions(("single_object", "colors"))  # the classes of tiny_dit, in their order


def command(folder: Path, *more: str) -> list[str]:
    return ["model=tiny_dit", f"paths.runs_dir={folder / 'runs'}", *QUICK, *more]


def class_folders(folder: Path, names: list[str], pictures: int = 2) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(pictures):
            scene = shapes.make_scene(5, number, "single_object")
            Image.fromarray(shapes.render(scene.objects)).save(folder / name / f"{number}.png")
    return folder


def cached(arguments: list[str]) -> dict[str, tuple[str, int]]:
    """Caption and class label of each cached sample."""
    found = {}
    for record, samples in read_parts(prepare(arguments).data.cache_folder):
        tensors = load_file(record.with_suffix(".safetensors"))
        for number, sample in enumerate(samples):
            found[sample["key"]] = sample["caption"], int(tensors[f"{number:03d}.class_labels"])
    return found


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["a red circle", "a cross"], {"a red circle": "a red circle", "a cross": "a cross"}),
        (["0", "27"], {"0": "0", "27": "27"}),
        ([f"n{9 * number:08d}" for number in range(28)], {f"n{9 * number:08d}": f"{number}" for number in range(28)}),
    ],
)
def test_class_folders_are_cached(tmp_path: Path, names: list[str], found: dict[str, str]) -> None:
    data = class_folders(tmp_path / "data", names)
    caching = command(tmp_path, f"data.path={data}", "stages=[cache]", "name=cached")
    outcome = succeed(*caching)
    assert f"{2 * len(names)} pictures in {len(names)} class folders" in outcome.out
    assert f"{2 * len(names)} samples of {len(names)} units cached, 0 left out" in outcome.out
    numbers = {str(number): number for number in range(28)} | {name: NAMES.index(name) for name in NAMES}
    expected = {f"{name}/{picture}.png": (text, numbers[text]) for name, text in found.items() for picture in range(2)}
    assert cached(caching) == expected
    assert "reused" in succeed(*caching).out
    (data / names[0] / "1.png").rename(data / names[0] / "new.png")
    assert "cached, 0 left out" in succeed(*caching).out
    assert f"{names[0]}/new.png" in cached(caching)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a cross", "dragon"], "'dragon' is no class of this model; give one of its names, a blue circle, "),
        (["28"], "or a number from 0 to 27."),
        (["n00000001", "n00000002"], "n00000001 is a name of WordNet, whose class follows from its place among the "),
    ],
)
def test_classes_that_the_model_does_not_have_are_refused(tmp_path: Path, names: list[str], said: str) -> None:
    data = class_folders(tmp_path / "data", names)
    outcome = ppcl(*command(tmp_path, f"data.path={data}", "stages=[cache]", "name=refused"))
    assert outcome.code == 2
    assert outcome.err.startswith(f"ppcl: data.path={data} has a folder for each class: ")
    assert said in outcome.err
    assert outcome.err.count("\n") == 1
    assert not [*tmp_path.rglob("*.safetensors")]


def test_a_number_draws_the_picture_of_its_class(tmp_path: Path) -> None:
    drawing = command(tmp_path, "stages=[generate]", "generate.variants=[teacher]")
    drawing.append("model.sampling.num_inference_steps=2")
    number = NAMES.index("a red circle")
    for name, prompt in (("name", "a red circle"), ("number", number)):
        succeed(*drawing, f"name={name}", f"generate.prompt={prompt}")
    by_name, by_number = (next(tmp_path.glob(f"runs/{name}/images/*/teacher/00000.png")) for name in ("name", "number"))
    assert Image.open(by_name).tobytes() == Image.open(by_number).tobytes()
    outcome = ppcl(*drawing, "name=beyond", "generate.prompt=28")
    assert outcome.code == 2
    assert "'28' is no class of this model" in outcome.err
    assert not (tmp_path / "runs" / "beyond" / "images").exists()
