"""Pictures on disk: their prompts, their folders, and what each variant's were made from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ppcl.artifacts.files import atomic_path
from ppcl.artifacts.headers import Header, fingerprint
from ppcl.config import Config
from ppcl.context import Run
from ppcl.options import identity
from ppcl.pictures.drawing import given_pictures
from ppcl.validation.outputs import has_own_prompts, read_prompts
from ppcl.variants.plugs import Plugs
from ppcl.variants.variants import Variant

# The benchmark that headers do not name, as they did not when there was no other.
_UNSAID = {"name": "shapes", "settings": {"images_per_prompt": 1}}


def prompts_of(run: Run) -> list[str]:
    """The prompt, the prompt file's lines, or the benchmark's prompts, each as often as it is to be drawn."""
    config = run.config.generate
    if config.prompt is not None:
        prompts = [config.prompt]
    elif config.prompt_file is not None:
        prompts = read_prompts(Path(config.prompt_file))
    else:
        return [prompt.text for prompt in run.prompts]
    return [prompt for prompt in prompts for _ in range(config.num_images)]


def image_folder(run: Run, variant: str) -> Path:
    """Where a variant's pictures lie; prompts of a file never mix with the benchmark's."""
    return run.folder / "images" / ("prompts" if has_own_prompts(run.config) else run.config.benchmark.name) / variant


def read_images(run: Run, variant: str) -> Iterator[Image.Image]:
    """A variant's pictures of the benchmark's prompts, one by one: all at once may not fit into memory."""
    return (read_image(run, variant, number) for number in range(len(run.prompts)))


def read_image(run: Run, variant: str, number: int) -> Image.Image:
    with Image.open(image_folder(run, variant) / f"{number:05d}.png") as image:
        return image.convert("RGB")


def given_to(run: Run, number: int) -> list[Image.Image]:
    """The PIL pictures given with prompt `number`."""
    if has_own_prompts(run.config):
        return [Image.open(path).convert("RGB") for path in run.config.generate.images]
    return given_pictures(run, run.prompts[number])


def save_image(image: Any, path: Path, text: str | None = None) -> None:
    """A PNG, with what it was made from in its chunk `ppcl`."""
    info = PngInfo()
    if text is not None:
        info.add_itxt("ppcl", text)
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def variant_header(run: Run, variant: Variant, plugs: Plugs, prompts: list[str]) -> Header:
    return Header(
        "ppcl.images",
        {
            "model": run.teacher.identity,
            "plugs": plugs.fingerprints([*variant.students, *variant.projectors]),
            "removed": variant.removed,
            "layout": asdict(run.layout) if variant.projectors else None,
            "finetuned": variant.finetuned,
            **({"quantized": variant.quantized} if variant.quantized else {}),
            "sampling": identity(run.config.model.sampling),
            "seed": run.config.seed,
            "batch_size": run.config.generate.batch_size,
            "prompts": {"count": len(prompts), "hash": fingerprint({"prompts": prompts} | _given(run))},
        }
        | ({} if has_own_prompts(run.config) else benchmark_header(run))
        | _put_on(run.config),
    )


def benchmark_header(run: Run) -> dict[str, Any]:
    """Return the benchmark's part of a header: what tells its pictures from those of another."""
    made_from = run.benchmark.made_from
    return {} if made_from == _UNSAID else {"benchmark": made_from}


def _put_on(config: Config) -> dict[str, Any]:
    """Return the LoRAs and the ControlNet, as a header holds them; nothing where there are none."""
    settings, made_from = config.generate, {}
    if settings.loras:
        files = {Path(path).name: _digest(path) for path in settings.loras}
        made_from["loras"] = {"files": files, "scale": settings.lora_scale, "source": config.lora.source}
    if settings.controlnet:
        image = _digest(str(settings.control_image))
        made_from["controlnet"] = {"path": settings.controlnet, "scale": settings.control_scale, "image": image}
    return made_from


def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def _given(run: Run) -> dict[str, Any]:
    """Return digests of the given pictures, where there are any."""
    if has_own_prompts(run.config):
        files = [_digest(path) for path in run.config.generate.images]
        return {"images": files} if files else {}
    return run.benchmark.given(run.prompts, run.config)
