"""The table of all stages, in the order in which they run. Importing this loads no torch.

Each stage is the module of its name in this folder, with a function `run(run)`. Stages communicate through the files
that they write into the run's folder and the cache. None of them imports another.

Terms that all stages use: a plug is a module that replaces part of the teacher. It is a student, which replaces the
blocks of an interval, or a projector, which replaces a text stream or an FFN. A variant is the teacher with some plugs.
A header lists everything that a file was made from, and a fingerprint is its hash. A file is reused if the fingerprint
is still the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Where a stage needs a part of the teacher: nowhere, in host memory to read or to save it, or on the device to run it.
Where = Literal["nowhere", "host", "device"]


@dataclass(frozen=True)
class Stage:
    """Describes one stage: its help line, what it needs, and how several ranks share it.

    `help`: the description in `ppcl --help`.
    `transformer`: where it needs the teacher's transformer.
    `encoders`: where it needs the VAE and the text encoders. Toy pictures are encoded when they are read, so with them
        a stage that reads data also runs the encoders.
    `data`: whether it reads pictures with captions, either cached ones or rendered toy pictures.
    `whole`: whether the whole teacher must be in memory at once, which `model.streaming=true` does not allow.
    `ranks`: how several ranks share the work. `train`: all ranks train together. `divide`: each rank does a part, with
        a whole teacher of its own. `first`: rank 0 does everything while the others wait.
    """

    help: str
    transformer: Where = "nowhere"
    encoders: Where = "nowhere"
    data: bool = False
    whole: bool = False
    ranks: Literal["train", "divide", "first"] = "first"

    @property
    def weights(self) -> bool:
        """Whether it needs the teacher's weights."""
        return (self.transformer, self.encoders) != ("nowhere", "nowhere")


STAGES = {
    "pretrain": Stage("train an embedded toy teacher from random weights (rarely needed: ppcl ships them)", whole=True),
    "cache": Stage(
        "encode pictures and captions once, or record calls of the pipeline (data=prompts), for all later stages",
        encoders="device",
        ranks="divide",
    ),
    "probe": Stage("fit one linear map per block and stream", transformer="device", data=True, ranks="divide"),
    "detect": Stage(
        "find intervals: groups of adjacent blocks that together are nearly linear",
        transformer="device",
        data=True,
        ranks="divide",
    ),
    "boundaries": Stage(
        "store the teacher's activations, to distil without the teacher (distill.from_boundaries=true)",
        transformer="device",
        data=True,
    ),
    "depth": Stage(
        "distil one student block per interval from the teacher's activations",
        transformer="device",
        data=True,
        ranks="train",
    ),
    "import_published": Stage(
        "convert a model or training checkpoint of the PPCL authors (published.path=DIR or FILE)", whole=True
    ),
    "width": Stage(
        "replace text streams and FFNs by linear projectors", transformer="device", data=True, ranks="train"
    ),
    "plan": Stage("count the parameters left (needs no weights); with a budget, choose students and projectors"),
    "finetune": Stage(
        "train all parameters of the pruned model on the teacher's output",
        transformer="device",
        data=True,
        ranks="train",
    ),
    "export": Stage(
        "write the pruned pipeline as a folder that plain diffusers loads",
        transformer="host",
        encoders="host",
        whole=True,
    ),
    "quantize": Stage(
        "write the pruned pipeline with 8-bit or 4-bit weights (quantize=int8, int4 or nf4)",
        transformer="host",
        encoders="host",
        whole=True,
    ),
    "remap_lora": Stage("convert a LoRA of the full model for the pruned model (lora.path=FILE)"),
    "generate": Stage(  # it moves one variant after another to the device
        "draw every variant with the same prompts and seeds",
        transformer="host",
        encoders="device",
        whole=True,
        ranks="divide",
    ),
    "evaluate": Stage(
        "score the pictures; measure parameters, latency, memory",
        transformer="device",
        encoders="device",
        whole=True,
        ranks="divide",
    ),
    "report": Stage("write an HTML page, report.json and samples.png"),
}
TRAINED = tuple(name for name, stage in STAGES.items() if stage.ranks == "train")


def help_lines() -> str:
    """Return the names and descriptions of all stages as `ppcl --help` prints them, one stage a line."""
    return "\n".join(f"  {name:<17} {stage.help}" for name, stage in STAGES.items())
