"""The table of stages, in the order in which they run. Importing this loads no torch.

Each stage is the module of its name beside this file, with a function `run(run)`. A stage knows the artifacts it reads
and writes, never another stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Stage:
    """Declares one stage.

    `help`: its line in `ppcl --help`.
    `weights`: it needs the teacher's weights.
    `data`: it needs pictures with captions, cached or of the shapes world.
    `encoders`: it needs the VAE and the text encoders.
    `whole`: it needs the whole teacher in memory at once, which `model.streaming=true` rules out.
    `ranks`: how several ranks share it. They `train` together, they `divide` the work, or rank 0 (`first`) does it
    alone while the others wait.
    """

    help: str
    weights: bool = False
    data: bool = False
    encoders: bool = False
    whole: bool = False
    ranks: Literal["train", "divide", "first"] = "first"


STAGES = {
    "pretrain": Stage("train an embedded teacher from nothing (it is shipped; rarely needed)", whole=True),
    "cache": Stage(
        "encode pictures and captions (data=webdataset, folder); no encoder is loaded after that",
        weights=True,
        encoders=True,
        ranks="divide",
    ),
    "probe": Stage("fit one linear map per block and stream", weights=True, data=True),
    "detect": Stage("find runs of adjacent blocks that are nearly one linear map", weights=True, data=True),
    "boundaries": Stage(
        "write the teacher's activations at intervals, to distil without it (distill.from_boundaries=true)",
        weights=True,
        data=True,
    ),
    "depth": Stage(
        "distil one student block per run from the teacher's own activations", weights=True, data=True, ranks="train"
    ),
    "import_published": Stage(
        "read a model or a training checkpoint of the PPCL authors (published.path=DIR or FILE)", whole=True
    ),
    "width": Stage(
        "put linear projectors in the place of text streams and FFNs", weights=True, data=True, ranks="train"
    ),
    "plan": Stage("count what is left (no weights needed); with budget.params=0.6 or alike choose what to plug in"),
    "finetune": Stage(
        "tune all parameters of the pruned model on the teacher's output", weights=True, data=True, ranks="train"
    ),
    "export": Stage(
        "write the pruned pipeline as a folder that plain diffusers loads", weights=True, encoders=True, whole=True
    ),
    "quantize": Stage(
        "write the pruned pipeline with 8 or 4 bits a weight (quantize=int8, int4 or nf4)", weights=True, whole=True
    ),
    "remap_lora": Stage("write a LoRA of the full model anew for the pruned one (lora.path=FILE)"),
    "generate": Stage("draw every variant with the same prompts and seeds", weights=True, encoders=True, whole=True),
    "evaluate": Stage(
        "score the pictures; measure parameters, latency, memory", weights=True, encoders=True, whole=True
    ),
    "report": Stage("one HTML page, report.json and samples.png"),
}
TRAINED = tuple(name for name, stage in STAGES.items() if stage.ranks == "train")


def help_lines() -> str:
    """The stages as `ppcl --help` lists them, one a line."""
    return "\n".join(f"  {name:<17} {stage.help}" for name, stage in STAGES.items())
