"""The identity of a recording: everything that its calls depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ppcl.artifacts.headers import Header, fingerprint
from ppcl.config import Config
from ppcl.data.recording.table import read_rows
from ppcl.options import identity


def recording_header(config: Config, model: dict[str, Any], encoders: dict[str, Any]) -> Header:
    """Return the header of the recording of `data.path`: prompts, seed, and how the pipeline draws.

    `model`, `encoders`: the identities of the transformer, and of the VAE and the text encoders.
    """
    import diffusers
    import transformers

    rows = read_rows(Path(str(config.data.path)))
    return Header(
        "ppcl.recording",
        {
            "model": model,
            "encoders": encoders,
            "prompts": {"count": len(rows), "content": fingerprint({"rows": [row.identity for row in rows]})},
            "seed": config.seed,
            "sampling": identity(config.model.sampling),
            "record_steps": config.data.record_steps,
            "versions": [diffusers.__version__, transformers.__version__],
        },
    )
