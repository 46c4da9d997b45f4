"""Pictures as one array in an .npz file, as the evaluator of ADM (guided-diffusion) reads them: `arr_0`, uint8 NHWC.

Files are written and read one picture at a time, since 50,000 pictures of 256x256 take 10 GB. Importing this loads no
torch.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ppcl.artifacts.files import atomic_path
from ppcl.errors import UsageError
from ppcl.pictures.opening import IMAGES, UnusablePictureError, open_picture

_ARRAY = "arr_0.npy"


def npz_command(arguments: Sequence[str]) -> str:
    """Write the pictures of a folder to a file, as `ppcl npz FOLDER OUT.npz` asks for, and return what was written.

    Raises `UsageError` for other arguments, and like `write_npz`.
    """
    if len(arguments) != 2:
        raise UsageError("npz takes a folder of pictures and the file to write: ppcl npz FOLDER OUT.npz.")
    folder, target = map(Path, arguments)
    if target.suffix != ".npz":
        raise UsageError(f"npz: {target} must end in .npz: ppcl npz FOLDER OUT.npz.")
    if target.exists():
        raise UsageError(f"npz: {target} exists: delete it, or name another file.")
    files = picture_files(folder, "npz: ")
    write_npz(files, target)
    return f"wrote {target} with {len(files)} pictures"


def picture_files(folder: Path, key: str) -> list[Path]:
    """Return the pictures in a folder, sorted by name. Raises `UsageError` if there is none; `key` starts it."""
    if not folder.is_dir():
        raise UsageError(f"{key}{folder} is no folder: name one that holds pictures.")
    files = sorted(path for path in folder.iterdir() if _is_picture(path))
    if not files:
        raise UsageError(f"{key}{folder} holds no picture ({', '.join(IMAGES)}): name the folder that they lie in.")
    return files


def _is_picture(path: Path) -> bool:
    """Return whether a file is a picture by its name, and not the overview of a set of pictures."""
    return path.suffix[1:].lower() in IMAGES and path.name != "grid.png" and not path.name.startswith(".")


def write_npz(files: Sequence[Path], target: Path) -> None:
    """Write pictures to an .npz file. Raises `UsageError` for one that does not decode or has another size."""
    size = _opened(files[0]).size
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), size[1], size[0], 3)}
    with (
        atomic_path(target) as temporary,
        zipfile.ZipFile(temporary, "w") as archive,
        archive.open(zipfile.ZipInfo(_ARRAY), "w", force_zip64=True) as array,
    ):
        np.lib.format.write_array_header_1_0(array, header)
        for file in files:
            picture = _opened(file)
            if picture.size != size:
                raise UsageError(
                    f"{file} has {picture.width}x{picture.height} pixels and {files[0]} {size[0]}x{size[1]}: an .npz "
                    "holds pictures of one size, so resize them first."
                )
            array.write(picture.tobytes())


def read_npz(path: Path, key: str) -> Iterator[Image.Image]:
    """Yield the pictures of an .npz file in RGB. Raises `UsageError` if it does not hold them; `key` starts it."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(_ARRAY) as array:
            version = np.lib.format.read_magic(array)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_columns, dtype = header(array)
            if by_columns or dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
                raise UsageError(
                    f"{key}{path} holds arr_0 of {dtype} and shape {list(shape)}: it must be pictures, uint8 [number, "
                    "height, width, 3]."
                )
            for _ in range(shape[0]):
                pixels = array.read(shape[1] * shape[2] * 3)
                yield Image.fromarray(np.frombuffer(pixels, np.uint8).reshape(shape[1:]))
    except UsageError:
        raise
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(
            f"{key}{path} does not read as an .npz with pictures in arr_0 ({error}): make it by ppcl npz FOLDER {path}."
        ) from None


def _opened(file: Path) -> Image.Image:
    try:
        return open_picture(file)
    except UnusablePictureError as error:
        raise UsageError(f"{file} cannot be used, as its picture {error}: leave it out.") from None
