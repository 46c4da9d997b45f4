"""Sample pictures that were drawn during a training: `training/samples/STAGE-FINGERPRINT/` in a run's folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from PIL import Image

from ppcl.artifacts.files import atomic_path, read_json, write_json
from ppcl.artifacts.headers import Header
from ppcl.errors import UsageError

_RECORD = "samples.json"
_FOLDER = Path("training") / "samples"


@dataclass(frozen=True)
class Samples:
    """The record of a folder of sample pictures: for each prompt one of the teacher, and one after each of `steps`.

    `parts`: the names of what is trained. `seeds`: of the noise that each prompt's pictures start from.
    `num_steps`: steps of the whole training. `picture_steps`: denoising steps of each picture.
    """

    parts: Sequence[str]
    prompts: Sequence[str]
    seeds: Sequence[int]
    num_steps: int
    picture_steps: int
    steps: Sequence[int] = ()

    def until(self, step: int) -> Samples:
        """Return the record of what was drawn up to `step`."""
        return replace(self, steps=[known for known in self.steps if known <= step])

    def then(self, step: int) -> Samples:
        """Return the record with one more set of pictures."""
        return replace(self, steps=[*self.until(step - 1).steps, step])

    def save(self, folder: Path) -> None:
        """Write the record, after the pictures that it names."""
        write_json(folder / _RECORD, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Samples | None:
        """Return the record in a folder; None if there is none. Raises `UsageError` if it is damaged."""
        path = folder / _RECORD
        if not path.exists():
            return None
        content = read_json(path, "The record of sample pictures", "report")
        try:
            found = cls(**{key: content[key] for key in cls.__dataclass_fields__})
            lists = (found.parts, found.prompts, found.seeds, found.steps)
            whole = (found.num_steps, found.picture_steps, *found.seeds, *found.steps)
            if not all(isinstance(each, list) for each in lists) or not all(isinstance(each, int) for each in whole):
                raise TypeError(lists)
            return found
        except (KeyError, TypeError):
            raise UsageError(f"{path} is not the record of sample pictures: delete {folder}.") from None


def samples_folder(folder: Path, stage: str, header: Header) -> Path:
    """Return the folder with the pictures of a training, in the folder of its run."""
    return folder / _FOLDER / f"{stage}-{header.fingerprint[:8]}"


def sample_path(folder: Path, number: int, step: int | None) -> Path:
    """Return the file of prompt `number`, drawn by the pruned model after `step`, or by the teacher for None."""
    return folder / (f"teacher-{number}.png" if step is None else f"{step:06d}-{number}.png")


def save_sample(picture: Image.Image, path: Path) -> None:
    """Write a picture as PNG."""
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")


def load_sample(path: Path) -> Image.Image:
    """Return a picture that was drawn; `UsageError` if it is missing or damaged."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError):
        raise UsageError(f"{path} is missing or damaged: delete {path.parent}.") from None


def load_samples(folder: Path) -> dict[str, list[tuple[Path, Samples]]]:
    """Return folder and record of the trainings in a run's folder that drew pictures, by stage."""
    found: dict[str, list[tuple[Path, Samples]]] = {}
    for path in sorted((folder / _FOLDER).glob("*-*")):
        record = Samples.load(path)
        if record is not None and record.steps:
            found.setdefault(path.name.rpartition("-")[0], []).append((path, record))
    return found


def forget_samples(folder: Path, parts: Sequence[str]) -> None:
    """Delete `folder`, and those of earlier trainings of the same stage that trained one of `parts`."""
    stage = folder.name.rpartition("-")[0]
    for path in folder.parent.glob(f"{stage}-*"):
        try:
            record = Samples.load(path)
        except UsageError:  # it is damaged, and nobody can say of what it is
            record = None
        if record is None or {*record.parts} & {*parts} or path == folder:
            shutil.rmtree(path)
