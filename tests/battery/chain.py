"""A tiny run that goes through every stage, with a copy of its folders as they were before each of them."""

from __future__ import annotations

import io
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import webdataset as wds
from PIL import Image
from safetensors.torch import load_file

from ppcl.data.worlds import shapes
from ppcl.families.qwen_image.tiny import build_pipeline
from tests.forks import run_forked

# Every stage that makes something of its own, and what it takes beside the settings of all.
STAGES: dict[str, list[str]] = {
    "cache": [],
    "probe": [],
    "detect": [],
    "boundaries": [],
    "depth": [],
    "width": [],
    "plan": ["budget.params=0.8"],
    "finetune": ["budget.params=0.8"],
    "export": ["budget.params=0.8"],
    "quantize": ["budget.params=0.8", "quantize=int8"],
    "generate": ["budget.params=0.8", "generate.variants=[teacher,ppcl-depth,ppcl-finetuned]"],
    "evaluate": ["budget.params=0.8", "generate.variants=[teacher,ppcl-depth,ppcl-finetuned]"],
    "report": ["budget.params=0.8", "generate.variants=[teacher,ppcl-depth,ppcl-finetuned]"],
}
SIZES = [
    "model=auto", "model.sampling.num_inference_steps=2", "model.sampling.height=32", "model.sampling.width=32",
    "probe.num_batches=2", "probe.num_heldout_batches=1", "probe.batch_size=4", "method.min_cka=0",
    "method.num_samples=4", "method.num_timesteps=2", "method.batch_size=4", "distill=tiny", "distill.steps=6",
    "distill.batch_size=4", "distill.checkpoint_every=2", "width=auto", "width.steps=4", "width.num_batches=1",
    "width.num_ffn=2", "finetune=tiny", "finetune.steps=6", "finetune.batch_size=4", "finetune.checkpoint_every=2",
    "data.samples_per_file=8", "data.held_out=0.3", "budget.num_batches=1", "benchmark.latency_repeats=1",
    "generate.prompt_file=PROMPTS", "generate.batch_size=2", "trainer=cpu", "trainer.num_threads=1",
    "trainer.progress=false", "logger=none", "name=run",
]  # fmt: skip
PICTURES = 24
TIMED = ("latency_ratio", "crc32")  # of a choice: a duration, and the checksum over it


@dataclass
class Chain:
    """A teacher, its data, and the folders of an undisturbed run.

    `before[stage]`: a copy of the folders as they were before that stage. `after`: as they were at the end.
    """

    folder: Path
    before: dict[str, Path] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def command(self, stage: str, place: Path) -> list[str]:
        """Return the settings of the command that runs this stage in a copy of the folders at `place`."""
        given = [f"model.path={self.folder}/teacher", f"data.path={self.folder}/shards"]
        settings = [setting.replace("PROMPTS", f"{self.folder}/prompts.txt") for setting in SIZES]
        folders = [f"paths.runs_dir={place}/runs", f"paths.cache_dir={place}/cache"]
        return [*settings, *given, *folders, *STAGES[stage], f"stages=[{stage}]"]

    @property
    def after(self) -> Path:
        return self.folder / "after"


def build(folder: Path) -> Chain:
    """Make the teacher and its data, and run every stage, each in a process of its own."""
    torch.set_num_threads(1)
    chain = Chain(folder)
    build_pipeline(0, 6).save_pretrained(folder / "teacher")
    (folder / "shards").mkdir()
    (folder / "prompts.txt").write_text("a photo of a red circle\na photo of two blue squares\na photo of a cross\n")
    for shard in range(2):
        with wds.TarWriter(str(folder / "shards" / f"{shard}.tar")) as writer:
            for number in range(shard, PICTURES, 2):
                scene, buffer = shapes.make_scene(7, number), io.BytesIO()
                Image.fromarray(shapes.render(scene.objects)).save(buffer, format="PNG")
                facts = json.dumps({"prompt_en": scene.caption}).encode()
                writer.write({"__key__": f"{number:04d}", "png": buffer.getvalue(), "json": facts})
    place = folder / "after"
    place.mkdir()
    for stage in STAGES:
        chain.before[stage] = folder / f"before-{stage}"
        shutil.copytree(place, chain.before[stage])
        start = time.perf_counter()
        ended = run_forked(chain.command(stage, place), folder)
        chain.seconds[stage] = time.perf_counter() - start
        if ended.code:
            raise RuntimeError(f"{stage} ended with {ended.code}: {ended.err}")
    shutil.copytree(place, folder / "before-end")
    return chain


def results(place: Path) -> dict[str, object]:
    """Return what a run has made, by path: tensors, pictures and lists of prompts, without times and settings."""
    found: dict[str, object] = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if not path.is_file() or path.name.startswith("."):
            continue
        if path.suffix == ".safetensors":
            found |= {f"{name}/{key}": value for key, value in load_file(path).items()}
        elif path.suffix in (".png", ".jsonl", ".tar"):
            found[name] = path.read_bytes()
        elif path.parent.name == "plan" and path.name in ("plan.json", "choice.json", "width.json"):
            content = json.loads(path.read_text())
            found[name] = {key: value for key, value in content.items() if key not in TIMED}
    return found


def differences(found: dict[str, object], expected: dict[str, object]) -> list[str]:
    """Return the names of results that are missing, too many or not the same bits."""

    def same(left: object, right: object) -> bool:
        if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
            return left.dtype == right.dtype and torch.equal(left, right)
        return left == right

    names = {*found} ^ {*expected}
    return sorted(names | {name for name in {*found} & {*expected} if not same(found[name], expected[name])})
