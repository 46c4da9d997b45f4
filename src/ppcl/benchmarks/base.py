"""The base class of benchmarks, and how one is found by its name. Importing this loads no torch.

A benchmark takes two files: a module beside this one with one class of `Benchmark`, and `conf/benchmark/NAME.yaml`
with `name: NAME`, the module's name.
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
    """A prompt, with all that its pictures are drawn from and judged by.

    `references` are what an edit model is given: PIL pictures as they are, or uint8 arrays `[H, W, 3]`, which are
    enlarged to the size that the model draws, a cell for each pixel. `fact` is whatever the score needs to know.
    """

    text: str
    category: str | None = None
    references: Sequence[Image.Image | np.ndarray] = ()
    fact: Any = None


@dataclass(kw_only=True)
class Benchmark(ABC):
    """Prompts, and a score of the pictures drawn from them.

    A benchmark is a dataclass of keywords: its fields are its settings, `benchmark.settings` in the configuration.

    `label` says in the report, in the model card and in tables what the score is. `bounds` are the worst and the best
    score; None where there are no such.
    """

    label: ClassVar[str] = "mean score"
    bounds: ClassVar[tuple[float, float] | None] = (0.0, 1.0)

    images_per_prompt: int = 1

    @abstractmethod
    def prompts(self, family: Family, config: Config) -> list[Prompt]:
        """The prompts for models of a family, each once, in an order that stays."""

    @abstractmethod
    def score(self, prompts: Sequence[Prompt], images: Iterable[Image.Image]) -> Scores | None:
        """Score RGB pictures, which are read one by one; `prompts` has the prompt of each of them.

        None where pictures have no score of their own and are compared with the teacher's alone.
        """

    def fulfils(self, prompt: Prompt, image: Image.Image) -> bool | None:
        """Whether an RGB picture shows what its prompt asks for; None where single pictures are not judged."""
        return None

    def given(self, prompts: Sequence[Prompt], config: Config) -> dict[str, Any]:
        """Return a digest of the given pictures, as a header holds it; nothing where none are given."""
        pixels = [np.asarray(picture) for prompt in prompts for picture in prompt.references]
        if not pixels:
            return {}
        digest = hashlib.sha256()
        for array in pixels:
            digest.update(f"{array.shape}{array.dtype}".encode() + array.tobytes())
        return {"references": digest.hexdigest()[:16]}

    @property
    def made_from(self) -> dict[str, Any]:
        """Name and settings, as a header holds them."""
        return {"name": type(self).__module__.rpartition(".")[2], "settings": asdict(self)}


def benchmark_names() -> tuple[str, ...]:
    """Every benchmark there is, by its file; none is imported."""
    return module_names(ppcl.benchmarks, {"base"})


def load_benchmark(name: str, settings: Mapping[str, Any]) -> Benchmark:
    """The benchmark of that name with `settings` for its fields; `UsageError` for those it does not have."""
    kind: type[Any] = declared_class(f"ppcl.benchmarks.{name}", Benchmark, f"benchmark.name={name}")
    benchmark: Benchmark = parse_settings(kind, settings, "benchmark.settings")
    if benchmark.images_per_prompt < 1:  # the one setting that all benchmarks have
        raise UsageError(f"benchmark.settings.images_per_prompt={benchmark.images_per_prompt} must be at least 1.")
    return benchmark
