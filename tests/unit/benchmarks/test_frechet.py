"""The Fréchet distance is that of the formula, in float64, and rises as pictures get worse."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from ppcl.benchmarks.base import Prompt, load_benchmark
from ppcl.config import Config, ModelConfig
from ppcl.data.worlds.shapes import make_scene, render
from ppcl.errors import UsageError
from ppcl.families.registry import get_family
from ppcl.pictures.arrays import write_npz
from ppcl.pictures.features import ShapesFeatures, load_features
from ppcl.pictures.inception import Inception, resized

RNG = np.random.default_rng(0)


class Given(nn.Module):
    """Features that are given in place of pictures."""

    num_features = 8

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def distance(first: np.ndarray, second: np.ndarray) -> float:
    metric = FrechetInceptionDistance(Given())
    metric.update(torch.from_numpy(first), real=True)
    metric.update(torch.from_numpy(second), real=False)
    return float(metric.compute())


def whitened(count: int, width: int) -> np.ndarray:
    """Samples with a mean of exactly 0 and exactly the identity as their covariance."""
    samples = RNG.normal(size=(count, width))
    samples -= samples.mean(axis=0)
    return samples @ np.linalg.inv(np.linalg.cholesky(np.cov(samples.T)).T)


def test_of_two_gaussians_it_is_the_closed_form() -> None:
    """Of diagonal covariances it is the sum of (m1 - m2)^2 + (s1 - s2)^2."""
    means, scales = RNG.normal(size=(2, 8)), RNG.uniform(0.5, 2, size=(2, 8))
    first, second = (whitened(500, 8) * scale + mean for mean, scale in zip(means, scales, strict=True))
    expected = ((means[0] - means[1]) ** 2 + (scales[0] - scales[1]) ** 2).sum()
    assert distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_it_is_that_of_a_matrix_root_in_float64() -> None:
    first, second = (RNG.normal(size=(400, 8)) @ RNG.normal(size=(8, 8)) + RNG.normal(size=8) for _ in range(2))
    root = sqrtm(np.cov(first.T) @ np.cov(second.T)).real
    expected = ((first.mean(axis=0) - second.mean(axis=0)) ** 2).sum()
    expected += np.trace(np.cov(first.T) + np.cov(second.T) - 2 * root)
    assert distance(first, second) == pytest.approx(expected, rel=1e-9)


def pictures(start: int, count: int = 200) -> list[Image.Image]:
    return [Image.fromarray(render(make_scene(9, start + number).objects)) for number in range(count)]


def noisy(given: list[Image.Image], strength: float) -> list[Image.Image]:
    arrays = (np.asarray(picture) + strength * RNG.normal(size=(32, 32, 3)) for picture in given)
    return [Image.fromarray(array.clip(0, 255).astype(np.uint8)) for array in arrays]


def test_worse_pictures_are_further_away() -> None:
    benchmark = load_benchmark("fid", {"num_images": 200})
    prompts = [Prompt("", fact=make_scene(9, 1000 + number)) for number in range(200)]
    found = [
        benchmark.score(prompts, noisy(pictures(0), 0)),
        benchmark.score(prompts, noisy(pictures(0), 20)),
        benchmark.score(prompts, noisy(pictures(0), 80)),
        benchmark.score(prompts, pictures(0, 2) * 100),  # two pictures, drawn again and again
    ]
    overall = [scores.overall for scores in found if scores is not None]
    assert overall[0] < overall[1] < overall[2]
    assert overall[3] > 10 * overall[0]


def defined_distance(given: list[Image.Image], others: list[Image.Image]) -> float:
    """The Fréchet distance by the definition, in float64, from the features of each picture."""
    network = load_features(None)

    def moments(images: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
        pixels = [torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] for image in images]
        features = torch.cat([network(each) for each in pixels]).double().numpy()
        return features.mean(axis=0), np.cov(features.T)

    (mean, covariance), (other_mean, other) = moments(given), moments(others)
    return ((mean - other_mean) ** 2).sum() + np.trace(covariance + other - 2 * sqrtm(covariance @ other).real)


@pytest.mark.parametrize("sizes", [1, 3])
def test_the_distance_is_that_of_the_features_in_float64(tmp_path: Path, sizes: int) -> None:
    """With a folder as reference, whose pictures may have several sizes."""
    given = pictures(0)
    others = [each.resize((32 + number % sizes, 32)) for number, each in enumerate(pictures(300, 120))]
    for number, picture in enumerate(others):
        picture.save(tmp_path / f"{number}.png")
    scores = load_benchmark("fid", {"reference": str(tmp_path)}).score([], given)
    assert scores is not None
    assert scores.overall == pytest.approx(defined_distance(given, others), rel=1e-3)


def test_an_npz_is_as_good_a_reference_as_its_folder(tmp_path: Path) -> None:
    given, others = pictures(0), pictures(300, 120)
    for number, picture in enumerate(others):
        picture.save(tmp_path / f"{number:03}.png")
    write_npz(sorted(tmp_path.iterdir()), tmp_path / "reference.npz")
    scores = load_benchmark("fid", {"reference": str(tmp_path / "reference.npz")}).score([], given)
    assert scores is not None
    assert scores.overall == pytest.approx(defined_distance(given, others), rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_images": 1}, "num_images=1 is too few"),
        ({"reference": "{folder}/none"}, "reference=\\S+none is no folder"),
        ({"reference": "{folder}"}, "holds no picture"),
        ({"reference": "{folder}/none.npz"}, "reference=\\S+none.npz does not read as an .npz"),
        ({"features": "{folder}/none.pth"}, "features=\\S+none.pth does not exist: fetch pt_inception-2015-12-05"),
    ],
)
def test_what_cannot_be_compared_is_refused_when_it_is_named(tmp_path: Path, settings: dict, said: str) -> None:
    filled = {
        key: value.format(folder=tmp_path) if isinstance(value, str) else value for key, value in settings.items()
    }
    with pytest.raises(UsageError, match=said):
        load_benchmark("fid", filled)


def test_the_weights_of_inception_are_loaded_by_their_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Inception().eval()
    state = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(state | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, tmp_path / "them.pth")
    batch = torch.randint(0, 256, (1, 3, 32, 40), dtype=torch.uint8)
    with torch.no_grad():
        found = load_features(str(tmp_path / "them.pth"))(batch)
        assert torch.equal(found, network(batch))
    assert found.shape == (1, 2048)
    state.pop("Mixed_6a.branch3x3.bn.bias")
    torch.save(state, tmp_path / "fewer.pth")
    with pytest.raises(
        UsageError, match=r"is not the Inception that FID is defined by, as Mixed_6a\.branch3x3\.bn\.bias"
    ):
        load_features(str(tmp_path / "fewer.pth"))


def test_pictures_are_resized_as_tensorflow_1_does() -> None:
    """Without antialiasing, and with the first pixel of both at one place."""
    row = torch.tensor([[[[0.0, 8.0, 16.0, 24.0]]]])
    assert resized(row, 2)[0, 0, 0].tolist() == [0, 16]
    assert resized(row, 8)[0, 0, 0].tolist() == [0, 4, 8, 12, 16, 20, 24, 24]


def test_features_do_not_depend_on_the_batch() -> None:
    network = ShapesFeatures().eval()
    batch = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(network(batch)[2:3], network(batch[2:3]))


def test_pictures_are_drawn_evenly_over_the_classes(tmp_path: Path) -> None:
    """Of a model that is no toy, which needs a reference and the features of Inception."""
    pictures(0, 1)[0].save(tmp_path / "0.png")
    (tmp_path / "weights.pth").touch()
    config = Config(model=ModelConfig(name="mine", family="dit", arch={"num_embeds_ada_norm": 10}))
    config.data.name = "none"
    given: dict[str, str | int] = {"num_images": 25}
    for key, value in (("reference", str(tmp_path)), ("features", str(tmp_path / "weights.pth"))):
        with pytest.raises(UsageError, match=f"{key}=null is for toy teachers, and model=mine is none"):
            load_benchmark("fid", given).prompts(get_family("dit", config.model.arch), config)
        given[key] = value
    found = load_benchmark("fid", given).prompts(get_family("dit", config.model.arch), config)
    assert Counter(Counter(prompt.text for prompt in found).values()) == {3: 5, 2: 5}
    with pytest.raises(UsageError, match="no captions to draw with data=none"):
        load_benchmark("fid", given).prompts(get_family("flux"), config)
