"""The base class of benchmarks, and the loading of one by its name. Importing this loads no torch.

To add a benchmark, write a module in this folder with one subclass of `Benchmark`, and `conf/benchmark/NAME.yaml` with
`name: NAME`, the module's name.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image

import ppcl.benchmarks
from ppcl.artifacts.scores import Scores
from ppcl.discovery import declared_class, module_names, parse_settings
from ppcl.errors import UsageError

if TYPE_CHECKING:
    from ppcl.config import Config
    from ppcl.families.base import Family


@dataclass(frozen=True)
class Prompt:
    """A prompt, with everything needed to draw its pictures and to score them.

    `category`: the category whose score its pictures count for, if any.
    `references`: the pictures that an edit model is given: PIL pictures, or uint8 arrays `[H, W, 3]`, which are
        enlarged to the size that the model draws.
    `fact`: any object that the benchmark's `score` needs.
    """

    text: str
    category: str | None = None
    references: Sequence[Image.Image | np.ndarray] = ()
    fact: Any = None


@dataclass(kw_only=True)
class Benchmark(ABC):
    """Provides prompts, and scores the pictures that are drawn from them.

    A subclass is a dataclass with keyword fields. Its fields are the keys of `benchmark.settings`.

    `label`: what the score means, for reports, tables and the model card.
    `bounds`: the worst and the best possible score, or None.
    `lower_is_better`: whether a lower score is better, as of a distance.
    `compares`: whether `evaluate` compares each picture with the teacher's, besides any score.
    `images_per_prompt`: how many pictures are drawn from each prompt.
    """

    label: ClassVar[str] = "mean score"
    bounds: ClassVar[tuple[float, float] | None] = (0.0, 1.0)
    lower_is_better: ClassVar[bool] = False
    compares: ClassVar[bool] = False

    images_per_prompt: int = 1

    @abstractmethod
    def prompts(self, family: Family, config: Config) -> list[Prompt]:
        """Return each prompt once, for models of this family, in the same order every time."""

    @abstractmethod
    def score(self, prompts: Sequence[Prompt], images: Iterable[Image.Image]) -> Scores | None:
        """Return the scores of RGB pictures, or None if this benchmark gives no score.

        `prompts`: the prompt of each picture. `images`: an iterable, since all pictures may not fit into memory.
        """

    def fulfils(self, prompt: Prompt, image: Image.Image) -> bool | None:
        """Return whether an RGB picture shows what its prompt asks for; None if single pictures are not judged."""
        return None

    def given(self, prompts: Sequence[Prompt], config: Config) -> dict[str, Any]:
        """Return a hash of the given pictures, for headers; empty if no prompt has any."""
        pixels = [np.asarray(picture) for prompt in prompts for picture in prompt.references]
        if not pixels:
            return {}
        digest = hashlib.sha256()
        for array in pixels:
            digest.update(f"{array.shape}{array.dtype}".encode() + array.tobytes())
        return {"references": digest.hexdigest()[:16]}

    @property
    def made_from(self) -> dict[str, Any]:
        """The benchmark's name and settings, for headers."""
        return {"name": type(self).__module__.rpartition(".")[2], "settings": asdict(self)}


def benchmark_names() -> tuple[str, ...]:
    """Return the names of all benchmarks, which are those of the modules here, without importing any."""
    return module_names(ppcl.benchmarks, {"base"})


def load_benchmark(name: str, settings: Mapping[str, Any]) -> Benchmark:
    """Return the benchmark `name` with `settings` as its fields.

    Raises `UsageError` if the module does not define one benchmark, or if a setting is unknown or invalid.
    """
    kind: type[Any] = declared_class(f"ppcl.benchmarks.{name}", Benchmark, f"benchmark.name={name}")
    benchmark: Benchmark = parse_settings(kind, settings, "benchmark.settings")
    if benchmark.images_per_prompt < 1:  # the one setting of every benchmark
        raise UsageError(f"benchmark.settings.images_per_prompt={benchmark.images_per_prompt} must be at least 1.")
    return benchmark
