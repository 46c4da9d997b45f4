"""Pictures on disk: their folders, their prompts, and the headers that say what they were made from.

A picture may stand for a video or a sound, which lies beside it under the same name.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ppcl.artifacts.files import again, atomic_path, read_json
from ppcl.artifacts.folders import check_files
from ppcl.artifacts.headers import Header, is_current
from ppcl.context import Run
from ppcl.errors import UsageError
from ppcl.pictures.drawing import given_pictures
from ppcl.pictures.outputs import Drawn
from ppcl.pictures.sets import benchmark_settings, claim_variant, claimed_set, variant_folder
from ppcl.pictures.sounds import write_sound
from ppcl.pictures.videos import cut, lacks_encoder, write_video
from ppcl.variants.plugs import Plugs
from ppcl.variants.variants import Variant, variants_of

TEACHER_SHARE = "teacher_share"  # in the text of a picture
FRAMES = "frames"  # in that of a video's sheet: their number


@dataclass(frozen=True)
class Drawing:
    """The pictures of one variant: the folder that they belong in, and the header of what they are made from."""

    variant: Variant
    folder: Path
    header: Header

    @property
    def is_complete(self) -> bool:
        """Whether the folder has all pictures, made from exactly this; raises `UsageError` if from something else."""
        numbers = range(self.header.made_from["prompts"]["count"])
        return is_current(
            self.folder / "manifest.json", self.header, None, [picture_path(self.folder, number) for number in numbers]
        ) and all((self.folder / name).exists() for name in self._listed)

    @property
    def _listed(self) -> list[str]:
        """The files that the manifest lists; none in folders of earlier versions."""
        return list(read_json(self.folder / "manifest.json", "The record", "generate").get("files", {}))

    def check(self) -> None:
        """Raise `UsageError` for a file of complete pictures that has changed since it was written."""
        record = read_json(self.folder / "manifest.json", "The record", "generate")
        check_files(self.folder, record, again("generate"))

    def lacks(self, numbers: Sequence[int]) -> bool:
        """Return whether the batch of pictures `numbers` lacks one, or latents, a video or a sound that is listed."""
        paths = [picture_path(self.folder, number) for number in numbers]
        if (self.folder / "manifest.json").exists():
            stems = {path.stem for path in paths}
            paths += [self.folder / name for name in self._listed if Path(name).stem in stems]
        return not all(path.exists() for path in paths)


def drawings(run: Run, variants: list[Variant], plugs: Plugs) -> list[Drawing]:
    """Return folder and header for each variant's pictures, and store the folders in `run.image_folders`."""
    found = []
    for variant in variants:
        header = variant_header(run, variant, plugs)
        folder = variant_folder(run.set_folder / variant.name, header)
        run.image_folders[variant.name] = folder
        found.append(Drawing(variant, folder, header))
    return found


def claim(run: Run, drawing: Drawing) -> Path:
    """Return the folder to draw the pictures into, which no command that draws something else uses from now on.

    Usually it is `drawing.folder`. It is another one if such a command has begun to draw there in the meantime. It is
    also stored in `run.image_folders`.
    """
    name = drawing.variant.name
    with claimed_set(run.folder / "images", run.config, run.set_settings) as folder:
        run.image_folders[name] = claim_variant(folder / name, drawing.header)
    return run.image_folders[name]


def picture_path(folder: Path, number: int) -> Path:
    """Return the file of picture `number` in the folder of a variant's pictures."""
    return folder / f"{number:05d}.png"


def prompts_of(run: Run) -> list[str]:
    """Return the text of each picture's prompt."""
    return [prompt.text for prompt in run.prompts]


def image_folder(run: Run, variant: str) -> Path:
    """Return the folder of a variant's pictures."""
    if variant not in run.image_folders:
        drawings(run, *variants_of(run, [variant]))
    return run.image_folders[variant]


def read_images(run: Run, variant: str) -> Iterator[Image.Image]:
    """Return a variant's RGB pictures one by one, since a whole set may not fit into memory."""
    return (read_image(run, variant, number) for number in range(len(run.prompts)))


def read_image(run: Run, variant: str, number: int) -> Image.Image:
    """Return picture `number` of a variant, in RGB."""
    return read_picture(picture_path(image_folder(run, variant), number))


def read_picture(path: Path) -> Image.Image:
    """Return a picture that a variant has drawn, in RGB; `UsageError` if it is missing or damaged."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist: run 'stages=[generate]' again.") from None
    except (OSError, SyntaxError, ValueError, zlib.error):  # what PIL raises for a damaged PNG
        raise UsageError(f"{path} is damaged: {again('generate')}.") from None


def given_to(run: Run, number: int) -> list[Image.Image]:
    """Return the PIL pictures that are given with prompt `number`."""
    return given_pictures(run, run.prompts[number])


def save_image(image: Any, path: Path, text: str | None = None) -> None:
    """Write a PNG. `text`: what the picture was made from, stored in its iTXt chunk `ppcl`."""
    info = PngInfo()
    if text is not None:
        info.add_itxt("ppcl", text)
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def save_drawn(drawn: Drawn, path: Path, text: Mapping[str, Any]) -> None:
    """Write the picture of what was drawn to `path`, and before it, as .mp4 and .wav beside it, a video and its sound.

    Files that exist stay as they are. `text`: what it was made from. Without an encoder no .mp4 is written.
    """
    if drawn.sound is not None and not path.with_suffix(".wav").exists():
        write_sound(path.with_suffix(".wav"), drawn.sound, drawn.sampling_rate)
    if drawn.frames and not path.with_suffix(".mp4").exists() and lacks_encoder() is None:
        write_video(path.with_suffix(".mp4"), drawn.frames, drawn.frame_rate)
    if not path.exists():
        counted = {FRAMES: len(drawn.frames)} if drawn.frames else {}
        save_image(drawn.picture, path, json.dumps(dict(text) | counted))


def read_frames(run: Run, variant: str, number: int) -> list[Image.Image]:
    """Return the frames of video `number` of a variant, in RGB; of a picture or a sound, its one picture."""
    sheet = read_image(run, variant, number)
    return cut(sheet, told_by(picture_path(image_folder(run, variant), number)).get(FRAMES, 1))


def told_by(path: Path) -> dict[str, Any]:
    """Return what a picture that `save_image` wrote says that it was made from; empty if it says nothing."""
    with Image.open(path) as image:
        text = image.info.get("ppcl")
    return json.loads(text) if text else {}


def teacher_share(run: Run, variant: str) -> float:
    """Return the share of denoising steps that the teacher ran for a variant's pictures, with `generate.teacher_above`.

    All pictures of a set have the same steps. Raises `UsageError` if the first picture does not tell.
    """
    path = picture_path(image_folder(run, variant), 0)
    share = told_by(path).get(TEACHER_SHARE)
    if share is None:
        raise UsageError(f"{path} does not say which steps the teacher ran: delete its folder and draw it again.")
    return float(share)


def save_prompts(run: Run, folder: Path) -> None:
    """Write `prompts.jsonl`, with file name, prompt and seed of each picture."""
    lines = (
        json.dumps({"image": f"{number:05d}.png", "prompt": prompt, "seed": run.config.seed + number})
        for number, prompt in enumerate(prompts_of(run))
    )
    with atomic_path(folder / "prompts.jsonl") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def variant_header(run: Run, variant: Variant, plugs: Plugs) -> Header:
    """Return the header of a variant's pictures: the model that draws them, and the settings of the set."""
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
    """Return what a header says about the benchmark, by which pictures of two benchmarks differ."""
    return benchmark_settings(run.config, run.benchmark)
