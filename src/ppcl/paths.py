"""Locations of the package's own files, and how `model.path` is read. Importing this loads no torch."""

from __future__ import annotations

import json
from pathlib import Path

EMBEDDED = "embedded:"
ASSETS = Path(__file__).parent / "assets"

# The autoencoder of all toy teachers. A pipeline with it draws toy pictures.
_TOY_VAE = "AutoencoderPixelUnshuffle"


def conf_dir() -> Path:
    """Return the folder `conf/`: the one in the installed package, or the one beside `src/` in a checkout."""
    installed = Path(__file__).parent / "conf"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "conf"


def local_folder(path: str) -> Path:
    """Return `path` as a path; for `embedded:NAME`, the folder of that teacher in the package."""
    return ASSETS / path.removeprefix(EMBEDDED) if path.startswith(EMBEDDED) else Path(path)


def is_single_file(path: str | None) -> bool:
    """Return whether `model.path` names one file with a transformer in it, not a pipeline."""
    return path is not None and path.endswith(".safetensors")


def is_toy_folder(folder: Path) -> bool:
    """Return whether a pipeline folder holds a toy model, which is recognised by its autoencoder."""
    try:
        vae = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["vae"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return isinstance(vae, list) and vae[-1:] == [_TOY_VAE]
