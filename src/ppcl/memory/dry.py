"""Dry runs: steps of the real modules on tensors without data, to count the bytes that are alive at once.

A dry run uses the model's real classes and sizes, and the modules that train and draw, under `FakeTensorMode`. Nothing
is allocated and nothing is computed. It runs on a model with a few blocks, and extrapolates to all of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ppcl.artifacts.files import parse_json
from ppcl.config import DistillConfig, FinetuneConfig, ProbeConfig
from ppcl.context import Run
from ppcl.data.batches import TrainingBatch
from ppcl.data.boundaries import STEPS_PER_SHARD
from ppcl.data.recording.blank import blank_calls
from ppcl.distill.depth import DepthDistillation
from ppcl.distill.finetune import FineTune
from ppcl.distill.frozen import up_to
from ppcl.distill.width import WidthDistillation, places
from ppcl.efficiency import LiveBytes
from ppcl.families.traced.family import Traced
from ppcl.methods.probes import fit_probes
from ppcl.taps import observe_abreast
from ppcl.training.optimizers import split_for_muon
from ppcl.training.states import state_bytes
from ppcl.validation.model import is_toy, model_folder

K = TypeVar("K")

FEW = 2  # blocks of each stack in a dry run
TOY_TOKENS = 12  # text tokens of a toy world's caption


@contextmanager
def without_data(run: Run) -> Iterator[None]:
    """Make all new tensors in the context fake ones; new modules get the dtype of the run's teacher."""
    before, layer_norm = torch.get_default_dtype(), nn.functional.layer_norm
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # torch does so for parameters
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # slower, but not on a GPU
        convert, nn.Module._apply = nn.Module._apply, _apply_in_place  # type: ignore[method-assign]
        if on_gpu(run):
            nn.functional.layer_norm = partial(_in_float32, layer_norm)
        torch.set_default_dtype(run.teacher.dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
            nn.functional.layer_norm = layer_norm
            nn.Module._apply = convert  # type: ignore[method-assign]


def on_gpu(run: Run) -> bool:
    """Return whether to estimate for a GPU, whose kernels hold more than those of a CPU, though there may be none."""
    return run.config.trainer.accelerator != "cpu"


def _in_float32(layer_norm: Callable[..., Tensor], stream: Tensor, *arguments: Any, **settings: Any) -> Tensor:
    """Normalise a stream in float32 under autocast, as it does on a GPU, but not on the CPU of a dry run."""
    if not torch.is_autocast_enabled("cpu"):
        return layer_norm(stream, *arguments, **settings)
    with torch.autocast("cpu", enabled=False):
        return layer_norm(stream.float(), *arguments, **settings)


def _apply_in_place(module: Any, function: Callable[[Any], Any], recurse: bool = True) -> Any:
    """Convert a module, as by `to`. torch's own way swaps fake parameters, which fails for those that PEFT makes."""
    for parameter in module.parameters():
        parameter.data = function(parameter.data)
    for child in module.modules():
        child._buffers.update({name: None if b is None else function(b) for name, b in child._buffers.items()})
    return module


def vae_config(run: Run) -> dict[str, Any] | None:
    """Return the config of the model's VAE, without a local folder that of the published model; None without a VAE."""
    folder, known = model_folder(run.config.model), run.family.facts.vae
    if folder is None:
        return None if known is None else {"_class_name": known[0]} | known[1]
    path = folder / "vae" / "config.json"
    return parse_json(path.read_text(encoding="utf-8")) if path.is_file() else None


def pixels_per_token(run: Run) -> int:
    """Return how many pixels wide an image token is."""
    config = vae_config(run) or {}
    if "factor" in config:  # the toy VAE
        return config["factor"] * config.get("cell", 1) * run.family.facts.token_latents
    halvings = len(config.get("block_out_channels", "   x")[1:])
    return 2**halvings * run.family.facts.token_latents


def blank_batch(run: Run, count: int) -> TrainingBatch:
    """Return a batch of `count` samples of the size of `model.sampling`, without content. Call it in `without_data`.

    Of a traced model it is one of its recorded calls.
    """
    if isinstance(run.family, Traced):
        return blank_calls(run.family, run.data.cache_folder, count)
    sampling, pixels = run.config.model.sampling, pixels_per_token(run)
    height, width = sampling.size
    length, longest = run.family.facts.text_tokens, sampling.max_sequence_length
    tokens = longest if length is None else min(length, longest)
    shape = (height // pixels, width // pixels)
    latents, conditions = run.family.blank(count, shape, TOY_TOKENS if is_toy(run.config.model) else tokens)
    sigmas = torch.empty(count)
    inputs = run.family.forward_inputs(latents, conditions, sigmas, shape)
    return TrainingBatch(inputs, latents, sigmas, as_tensor=run.family.as_tensor)


def model_of(run: Run, layers: Mapping[str, int]) -> nn.Module:
    """Return the teacher with so many blocks in each stack, without data. Call it in `without_data`."""
    arch = run.config.model.arch | {run.family.stacks[stack]: count for stack, count in layers.items()}
    return run.family.transformer_class.from_config(arch).eval().requires_grad_(False)


def lora_params(run: Run, left: Mapping[str, int]) -> int:
    """Return the parameters of a LoRA on all linear layers of so many blocks, by stack."""
    total = 0
    with torch.device("meta"):
        model = model_of(run, dict.fromkeys(run.num_layers, 1))
    for (stack, _), block in run.family.blocks(model).items():
        sizes = [sum(module.weight.shape) for module in block.modules() if isinstance(module, nn.Linear)]
        total += run.config.finetune.lora_rank * sum(sizes) * left[stack]
    return total


def few(run: Run) -> dict[str, int]:
    """Return the number of blocks in a dry run, by stack."""
    return {stack: min(FEW, count) for stack, count in run.num_layers.items()}


Measure = TypeVar("Measure", bound=Callable[..., int])


def if_it_runs(measure: Measure) -> Measure:
    """Make a measure return 0 for a traced model that does not run without data, or of which no call is recorded."""

    @wraps(measure)
    def measured(run: Run, *arguments: Any) -> int:
        if not isinstance(run.family, Traced):
            return measure(run, *arguments)
        try:
            return measure(run, *arguments)
        except Exception:  # whatever a model raises that branches on its data
            return 0

    return measured  # type: ignore[return-value]


@if_it_runs
def forward_peak(run: Run, count: int) -> int:
    """Return the peak bytes that a forward of the teacher adds to its weights, for `count` samples."""
    with without_data(run):
        model, batch = model_of(run, few(run)), blank_batch(run, count)
        with torch.no_grad(), LiveBytes() as recorded:
            model(**batch.inputs)
    return recorded.peak


def stream_bytes(run: Run, count: int) -> int:
    """Return the bytes of the streams of `count` samples at one block."""
    if isinstance(run.family, Traced):
        return count * run.family.stream_numbers * run.teacher.dtype.itemsize
    arch, inputs = run.config.model.arch, None
    with without_data(run):
        inputs = blank_batch(run, count).inputs
        image, text = inputs["hidden_states"], inputs.get("encoder_hidden_states")
        tokens = image.shape[1] if image.ndim == 3 else image[0, 0].numel() // arch.get("patch_size", 1) ** 2
        tokens += 0 if text is None else text.shape[1]
    return count * tokens * run.family.channels * run.teacher.dtype.itemsize


@if_it_runs
def latent_bytes(run: Run, count: int) -> int:
    """Return the bytes of the latents, and so of the velocities, of `count` samples."""
    with without_data(run):
        return blank_batch(run, count).target.nbytes


@if_it_runs
def sample_bytes(run: Run, count: int) -> int:
    """Return the bytes of all inputs of `count` samples."""
    with without_data(run):
        return sum(value.nbytes for value in blank_batch(run, count).inputs.values() if isinstance(value, Tensor))


@if_it_runs
def depth_peak(run: Run, config: DistillConfig, stacks: list[str], count: int) -> int:
    """Return the peak bytes of a step beside weights and states: activations, and the gradient of one student.

    `stacks`: those with intervals. `count`: samples that are passed at once.
    """
    with without_data(run):
        layers = few(run) | dict.fromkeys(stacks, FEW)
        teacher, batch = model_of(run, layers), blank_batch(run, count)
        intervals = {stack: [(0, 1)] for stack in stacks}
        module: Any = DepthDistillation(run.family, teacher, intervals, config, run.precision)
        module.manual_backward = torch.Tensor.backward
        with LiveBytes() as recorded:
            module.learn(batch, lambda part: part.zero_grad())
    return recorded.peak


@if_it_runs
def width_peak(run: Run, config: DistillConfig, stack: str, kinds: list[str], count: int) -> int:
    """Return the same for a step of width distillation. `kinds`: what is replaced in `stack`, `text` or `ffn`."""
    with without_data(run):
        teacher, batch = model_of(run, few(run) | {stack: FEW}), blank_batch(run, count)
        sets = {stack: {kind: [1] if kind in kinds else [] for kind in ("text", "ffn")}}
        kept = places(run.family, teacher, {}, {})
        arguments = run.family, teacher, kept, sets, run.layout, config
        module: Any = WidthDistillation(*arguments, precision=run.precision)
        module.manual_backward = torch.Tensor.backward
        with LiveBytes() as recorded:
            module.learn(batch, lambda part: part.zero_grad())
    return recorded.peak


@if_it_runs
def finetune_peak(
    run: Run, config: FinetuneConfig, student: Mapping[str, int], count: int, frozen: Mapping[str, int] | None = None
) -> int:
    """Return the peak bytes of a step beside weights and states: activations, and gradients.

    `student`: the number of blocks of the pruned model, by stack. Its activations grow with them. `frozen`: how many of
        them, the first of a stack, stay as they are, as the embedders do then. None: everything is trained.
    """

    def measured(blocks: Mapping[tuple[str, str], int]) -> int:
        layers = {stack: blocks[stack, "trained"] + blocks[stack, "frozen"] for stack in student}
        with without_data(run):
            teacher, tuned, batch = model_of(run, layers), model_of(run, layers), blank_batch(run, count)
            itself = {key: key for key in run.family.blocks(tuned)}
            kept = [(stack, index) for stack, index in itself if index < blocks[stack, "frozen"]]
            held = [] if frozen is None else up_to(run.family, tuned, kept)
            module: Any = FineTune(run.family, teacher, tuned, config, itself, precision=run.precision, frozen=held)
            with LiveBytes() as recorded:
                module.losses(batch)["loss"].backward()
        return recorded.peak

    whole = {}
    for stack, number in student.items():
        whole[stack, "frozen"] = (frozen or {}).get(stack, 0)
        whole[stack, "trained"] = number - whole[stack, "frozen"]
    return extrapolated(measured, {part: min(FEW, number) for part, number in whole.items()}, whole)


def extrapolated(measured: Callable[[Mapping[K, int]], int], small: Mapping[K, int], whole: Mapping[K, int]) -> int:
    """Return `measured(whole)` of a measure that grows linearly with each of the numbers, from small ones."""
    base = measured(small)
    total = base
    for part, count in whole.items():
        if count > small[part]:
            slope = measured({**small, part: small[part] + 1}) - base
            total += slope * (count - small[part])
    return total


def optimizer_bytes(
    run: Run, config: DistillConfig | FinetuneConfig, params: Mapping[str, int], outside: int = 0
) -> int:
    """Return the bytes of the optimiser's states: two of each parameter with AdamW, and one with Muon.

    `params`: trained parameters in blocks, by stack. `outside`: those outside of blocks.
    """
    with without_data(run):
        model = model_of(run, dict.fromkeys(run.num_layers, 1)).requires_grad_(True)
        blocks = run.family.blocks(model)
        matrices = split_for_muon(run.family, model, list(blocks.values()))[0] if config.optimizer == "muon" else []
        of_muon = {id(matrix) for matrix in matrices}
        parts = {stack: list(block.parameters()) for (stack, _), block in blocks.items()}
        inside = {id(parameter) for part in parts.values() for parameter in part}
        parts[""] = [parameter for parameter in model.parameters() if id(parameter) not in inside]
        total = 0.0
        for stack, part in parts.items():
            sizes = [(1 if id(p) in of_muon else 2) * state_bytes(p, config.optimizer_states) for p in part]
            count = params.get(stack, 0) if stack else outside
            total += count * sum(sizes) / sum(p.numel() for p in part)
    return round(total)


def matrix_states(config: DistillConfig | FinetuneConfig, rows: int, columns: int) -> float:
    """Return the bytes of AdamW's states for each element of a matrix of this size."""
    matrix = torch.empty(rows, columns, device="meta")
    return 2 * state_bytes(matrix, config.optimizer_states) / matrix.numel()


def block_params(run: Run) -> dict[str, int]:
    """Return the parameters of one block, by stack."""
    with torch.device("meta"):
        model = model_of(run, dict.fromkeys(run.num_layers, 1))
    return {stack: sum(p.numel() for p in block.parameters()) for (stack, _), block in run.family.blocks(model).items()}


def embedder_params(run: Run) -> int:
    """Return the parameters of the embedders, which come before the blocks."""
    with torch.device("meta"):
        model = model_of(run, dict.fromkeys(run.num_layers, 1))
    return sum(parameter.numel() for parameter in up_to(run.family, model, ()))


def vae_peaks(run: Run, count: int) -> tuple[int, int, int]:
    """Return the bytes of the VAE's weights, and the peak bytes of encoding and of decoding `count` pictures.

    All are 0 without a VAE, or with one that is not of diffusers.
    """
    import diffusers

    config = vae_config(run)
    vae_class = getattr(diffusers, str((config or {}).get("_class_name")), None)
    if config is None or vae_class is None:
        return 0, 0, 0
    sampling, gpu = run.config.model.sampling, on_gpu(run)
    with without_data(run):
        vae = vae_class.from_config(config).eval().requires_grad_(False)
        frames = (1,) if hasattr(vae, "temperal_downsample") else ()
        weights = sum(p.numel() * p.element_size() for p in chain(vae.parameters(), vae.buffers()))
        with torch.no_grad(), LiveBytes(cudnn=gpu) as encoding:
            encoded = vae.encode(torch.empty(count, 3, *frames, *sampling.size))
        # Of most VAEs it is a distribution, of others the latents themselves.
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        with torch.no_grad(), LiveBytes(cudnn=gpu) as decoding:
            vae.decode(latents, return_dict=False)
    return weights, encoding.peak, decoding.peak


@if_it_runs
def probe_peak(run: Run, config: ProbeConfig, count: int) -> int:
    """Return the peak bytes that the fit of all probes to `count` batches adds to the teacher.

    They are the batches, their streams, and the normal equations.
    """

    def measured(sizes: Mapping[str, int]) -> int:
        with without_data(run):
            model = model_of(run, few(run))
            with LiveBytes() as recorded:
                batches = [blank_batch(run, config.batch_size) for _ in range(sizes["batches"])]
                for _ in fit_probes(run.family, model, batches, ridge=config.ridge, bias=config.bias):
                    pass
        return recorded.peak

    return of_batches(measured, count)


@if_it_runs
def boundaries_peak(run: Run, config: DistillConfig) -> int:
    """Return the peak bytes that a shard of boundaries adds to the teacher, while an interval's inputs are kept."""

    def measured(sizes: Mapping[str, int]) -> int:
        with without_data(run), torch.no_grad():
            model = model_of(run, few(run))
            with LiveBytes() as recorded:
                batches = [blank_batch(run, config.batch_size) for _ in range(sizes["batches"])]
                kept: dict[int, Any] = {}
                for number, call in observe_abreast(run.family, model, [batch.inputs for batch in batches]):
                    kept.setdefault(number, call.kwargs)  # of the first block, up to the end
        return recorded.peak

    return of_batches(measured, STEPS_PER_SHARD)


def of_batches(measured: Callable[[Mapping[str, int]], int], count: int) -> int:
    """Return `measured({"batches": count})`, which grows linearly with that number."""
    return extrapolated(measured, {"batches": min(FEW, count)}, {"batches": count})
