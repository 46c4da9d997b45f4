"""Locations of the package's own files, and how `model.path` is read. Importing this loads no torch."""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path
from typing import Any

from ppcl.artifacts.files import parse_json
from ppcl.errors import UsageError

EMBEDDED = "embedded:"
ASSETS = Path(__file__).parent / "assets"

# The autoencoder of all toy teachers. A pipeline with it draws toy pictures.
_TOY_VAE = "AutoencoderPixelUnshuffle"

_LONGEST_JOB = 100  # characters in the name of a job's folder
_LONGEST = 200  # bytes in the name of a folder; file systems take 255, and temporary names are longer


def conf_dir() -> Path:
    """Return the folder `conf/`: the one in the installed package, or the one beside `src/` in a checkout."""
    installed = Path(__file__).parent / "conf"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "conf"


def local_folder(path: str) -> Path:
    """Return `path` as a path; for `embedded:NAME`, the folder of that teacher in the package."""
    return ASSETS / path.removeprefix(EMBEDDED) if path.startswith(EMBEDDED) else Path(path)


def is_single_file(path: str | None) -> bool:
    """Return whether `model.path` names one file with a transformer in it, not a pipeline."""
    return path is not None and path.endswith((".safetensors", ".pt"))


def is_toy_folder(folder: Path) -> bool:
    """Return whether a pipeline folder holds a toy model, which is recognised by its autoencoder."""
    try:
        vae = parse_json((folder / "model_index.json").read_text(encoding="utf-8"))["vae"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return isinstance(vae, list) and vae[-1:] == [_TOY_VAE]


def job_folder(overrides: str) -> str:
    """Return the name of the folder of a sweep's job, given what sets it apart, such as `budget.params=0.5,seed=1`.

    A name that would be too long, or has brackets, slashes or the like, is shortened or cleaned, and ends in a hash, so
    that different jobs have different folders. Without overrides the job has the sweep's own folder.
    """
    if not overrides:
        return "."
    name = re.sub(r"[^A-Za-z0-9_.=,+-]+", "-", overrides).replace("=-", "=")
    if name == overrides and len(name) <= _LONGEST_JOB:
        return name
    return f"{name[: _LONGEST_JOB - 7].rstrip('-,=')}-{sha256(overrides.encode()).hexdigest()[:6]}"


def check_name(key: str, value: str) -> None:
    """Raise `UsageError` unless `value` can name a folder that is made at once.

    `key`: `name`, for a folder within `paths.runs_dir`, or else that key or another of `paths`.
    """
    shown = f"{key}={value}" if value.isprintable() else f"{key}={value!r}"
    if not value or not value.isprintable():
        raise UsageError(f"{shown} is no name of a folder: write some letters and digits, such as {key}=first.")
    if any(len(part.encode()) > _LONGEST for part in value.split("/")):
        raise UsageError(f"{key}={value[:20]}.. has {len(value)} characters, too many for a folder: shorten it.")
    if value.startswith("~"):
        raise UsageError(f"{shown} is taken as it is written: write $HOME for your home folder.")
    if key == "name" and (value.startswith("/") or not {"", ".", ".."}.isdisjoint(value.split("/"))):
        raise UsageError(
            f"{shown} is not within the folder of runs: write a name such as name=first, or name=mine/first, and set "
            "paths.runs_dir=FOLDER to keep runs elsewhere."
        )


def check_folder(raw: Any) -> None:
    """Raise `UsageError` if a new run's folder would not lie in `paths.runs_dir`, or would lie in the cache.

    `raw`: the composed configuration.
    """
    if raw.run is not None:
        return
    check_name("name", str(raw.name))
    cache, folder = Path(str(raw.paths.cache_dir)), Path(str(raw.paths.runs_dir)) / str(raw.name)
    if folder.absolute().is_relative_to(cache.absolute()):
        raise UsageError(f"name={raw.name} is the folder of the cache, {cache}: choose another name.")
