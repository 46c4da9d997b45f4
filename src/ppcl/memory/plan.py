"""The memory plan: what each stage of a command needs on the device, in host memory and on disk, and how long it takes.

Device memory follows from dry runs of the real modules (`ppcl.memory.dry`) and from the sizes of weights, gradients and
optimiser states. Hours are an order of magnitude: floating-point operations at `FLOPS`, and what streaming reads at
`DISK`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import ceil

from ppcl.artifacts.model_files import component_files
from ppcl.artifacts.plan import Intervals, Width
from ppcl.components import other_bytes
from ppcl.context import Run
from ppcl.data.batches import batch_numbers
from ppcl.data.boundaries import STEPS_PER_SHARD
from ppcl.distill.boundaries import held_out_steps, num_stored
from ppcl.distill.frozen import num_before
from ppcl.distill.groups import divided, select_intervals
from ppcl.distill.targets import STEPS_PER_FILE
from ppcl.launch import launched, rank, shard_ranks
from ppcl.memory import dry
from ppcl.memory.dry_detection import detect_peak
from ppcl.memory.need import Need, capacity, fits
from ppcl.methods.registry import load_method
from ppcl.streaming import MOST_ABREAST
from ppcl.surgery.count import count_parameters
from ppcl.validation.model import model_folder
from ppcl.validation.pruning import resolve_width
from ppcl.variants.planner import num_measured

FLOPS = 2e14  # a second, in bfloat16: half of what an H100 reaches at best
DISK = 2.5e9  # bytes a second of an NVMe disk
TUNED = ("ppcl-finetuned", "ppcl-quantized")  # variants with weights of their own


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
        config = self.run.config.data
        if config.name == "prompts":
            parts = self.teacher() | {"text encoders": self._encoders()} | self._others()
            return Need("cache", parts | {"forward": dry.forward_peak(self.run, 1)})
        vae, encoding, _ = dry.vae_peaks(self.run, config.encode_batch_size)
        parts = {"VAE": vae, "text encoders": self._encoders(), "encoding": encoding}
        return Need("cache", parts, host={"samples of a file": config.samples_per_file * dry.sample_bytes(self.run, 1)})

    def probe(self) -> Need:
        config = self.run.config.probe
        batches = sum(-(-count // self.share) for count in (config.num_batches, config.num_heldout_batches))
        samples = (config.num_batches + config.num_heldout_batches) * config.batch_size
        parts = self.teacher() | {"streams of all batches, and equations": dry.probe_peak(self.run, config, batches)}
        flops = 2 * self.teacher_params * self._tokens(samples)
        trained = 4 * self._probes() if config.train_steps else 0.0  # with gradients and Adam's states
        return Need("probe", parts, self._probes(), self._hours(1, flops, 1), {"probes": trained})

    def detect(self) -> Need:
        """Return the need of detection, which takes the calibration in parts that fit."""
        run, config, teacher = self.run, self.run.config.method, self.teacher()
        free = max(0.0, capacity(run) - sum(teacher.values()))
        method = load_method(config)
        passes = method.passes(run.family, run.num_layers)
        flops = passes * 2 * self.teacher_params * self._tokens(config.num_samples * config.num_timesteps)
        reads = 1 if passes == 1 else passes * method.num_batches
        if config.rule == "tinyfusion":
            trained = config.settings.get("steps", 0) * config.settings.get("batch_size", 0)
            flops += 6 * self.teacher_params * self._tokens(trained)
        parts = teacher | {"streams and similarities": detect_peak(run, config, free)}
        host = {"probes": self._probes()} if method.needs_probes else {}
        return Need("detect", parts, hours=self._hours(1, flops, reads), host=host)

    def boundaries(self) -> Need:
        run, config = self.run, self.run.config.distill
        steps = num_stored(run) + len(held_out_steps(run))
        streams = dry.stream_bytes(run, config.batch_size)
        parts = self.teacher() | {"streams of a shard": dry.boundaries_peak(run, config)}
        count = sum(self.students.values())
        shared = sum(u == v + 1 for pairs in self.intervals.values() for (_, v), (u, _) in pairwise(pairs))
        flops = 2 * self.teacher_params * self._tokens(config.batch_size)
        return Need(
            "boundaries",
            parts,
            disk=streams * steps * (2 * count - shared) + self._student_bytes(),
            hours=self._hours(steps, flops) + self._hours(steps / STEPS_PER_SHARD, 0, 1),
            host={"a shard": 2.0 * streams * STEPS_PER_SHARD},
        )

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
        note = f"depth trains its students in {groups} groups, one after another" if groups > 1 else ""
        return Need("depth", parts, saved, self._hours(config.steps, flops, reads), note=note)

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
            "students": self._student_bytes(),
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
        before, frozen = self._before_removal(left), 0.0
        peak: float = dry.finetune_peak(run, config, left, count, before)
        parts = self.teacher(sharded=self.sharded)
        if config.lora_rank:
            kept = sum(self.block[s] * (n - len(self.intervals.get(s, []))) for s, n in left.items())
            if config.recorded and not streamed:  # there is no teacher to share weights with
                parts["frozen weights"] = self.itemsize * student
            else:
                parts["weights that the teacher lacks"] = self.itemsize * max(0, student - kept) / divisor
            states = dry.matrix_states(config, config.lora_rank, self._side)
            trained = dry.lora_params(run, left)
            copied = self.itemsize * student if self.sharded else 4 * trained  # shards are copied whole
            parts["LoRA and states"] = (4 + states) * trained / divisor
        else:
            whole = sum(self.block[s] * n for s, n in left.items()) + self.teacher_params - self._inside
            inside = {s: self.block[s] * (n - (before or {}).get(s, 0)) for s, n in left.items()}
            outside = self.teacher_params - self._inside - (dry.embedder_params(run) if before else 0)
            shrunk = student / whole  # by projectors
            trained = round(shrunk * (sum(inside.values()) + outside))
            frozen = student - trained
            copied = 4 * trained + (self.itemsize * frozen if self.sharded else 0)  # shards are copied whole
            states = dry.optimizer_bytes(run, config, inside, outside) * shrunk
            parts |= {"student": 4 * trained / divisor, "states": states / divisor}
            parts |= {"frozen weights": self.itemsize * frozen / divisor} if frozen else {}
            if divisor > 1:
                peak -= 4 * trained * (1 - 1 / divisor)  # gradients are sharded
                parts["gathered blocks"] = 2 * 4 * max(self.block.values())
        if config.ema_decay:
            parts["mean of weights"] = copied / divisor
        parts["activations and gradients"] = peak
        stored = ("LoRA and states",) if config.lora_rank else ("student", "states", "frozen weights")
        saved = 2 * divisor * sum(parts.get(name, 0.0) for name in stored)
        if config.recorded:
            recording = self.recording()
            if not streamed:
                parts = {name: size for name, size in parts.items() if name not in self.teacher()}
            if recording.total > sum(parts.values()):
                parts = {f"{name}, while its velocities are written": size for name, size in recording.device.items()}
            saved += recording.disk
        flops = (2 * self.teacher_params + 8 * student - 6 * frozen) * self._tokens(config.batch_size)
        # Of the teacher, in the step or when its velocity is recorded, and of the frozen blocks, forward and backward.
        reads = config.accumulate * (1 + (2 * kept / self._inside if streamed else 0))
        return Need("finetune", parts, saved, self._hours(config.steps, flops, reads))

    def _before_removal(self, left: Mapping[str, int]) -> dict[str, int] | None:
        """Return how many of the blocks `left` tuning leaves as they are, by stack; None if it trains everything."""
        if self.run.config.finetune.trains == "all":
            return None
        return num_before(self.intervals, left, students=self.run.config.distill.mode != "none")

    def recording(self) -> Need:
        """Return the need of writing the teacher's velocities, which `finetune.recorded` does before it tunes."""
        config = self.run.config.finetune
        count = self._of_rank(config.batch_size, config.accumulate)
        file = STEPS_PER_FILE * dry.latent_bytes(self.run, config.batch_size)  # whole, whatever the steps
        parts = self.teacher() | {"forward": dry.forward_peak(self.run, count)}
        return Need("finetune", parts, -(-config.steps // STEPS_PER_FILE) * file, host={"a file": file})

    def plan(self) -> Need:
        """Return the need of measuring plugs for a budget."""
        run, config, budget = self.run, self.run.config.distill, self.run.config.budget
        calls = sum(run.num_layers.values()) * dry.stream_bytes(run, 1)
        count = max(1, config.batch_size // config.accumulate)
        parts = self.teacher() | {"students": self._student_bytes(), "inputs of all blocks": calls}
        parts |= {"forward": dry.forward_peak(run, count)} | self._abreast(MOST_ABREAST, count)
        projectors = sum(len(found[kind]) for found in self.width.values() for kind in ("text", "ffn"))
        # A pruned block has its projectors, and of a streamed block a copy of what it keeps of a modulation.
        own = (8 if run.config.model.streaming else 2) * self._side**2
        parts["pruned blocks"] = float(self.itemsize * own * projectors)
        sets = num_measured(sum(self.students.values()), projectors, budget.rescored)
        batches = len(batch_numbers(config.batch_size, 0, budget.num_batches))
        flops = 2 * self.teacher_params * self._tokens(batches * config.batch_size)
        reads = ceil(batches * config.accumulate / MOST_ABREAST)
        return Need("plan", parts, hours=self._hours(sets, flops, reads))

    def export(self) -> Need:
        """Return the need of an export. It maps the teacher's weights from their files and writes shard by shard."""
        encoders = self._encoders() + sum(self._others().values()) + dry.vae_peaks(self.run, 1)[0]
        parts = {"teacher": self._teacher_bytes, "encoders": encoders, "students": 2 * self._student_bytes()}
        return Need("export", {}, self._pruned() + encoders, host=parts)

    def quantize(self) -> Need:
        """Return the need of quantisation: in host memory, or for least squares on the device."""
        run, config = self.run, self.run.config.quantize
        encoders = self._encoders() + sum(self._others().values()) + dry.vae_peaks(run, 1)[0]
        eight = self._pruned() / self.itemsize  # bits a weight, also in int4 as torchao stores it
        host = {"teacher": self._teacher_bytes, "encoders": encoders, "students": 2 * self._student_bytes()}
        if config.rounding != "least_squares":
            return Need("quantize", {}, eight + encoders, host=host | {"rounded weights": eight})
        parts = {
            "pruned model": self._pruned(),
            "rounded weights": eight,
            "streams of both models": 2.0 * dry.stream_bytes(run, config.num_batches * config.batch_size),
            "forward": dry.forward_peak(run, config.batch_size),
            "moments of a layer's inputs": 8 * 8.0 * (4 * self._side) ** 2,  # of an FFN's, with copies to solve
        }
        return Need("quantize", parts, eight + encoders, host=host)

    def generate(self) -> Need:
        run, count = self.run, self.run.config.generate.batch_size
        vae, _, decoding = dry.vae_peaks(run, count)
        parts = {"transformer": self._drawn(), "VAE": vae, "text encoders": self._encoders()} | self._others()
        host = {} if run.config.generate.offload == "none" else {"all weights": sum(parts.values())}
        if run.config.generate.offload == "model":
            parts = {"largest of the models": max(parts.values())}
        elif run.config.generate.offload == "group":
            outside = (self.teacher_params - self._inside) * self.itemsize
            parts = {"two blocks": 2.0 * max(self.block.values()) * self.itemsize + outside, "VAE": vae}
        parts["forward or decoding"] = max(dry.forward_peak(run, count), decoding)
        return Need("generate", parts, host=host)

    def evaluate(self) -> Need:
        run, variants = self.run, self.run.config.generate.variants
        parts = self.teacher() | {"students": self._student_bytes(), "forward": dry.forward_peak(run, 1)}
        if variants is None or {*TUNED} & {*variants}:
            parts["tuned model"] = self._pruned(self.width)
        if not run.config.data.stored:  # the step that it times is not on disk
            parts["text encoders and VAE"] = self._encoders() + dry.vae_peaks(run, 1)[0]
        return Need("evaluate", parts)

    # Sizes.

    @property
    def _teacher_bytes(self) -> float:
        return float(self.teacher_params * self.itemsize)

    def _student_bytes(self) -> float:
        """Return the bytes of all students."""
        return float(self.itemsize * sum(self.block[s] * n for s, n in self.students.items()))

    def _pruned(self, width: Width | None = None) -> float:
        """Return the bytes of the pruned model, with all students and the projectors of `width`."""
        run = self.run
        counts = count_parameters(run.family, run.config.model.arch, self.intervals, width, run.layout)
        return float(self.itemsize * counts["student"])

    def _drawn(self) -> float:
        """Return the bytes of the largest transformer that is drawn with. One variant is on the device at a time."""
        variants, above = self.run.config.generate.variants, self.run.config.generate.teacher_above
        pruned = None if variants is None else {*variants} - {"teacher"}
        if above is not None and pruned != set():
            apart = pruned is None or pruned & {*TUNED}
            return self._teacher_bytes + (self._pruned(self.width) if apart else self._student_bytes())
        return self._teacher_bytes if variants is None or "teacher" in variants else self._pruned()

    def _probes(self) -> float:
        """Return the bytes of the probes of two streams at every block."""
        return 2 * 4.0 * self._side**2 * sum(self.run.num_layers.values())

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
        return self.run.family.channels

    @property
    def _inside(self) -> int:
        """The parameters of all blocks."""
        return sum(self.block[stack] * count for stack, count in self.run.num_layers.items())

    def _equations(self, number: int) -> float:
        """Return the bytes of so many normal equations in float64."""
        return 8.0 * number * (self._side + 1) * (2 * self._side + 1)

    def _encoders(self) -> float:
        """Return the bytes of the text encoders, without a local folder those of the published model."""
        folder = model_folder(self.run.config.model)
        if folder is None:
            return 1e9 * self.run.family.facts.encoder_gb
        variant = self.run.config.model.variant
        files = (file for part in folder.glob("text_encoder*") for file in component_files(part, variant))
        return float(sum(file.stat().st_size for file in files))

    def _others(self) -> dict[str, float]:
        """Return the bytes of the pipeline's other denoisers, by name, which draw along with the teacher."""
        return other_bytes(self.run.config.model, model_folder(self.run.config.model))

    def groups(self) -> int:
        """Return into how many groups depth distillation divides the intervals: for `auto` as few as fit."""
        config = self.run.config.distill
        if config.groups != "auto":
            return int(config.groups)
        if config.mode == "sequential":  # a chain trains as one
            return 1
        most = max(1, sum(map(len, self.trained.values())))
        return next((n for n in range(1, most) if fits(self.depth(n).total, capacity(self.run))), most)


STAGES: dict[str, Callable[[Plan], Need]] = {
    "cache": Plan.cache,
    "probe": Plan.probe,
    "detect": Plan.detect,
    "boundaries": Plan.boundaries,
    "depth": Plan.depth,
    "width": Plan.width_stage,
    "plan": Plan.plan,
    "finetune": Plan.finetune,
    "export": Plan.export,
    "quantize": Plan.quantize,
    "generate": Plan.generate,
    "evaluate": Plan.evaluate,
}
