"""The memory plan: what each stage of a command needs on the device, in host memory and on disk, and how long it takes.

Device memory follows from dry runs of the real modules (`ppcl.memory.dry`) and from the sizes of weights, gradients and
optimiser states. Hours are an order of magnitude: floating-point operations at `FLOPS`, and what streaming reads at
`DISK`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import ceil

import psutil
import torch
from rich.table import Table

from ppcl.artifacts.plan import Intervals, Width
from ppcl.context import Run
from ppcl.distill.groups import divided, select_intervals
from ppcl.distill.local import MOST_ABREAST
from ppcl.errors import UsageError
from ppcl.launch import launched, rank, shard_ranks
from ppcl.memory import dry
from ppcl.ops.least_squares import COPIES
from ppcl.report.text import in_bytes
from ppcl.surgery.count import count_parameters
from ppcl.validation.model import model_folder
from ppcl.validation.pruning import resolve_width

FLOPS = 2e14  # a second, in bfloat16: half of what an H100 reaches at best
DISK = 2.5e9  # bytes a second of an NVMe disk
RESERVED = 0.8e9  # of the device, by CUDA and its libraries
SLACK = 1.05  # fragmentation of the allocator
# What to turn if a stage needs too much, by stage.
KEYS = {
    "cache": "data.encode_batch_size",
    "probe": "probe.num_batches or probe.batch_size, or model.streaming=true",
    "detect": "method.batch_size, or model.streaming=true",
    "boundaries": "distill.batch_size, or model.streaming=true",
    "depth": "distill.groups=auto, distill.accumulate, distill.optimizer_states=8bit, or model.streaming=true",
    "width": "distill.accumulate, distill.optimizer_states=8bit or width.num_batches, or model.streaming=true",
    "finetune": "finetune.lora_rank, finetune.accumulate, finetune.optimizer_states=8bit, or strategy=fsdp",
    "quantize": "quantize.batch_size, or trainer.accelerator=cpu",
    "generate": "generate.batch_size, or generate.offload=model or group",
    "evaluate": "generate.variants, or trainer.accelerator=cpu",
}
LARGE = 1_000_000_000  # parameters; smaller models are not checked, since that takes seconds


@dataclass
class Need:
    """The needs of one stage: bytes on the device by what they hold, bytes that it writes to disk, and hours."""

    stage: str
    device: dict[str, float]
    disk: float = 0.0
    hours: float | None = None

    @property
    def total(self) -> float:
        """Bytes on the device in all."""
        return sum(self.device.values())


@dataclass
class Plan:
    """Estimates what the stages of a run need, from its configuration alone.

    Each method that is named after a stage returns its `Need`. `ranks`: the number of processes that share the work.
    `shards`: how many of them share the shards of a model.
    """

    run: Run
    ranks: int = field(default_factory=lambda: rank()[1])

    def __post_init__(self) -> None:
        run = self.run
        self._depth_peaks: dict[int, int] = {}
        self.block = dry.block_params(run)
        self.itemsize = run.teacher.dtype.itemsize
        self.teacher_params = count_parameters(run.family, run.config.model.arch, {})["teacher"]
        self.sharded = run.config.strategy.kind == "fsdp"
        self.share = self.ranks if run.config.strategy.kind != "single" else 1
        self.shards = min(self.ranks, shard_ranks(run.config.strategy.shard_over)) if launched() else self.ranks

    # Parts that several stages share.

    @property
    def intervals(self) -> Intervals:
        """The intervals that are known; else three of every five blocks are assumed to be one."""
        if self.run.has_intervals:
            return self.run.intervals
        return {stack: [(u, u + 2) for u in range(1, count - 3, 5)] for stack, count in self.run.num_layers.items()}

    @property
    def width(self) -> Width:
        """The width sets that are known; none while `width=auto` has selected nothing."""
        run = self.run
        given = resolve_width(run.config)
        return (run.width if run.width_path.exists() else {}) if given is None else given

    @property
    def students(self) -> dict[str, int]:
        """The number of students, by stack."""
        return {stack: len(pairs) for stack, pairs in self.intervals.items() if pairs}

    @property
    def trained(self) -> Intervals:
        """The intervals that `distill.intervals` names, if they are known; raises `UsageError` for a wrong name."""
        names = self.run.config.distill.intervals if self.run.has_intervals else None
        return select_intervals(self.intervals, names)

    def teacher(self, *, sharded: bool = False) -> dict[str, float]:
        """Return the bytes of the teacher's weights on the device."""
        whole, largest = self.teacher_params * self.itemsize, max(self.block.values()) * self.itemsize
        if self.run.config.model.streaming:
            outside = (self.teacher_params - self._inside) * self.itemsize
            return {"two blocks of the teacher": 2 * largest + outside}
        if sharded:
            return {"teacher, sharded": whole / self.shards + 2 * largest}
        return {"teacher": whole}

    def _of_rank(self, count: int, parts: int) -> int:
        """Return how many of a step's `count` samples a rank passes at once, if it divides its own by `parts`."""
        return max(1, count // self.share // parts)

    def _abreast(self, parts: int, count: int) -> dict[str, float]:
        """Return the bytes of the streams of a step's other parts, of `count` samples, which wait at a streamed block.

        Each has those that entered the interval, and those that come from the block.
        """
        others = min(parts, MOST_ABREAST) - 1
        if not others or not self.run.config.model.streaming:
            return {}
        return {"streams of the other parts": 2.0 * others * dry.stream_bytes(self.run, count)}

    def _hours(self, steps: float, flops: float, reads: float = 0) -> float:
        """Return the hours of `steps` steps of `flops` operations that read the streamed teacher `reads` times each."""
        seconds = flops / FLOPS / self.share
        if self.run.config.model.streaming:
            seconds = max(seconds, reads * self.teacher_params * self.itemsize / DISK)
        return steps * seconds / 3600

    def _tokens(self, count: int) -> int:
        """Return the number of tokens, of image and text, of so many samples."""
        return dry.stream_bytes(self.run, count) // (self._side * self.itemsize)

    # Stages.

    def cache(self) -> Need:
        batch = self.run.config.data.encode_batch_size
        vae, encoding, _ = dry.vae_peaks(self.run, batch)
        parts = {"VAE": vae, "text encoders": self._encoders(), "encoding": encoding}
        return Need("cache", parts)

    def probe(self) -> Need:
        config = self.run.config.probe
        batches = sum(-(-count // self.share) for count in (config.num_batches, config.num_heldout_batches))
        parts = self.teacher() | {
            "streams of all batches": batches * dry.stream_bytes(self.run, config.batch_size),
            "forward or statistics": max(dry.forward_peak(self.run, config.batch_size), self._statistics()),
            "normal equations": self._equations(2),
        }
        samples = (config.num_batches + config.num_heldout_batches) * config.batch_size
        flops = 2 * self.teacher_params * self._tokens(samples)
        return Need("probe", parts, hours=self._hours(1, flops, 1))

    def depth(self, groups: int | None = None) -> Need:
        """Return the need of depth distillation. `groups`: into how many the intervals are divided."""
        run, config = self.run, self.run.config.distill
        groups = groups or self.groups()
        sizes = [
            {stack: self.block[stack] * len(pairs) for stack, pairs in group.items()}
            for group in divided(self.trained, groups)
        ]
        if not sizes:
            return Need("depth", {})
        count = self._of_rank(config.batch_size, config.accumulate)
        params = max(sizes, key=lambda size: sum(size.values()))
        divisor = self.shards if self.sharded else 1
        peak = self._depth_peak(count)
        parts = {} if config.from_boundaries else self.teacher(sharded=self.sharded)
        parts |= {
            "students": 4 * sum(params.values()) / divisor,
            "states": dry.optimizer_bytes(run, config, params) / divisor,
            "activations and a gradient": peak,
        }
        if config.accumulate > 1:
            parts["other gradients"] = 4 * (sum(params.values()) - max(self.block[s] for s in params)) / divisor
        parts |= self._abreast(config.accumulate, count)
        tokens = self._tokens(config.batch_size)
        learning = 8 * sum(sum(size.values()) for size in sizes)
        flops = (2 * self.teacher_params * groups + learning) * tokens
        saved = (4 * sum(params.values()) + parts["states"] * divisor) * 2
        reads = groups * ceil(config.accumulate / MOST_ABREAST)
        return Need("depth", parts, saved, self._hours(config.steps, flops, reads))

    def width_stage(self) -> Need:
        """Return the need of the stage `width`. What it replaces in one stack stands for all."""
        run, config = self.run, self.run.config.distill
        count = self._of_rank(config.batch_size, config.accumulate)
        sets = {stack: [kind for kind in ("text", "ffn") if found[kind]] for stack, found in self.width.items()}
        if not any(sets.values()):
            sets = {next(iter(run.num_layers)): ["ffn"]}
        stack, kinds = next((stack, kinds) for stack, kinds in sets.items() if kinds)
        number = sum(len(found[kind]) for found in self.width.values() for kind in ("text", "ffn"))
        number = number or run.config.width.num_ffn
        projector = 2 * self._side**2  # an input and an output projector, or one for each stream
        states = dry.matrix_states(config, self._side, self._side)
        parts = self.teacher(sharded=self.sharded) | {
            "students": self.itemsize * sum(self.block[s] * n for s, n in self.students.items()),
            "projectors and states": (4 + states) * projector * number,
            "normal equations": self._equations(2 * number),
            "activations and a gradient": dry.width_peak(run, config, stack, kinds, count),
        }
        parts |= self._abreast(config.accumulate, count)
        flops = 4 * self.teacher_params * self._tokens(config.batch_size)
        hours = self._hours(run.config.width.steps, flops, ceil(config.accumulate / MOST_ABREAST))
        return Need("width", parts, hours=hours)

    def finetune(self) -> Need:
        """Return the need of fine-tuning with every student and projector that is known."""
        run, config = self.run, self.run.config.finetune
        count = self._of_rank(config.batch_size, config.accumulate)
        left = {s: n - sum(v - u for u, v in self.intervals.get(s, [])) for s, n in run.num_layers.items()}
        counts = count_parameters(run.family, run.config.model.arch, self.intervals, self.width, run.layout)
        student = counts["student"]
        divisor = self.shards if self.sharded else 1
        streamed = bool(config.lora_rank) and run.config.model.streaming
        if streamed:
            config = replace(config, gradient_checkpointing=True)
        peak: float = dry.finetune_peak(run, config, left, count)
        parts = self.teacher(sharded=self.sharded)
        if config.lora_rank:
            kept = sum(self.block[s] * (n - len(self.intervals.get(s, []))) for s, n in left.items())
            if config.recorded and not streamed:  # there is no teacher to share weights with
                parts["frozen weights"] = self.itemsize * student
            else:
                parts["weights that the teacher lacks"] = self.itemsize * max(0, student - kept) / divisor
            states = dry.matrix_states(config, config.lora_rank, self._side)
            trained = self._lora_params(left)
            copied = self.itemsize * student if self.sharded else 4 * trained  # shards are copied whole
            parts["LoRA and states"] = (4 + states) * trained / divisor
        else:
            inside = {s: self.block[s] * n for s, n in left.items()}
            shrunk = student / (sum(inside.values()) + self.teacher_params - self._inside)  # by projectors
            states, copied = dry.optimizer_bytes(run, config, inside, self.teacher_params - self._inside), 4 * student
            parts |= {"student": 4 * student / divisor, "states": states * shrunk / divisor}
            if divisor > 1:
                peak -= 4 * student * (1 - 1 / divisor)  # gradients are sharded
                parts["gathered blocks"] = 2 * 4 * max(self.block.values())
        if config.ema_decay:
            parts["mean of weights"] = copied / divisor
        parts["activations and gradients"] = peak
        saved = 2 * divisor * (parts["LoRA and states"] if config.lora_rank else parts["student"] + parts["states"])
        if config.recorded:
            recording = self.teacher() | {"forward": dry.forward_peak(run, count)}
            if not streamed:
                parts = {name: size for name, size in parts.items() if name not in self.teacher()}
            if sum(recording.values()) > sum(parts.values()):
                parts = {f"{name}, while its velocities are written": size for name, size in recording.items()}
        flops = (2 * self.teacher_params + 8 * student) * self._tokens(config.batch_size)
        reads = config.accumulate * ((not config.recorded) + (2 * kept / self._inside if streamed else 0))
        return Need("finetune", parts, saved, self._hours(config.steps, flops, reads))

    def generate(self) -> Need:
        run, count = self.run, self.run.config.generate.batch_size
        vae, _, decoding = dry.vae_peaks(run, count)
        parts = {
            "transformer": float(self.teacher_params * self.itemsize),
            "VAE": vae,
            "text encoders": self._encoders(),
        }
        if run.config.generate.offload == "model":
            parts = {"largest of the models": max(parts.values())}
        elif run.config.generate.offload == "group":
            parts = {"two blocks": 2.0 * max(self.block.values()) * self.itemsize}
        parts["forward or decoding"] = max(dry.forward_peak(run, count), decoding)
        return Need("generate", parts)

    def evaluate(self) -> Need:
        students = self.itemsize * sum(self.block[s] * n for s, n in self.students.items())
        run, variants = self.run, self.run.config.generate.variants
        parts = self.teacher() | {"students": students, "forward": dry.forward_peak(run, 1)}
        if variants is None or {"ppcl-finetuned", "ppcl-quantized"} & {*variants}:
            counts = count_parameters(run.family, run.config.model.arch, self.intervals, self.width, run.layout)
            parts["tuned model"] = self.itemsize * counts["student"]
        return Need("evaluate", parts)

    # Sizes.

    def _depth_peak(self, count: int) -> int:
        """Return the peak bytes of a step of depth distillation beside weights and states, measured once."""
        if count not in self._depth_peaks:
            config = self.run.config.distill
            stacks = [stack for stack, pairs in self.trained.items() if pairs]
            self._depth_peaks[count] = dry.depth_peak(self.run, config, stacks, count)
        return self._depth_peaks[count]

    @property
    def _side(self) -> int:
        """The channels of a token."""
        arch = self.run.config.model.arch
        return arch["num_attention_heads"] * arch["attention_head_dim"]

    @property
    def _inside(self) -> int:
        """The parameters of all blocks."""
        return sum(self.block[stack] * count for stack, count in self.run.num_layers.items())

    def _equations(self, number: int) -> float:
        """Return the bytes of so many normal equations in float64."""
        return 8.0 * number * (self._side + 1) * (2 * self._side + 1)

    def _statistics(self) -> float:
        """Return the bytes of what is added to normal equations at once: rows and changes, in float32 and float64."""
        rows = min(self._tokens(self.run.config.probe.batch_size), COPIES // (16 * self._side))
        return self._side * (32.0 * rows + 8 * self._side)

    def _encoders(self) -> float:
        """Return the bytes of the text encoders, without a local folder those of the published model."""
        folder = model_folder(self.run.config.model)
        if folder is None:
            return 1e9 * self.run.family.facts.encoder_gb
        return float(sum(file.stat().st_size for file in folder.glob("text_encoder*/*.safetensors")))

    def _lora_params(self, left: Mapping[str, int]) -> int:
        """Return the parameters of a LoRA on all linear layers of so many blocks, by stack."""
        rank_, total = self.run.config.finetune.lora_rank, 0
        with torch.device("meta"):
            model = dry.model_of(self.run, dict.fromkeys(self.run.num_layers, 1))
        for (stack, _), block in self.run.family.blocks(model).items():
            sizes = [sum(m.weight.shape) for m in block.modules() if isinstance(m, torch.nn.Linear)]
            total += rank_ * sum(sizes) * left[stack]
        return total

    def groups(self) -> int:
        """Return into how many groups depth distillation divides the intervals: for `auto` as few as fit."""
        asked = self.run.config.distill.groups
        if asked != "auto":
            return int(asked)
        most = max(1, sum(map(len, self.trained.values())))
        return next((n for n in range(1, most) if fits(self.depth(n).total, capacity(self.run))), most)


STAGES: dict[str, Callable[[Plan], Need]] = {
    "cache": Plan.cache,
    "probe": Plan.probe,
    "depth": Plan.depth,
    "width": Plan.width_stage,
    "finetune": Plan.finetune,
    "generate": Plan.generate,
    "evaluate": Plan.evaluate,
}


def capacity(run: Run) -> float:
    """Return the bytes of the run's device in all, or those that `trainer.memory_gb` says."""
    if run.config.trainer.memory_gb is not None:
        return 1e9 * run.config.trainer.memory_gb
    if run.device.type == "cuda":
        return torch.cuda.get_device_properties(run.device).total_memory
    return psutil.virtual_memory().total


def fits(needed: float, room: float) -> bool:
    """Return whether `needed` bytes fit on a device of `room` bytes."""
    return needed * SLACK + RESERVED <= room


def needs(run: Run) -> list[Need]:
    """Return what the stages of a command need, for those that run the model."""
    if not STAGES.keys() & {*run.config.stages}:
        return []
    plan = Plan(run)
    return [estimate(plan) for stage, estimate in STAGES.items() if stage in run.config.stages]


def explain(run: Run) -> None:
    """Print a table of what each stage of the command needs."""
    room = capacity(run)
    table = Table("stage", "on the device", "of that", "writes", "hours", title=f"{run.config.model.name}: estimates")
    found = needs(run)
    for need in found:
        parts = sorted(need.device.items(), key=lambda item: -item[1])
        told = ", ".join(f"{name} {in_bytes(size)}" for name, size in parts if size >= 0.005 * need.total)
        size = in_bytes(need.total) + ("" if fits(need.total, room) else " (too much)")
        hours = "" if need.hours is None else f"{need.hours:.1f}"
        table.add_row(need.stage, size, told, in_bytes(need.disk) if need.disk else "", hours)
    run.console.print(table)
    for need in found:
        if not fits(need.total, room):
            run.say("explain", f"{need.stage} does not fit: turn {KEYS[need.stage]}")
    others = [stage for stage in run.config.stages if stage not in STAGES]
    if others:
        run.say("explain", f"{', '.join(others)}: not estimated")
    if {"depth", "width", "finetune", "evaluate"} & {*run.config.stages} and not run.has_intervals:
        run.say("explain", "intervals are not known yet: it is assumed that three of every five blocks become one")
    run.say(
        "explain",
        f"the device has {in_bytes(room)}; needed are also {in_bytes(RESERVED)} for its libraries and "
        f"{SLACK - 1:.0%} for fragmentation. Hours: at {FLOPS:.0e} operations and {in_bytes(DISK)} read a second",
    )


def check_memory(run: Run) -> None:
    """Raise `UsageError` if a stage of the command needs more than the device has. Small models are not checked."""
    if not run.config.trainer.check_memory or not STAGES.keys() & {*run.config.stages} or not _is_large(run):
        return
    room = capacity(run)
    for need in needs(run):
        if not fits(need.total, room):
            parts = sorted(need.device.items(), key=lambda item: -item[1])[:3]
            told = ", ".join(f"{name} {in_bytes(size)}" for name, size in parts)
            keys = KEYS[need.stage]
            if run.config.strategy.kind == "fsdp" and shard_ranks(run.config.strategy.shard_over) < rank()[1]:
                keys += ", or strategy.shard_over=all"
            raise UsageError(
                f"'stages=[{need.stage}]' needs about {in_bytes(need.total)} on {run.device}, which has "
                f"{in_bytes(room)} ({told}): turn {keys}; explain=true prints all figures, and "
                "trainer.check_memory=false tries it."
            )


@contextmanager
def in_memory(run: Run, stage: str) -> Iterator[None]:
    """Turn a lack of memory on the device within the context into a `UsageError` that says what to turn."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|not enough memory", str(error)):
            raise
        raise UsageError(
            f"'stages=[{stage}]' ran out of memory on {run.device}: turn {KEYS.get(stage, 'to a larger device')}; "
            "explain=true prints what each stage needs. Nothing is lost: the same command continues."
        ) from error


def _is_large(run: Run) -> bool:
    return count_parameters(run.family, run.config.model.arch, {})["teacher"] >= LARGE
