"""Pictures on disk: their prompts, their folders, and what each variant's were made from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ppcl.artifacts.files import atomic_path
from ppcl.artifacts.headers import Header, is_current
from ppcl.context import Run
from ppcl.pictures.drawing import given_pictures
from ppcl.pictures.sets import benchmark_settings, variant_folder
from ppcl.variants.plugs import Plugs
from ppcl.variants.variants import Variant, variants_of


@dataclass(frozen=True)
class Drawing:
    """The pictures of one variant: their folder, and the header of what they are made from."""

    variant: Variant
    folder: Path
    header: Header

    @property
    def is_complete(self) -> bool:
        return is_current(self.folder / "manifest.json", self.header)


def drawings(run: Run, variants: list[Variant], plugs: Plugs) -> list[Drawing]:
    """Return where the pictures of these variants lie, or are to lie; their folders are kept for `image_folder`."""
    found = []
    for variant in variants:
        header = variant_header(run, variant, plugs)
        folder = variant_folder(run.set_folder / variant.name, header)
        run.image_folders[variant.name] = folder
        found.append(Drawing(variant, folder, header))
    return found


def prompts_of(run: Run) -> list[str]:
    """The prompt of each picture: of the user's prompts, or the benchmark's."""
    return [prompt.text for prompt in run.prompts]


def image_folder(run: Run, variant: str) -> Path:
    """Where a variant's pictures lie."""
    if variant not in run.image_folders:
        drawings(run, *variants_of(run, [variant]))
    return run.image_folders[variant]


def read_images(run: Run, variant: str) -> Iterator[Image.Image]:
    """A variant's pictures, one by one: all at once may not fit into memory."""
    return (read_image(run, variant, number) for number in range(len(run.prompts)))


def read_image(run: Run, variant: str, number: int) -> Image.Image:
    with Image.open(image_folder(run, variant) / f"{number:05d}.png") as image:
        return image.convert("RGB")


def given_to(run: Run, number: int) -> list[Image.Image]:
    """The PIL pictures given with prompt `number`."""
    return given_pictures(run, run.prompts[number])


def save_image(image: Any, path: Path, text: str | None = None) -> None:
    """A PNG, with what it was made from in its chunk `ppcl`."""
    info = PngInfo()
    if text is not None:
        info.add_itxt("ppcl", text)
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def save_prompts(run: Run, folder: Path) -> None:
    """Write `prompts.jsonl`: each picture's file, prompt and seed."""
    lines = (
        json.dumps({"image": f"{number:05d}.png", "prompt": prompt, "seed": run.config.seed + number})
        for number, prompt in enumerate(prompts_of(run))
    )
    with atomic_path(folder / "prompts.jsonl") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def variant_header(run: Run, variant: Variant, plugs: Plugs) -> Header:
    """Header of a variant's pictures: the model that draws them, and what all variants of the set share."""
    return Header(
        "ppcl.images",
        {
            "model": run.teacher.identity,
            "plugs": plugs.fingerprints([*variant.students, *variant.projectors]),
            "removed": variant.removed,
            "layout": asdict(run.layout) if variant.projectors else None,
            "finetuned": variant.finetuned,
            **({"quantized": variant.quantized} if variant.quantized else {}),
            **run.set_settings,
        },
    )


def benchmark_header(run: Run) -> dict[str, Any]:
    """Return the benchmark's part of a header: what tells its pictures from those of another."""
    return benchmark_settings(run.config, run.benchmark)
