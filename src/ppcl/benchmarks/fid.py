"""The Fréchet distance between pictures and reference pictures; with the features of Inception, this is FID.

Both sets are taken for samples of two Gaussians in the space of a network's features. The distance is
|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of their means and covariances (Heusel et al., arXiv 1706.08500).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ppcl.artifacts.scores import Scores
from ppcl.benchmarks.base import Benchmark, Prompt
from ppcl.benchmarks.none import held_out_captions
from ppcl.data.worlds.shapes import render
from ppcl.errors import UsageError
from ppcl.pictures.arrays import picture_files, read_npz
from ppcl.pictures.opening import UnusablePictureError, open_picture
from ppcl.validation.model import is_toy

if TYPE_CHECKING:
    from ppcl.config import Config
    from ppcl.families.base import Family

_KEY = "benchmark.settings"
_AT_ONCE = 50  # pictures that go through the network together


@dataclass(kw_only=True)
class Frechet(Benchmark):
    """Draws `num_images` pictures, evenly over the model's classes, categories or captions, and compares them.

    `reference`: a folder of pictures, or an .npz with pictures in `arr_0`. None: rendered pictures of the toy world.
    `features`: the file with the weights of Inception. None: a network that knows the toy world alone.
    """

    label = "Fréchet distance of the pictures from reference pictures"
    bounds = None
    lower_is_better = True

    num_images: int = 1000
    reference: str | None = None
    features: str | None = None

    def __post_init__(self) -> None:
        if self.num_images < 2:
            raise UsageError(f"{_KEY}.num_images={self.num_images} is too few for a covariance: give some thousands.")
        if self.features is not None and not Path(self.features).is_file():
            raise UsageError(
                f"{_KEY}.features={self.features} does not exist: fetch pt_inception-2015-12-05-6726825d.pth, which "
                "pytorch-fid publishes."
            )
        if self.reference is not None and Path(self.reference).suffix != ".npz":
            picture_files(Path(self.reference), f"{_KEY}.reference=")
        elif self.reference is not None:
            next(read_npz(Path(self.reference), f"{_KEY}.reference="), None)

    def prompts(self, family: Family, config: Config) -> list[Prompt]:
        """Return the prompts; raises `UsageError` if the settings do not suit the model, or if it has no prompts."""
        toy = is_toy(config.model)
        for key in ("reference", "features"):
            if getattr(self, key) is None and not toy:
                raise UsageError(
                    f"{_KEY}.{key}=null is for toy teachers, and model={config.model.name} is none: name "
                    f"{'a folder of pictures or an .npz' if key == 'reference' else 'the weights of Inception'}."
                )
        count = -(-self.num_images // self.images_per_prompt)
        if toy:
            return [_toy_prompt(family, config.data.eval_seed, number, count) for number in range(count)]
        texts = [str(number) for number in range(family.num_classes)]
        if not texts and config.data.stored:
            texts = list(dict.fromkeys(held_out_captions(family, config)))
        if not texts:
            raise UsageError(
                f"benchmark=fid has no captions to draw with data={config.data.name}: give data.path=FOLDER, pictures "
                "with captions, and run 'stages=[cache]'."
            )
        return [Prompt(text) for text in islice(cycle(texts), count)]

    def score(self, prompts: Sequence[Prompt], images: Iterable[Image.Image]) -> Scores:
        import torch
        from torchmetrics.image.fid import FrechetInceptionDistance

        from ppcl.pictures.features import load_features, to_batch

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # It resizes nothing, since the network does that, not antialiased, as FID is defined.
        metric = FrechetInceptionDistance(load_features(self.features)).to(device)
        for pictures, real in ((self._references(prompts), True), (images, False)):
            left = iter(pictures)
            while batch := sorted(islice(left, _AT_ONCE), key=_size):
                for _, alike in groupby(batch, _size):  # references may have any sizes
                    metric.update(to_batch(list(alike), device), real=real)
        if metric.real_features_num_samples < 2:
            raise UsageError(f"{_KEY}.reference={self.reference} holds one picture alone: give thousands.")
        return Scores({}, float(metric.compute()))

    def _references(self, prompts: Sequence[Prompt]) -> Iterator[Image.Image]:
        """Yield the reference pictures one by one."""
        if self.reference is None:
            yield from (Image.fromarray(render(prompt.fact.objects)) for prompt in prompts)
        elif Path(self.reference).suffix == ".npz":
            yield from read_npz(Path(self.reference), f"{_KEY}.reference=")
        else:
            for file in picture_files(Path(self.reference), f"{_KEY}.reference="):
                try:
                    yield open_picture(file)
                except UnusablePictureError as error:
                    raise UsageError(f"{_KEY}.reference={file} cannot be used, as its picture {error}.") from None


def _size(picture: Image.Image) -> tuple[int, int]:
    return picture.size


def _toy_prompt(family: Family, seed: int, number: int, count: int) -> Prompt:
    """Return prompt `number` of `count`, whose category is the next one each time, with another scene as reference."""
    category = family.categories[number % len(family.categories)]
    scene, other = (family.world.make_scene(seed, index, category) for index in (number, count + number))
    return Prompt(scene.caption, category, scene.references, other)
