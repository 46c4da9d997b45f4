"""The benchmark without a score: pictures of the user's own prompts, or of captions of held-out data.

`fidelity` draws the same pictures and compares them one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ppcl.benchmarks.base import Benchmark, Prompt
from ppcl.data.recording.table import Row, is_table, read_rows
from ppcl.errors import UsageError
from ppcl.pictures.opening import open_picture, picture_digest
from ppcl.validation.outputs import has_own_prompts
from ppcl.validation.prompts import OwnPrompt, read_prompts

if TYPE_CHECKING:
    from ppcl.config import Config
    from ppcl.families.base import Family

NUM_CAPTIONS = 8
_MOST_SCENES = 1000  # scenes to search for distinct captions, of which there may be fewer than wanted


@dataclass(kw_only=True)
class Unscored(Benchmark):
    """Uses `generate.prompt` or `generate.prompt_file`, or the first eight distinct captions of held-out data."""

    label = "no score"
    bounds = None

    def prompts(self, family: Family, config: Config) -> list[Prompt]:
        """Return the prompts; raises `UsageError` if there are neither prompts nor captions."""
        generate = config.generate
        if has_own_prompts(config):
            file, given = generate.prompt_file, [open_picture(path) for path in generate.images]
            own = [OwnPrompt(str(generate.prompt))] if file is None else read_prompts(Path(file))
            return [Prompt(prompt.text, references=given, fact=prompt) for prompt in own]
        if config.data.name == "shapes":
            scenes = (
                family.world.make_scene(config.data.calibration_seed, number, categories=family.categories)
                for number in range(_MOST_SCENES)
            )
            return _distinct(Prompt(scene.caption, references=scene.references) for scene in scenes)
        prompts = _distinct(_held_out(family, config))
        if not prompts:
            raise UsageError(
                f"data={config.data.name} has no held-out captions to draw: give generate.prompt_file=FILE, with a "
                "prompt a line."
            )
        return prompts

    def score(self, prompts: Sequence[Prompt], images: Iterable[Image.Image]) -> None:
        return None

    def given(self, prompts: Sequence[Prompt], config: Config) -> dict[str, Any]:
        """Return hashes of the files in `generate.images`, or of the rows of a table, if there are any."""
        if not has_own_prompts(config):
            rows = [prompt.fact.identity for prompt in prompts if isinstance(prompt.fact, Row)]
            return super().given(prompts, config) | ({"rows": rows} if rows else {})
        files = [picture_digest(path) for path in config.generate.images]
        return {"images": files} if files else {}


def _distinct(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Return the first `NUM_CAPTIONS` prompts with different texts."""
    seen: set[str] = set()
    new = (prompt for prompt in prompts if not (prompt.text in seen or seen.add(prompt.text)))  # type: ignore[func-returns-value]
    return list(islice(new, NUM_CAPTIONS))


def _held_out(family: Family, config: Config) -> Iterator[Prompt]:
    """Yield the held-out captions as prompts, those of a table of a pipeline's arguments with their rows."""
    captions, path = held_out_captions(family, config), config.data.path
    if config.data.name == "prompts" and path is not None and is_table(path):
        kept = {*captions}
        yield from (Prompt(row.caption, fact=row) for row in read_rows(Path(path)) if row.caption in kept)
    else:
        yield from map(Prompt, captions)


def held_out_captions(family: Family, config: Config) -> Iterator[str]:
    """Yield the captions of the held-out samples of a cache, or the held-out prompts, in a fixed order.

    Caches from before captions were stored have none.
    """
    import torch

    from ppcl.data.cached import held_out_keys, read_parts
    from ppcl.data.recording.training import RecordedData, data_of
    from ppcl.teacher_model import TeacherModel

    data = data_of(config, TeacherModel(config, family, torch.device("cpu")))
    if isinstance(data, RecordedData):
        yield from data.held_out_prompts()
        return
    samples = [item for _, items in read_parts(data.cache_folder) for item in items]
    held_out = held_out_keys([item["key"] for item in samples], data.held_out)
    yield from (item["caption"] for item in samples if item["key"] in held_out and item.get("caption"))
