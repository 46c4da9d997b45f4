"""Places of the package's own files, and how a model's path is read. Importing this loads no torch."""

from __future__ import annotations

import json
from pathlib import Path

EMBEDDED = "embedded:"
ASSETS = Path(__file__).parent / "assets"

# The autoencoder of the shapes world: a pipeline that has it draws toy pictures.
_TOY_VAE = "AutoencoderPixelUnshuffle"


def conf_dir() -> Path:
    """`conf/`: inside an installed package, or beside `src/` in a checkout."""
    installed = Path(__file__).parent / "conf"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "conf"


def local_folder(path: str) -> Path:
    """A path, or the folder of the shipped teacher that `embedded:<name>` names."""
    return ASSETS / path.removeprefix(EMBEDDED) if path.startswith(EMBEDDED) else Path(path)


def is_toy_folder(folder: Path) -> bool:
    """Whether a pipeline folder holds a model of the shapes world, as its autoencoder shows."""
    try:
        vae = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["vae"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return isinstance(vae, list) and vae[-1:] == [_TOY_VAE]
