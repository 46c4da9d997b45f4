"""Stage 1.1: one residual linear probe per block and stream (paper Eq. 1-2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from ppcl.artifacts import Probes, is_current
from ppcl.data.batches import TrainingBatch
from ppcl.families.base import Family
from ppcl.ops.least_squares import NormalEquations
from ppcl.stages.run import Run
from ppcl.taps import BlockCall, observe


def valid(features: Tensor, mask: Tensor | None) -> Tensor:
    """The valid tokens of `[B, tokens, D]` as rows `[T, D]`, float32."""
    return (features.flatten(0, 1) if mask is None else features[mask]).float()


Pair = Callable[[str, Tensor, Tensor], None]


@torch.no_grad()
def each_pair(family: Family, transformer: nn.Module, batch: TrainingBatch, visit: Pair) -> None:
    """Call `visit(key, x, dx)` with every block's input rows and what it adds to them, per stream."""
    masks = family.masks(batch.inputs)

    def on_block(call: BlockCall) -> None:
        for stream, before in call.inputs.items():
            x = valid(before, masks[stream])
            dx = valid(call.outputs[stream], masks[stream]) - x
            visit(f"{call.stack}.{call.index}.{stream}", x, dx)

    observe(family, transformer, batch.inputs, on_block)


def fit_probes(
    family: Family, transformer: nn.Module, batches: Iterable[TrainingBatch], *, ridge: float, bias: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """Least-squares W `[D, D]`, b `[D]` of x -> x + x W^T + b for every block and stream (Eq. 1).

    The input of probe i is always the teacher's own T_{i-1}; one pass serves all probes.
    """
    equations: dict[str, NormalEquations] = {}

    def add(key: str, x: Tensor, dx: Tensor) -> None:
        if key not in equations:
            equations[key] = NormalEquations(x.shape[1], dx.shape[1])
        equations[key].add(x.cpu(), dx.cpu())

    for batch in batches:
        each_pair(family, transformer, batch, add)
    solved = {key: system.solve(ridge=ridge, bias=bias) for key, system in equations.items()}
    return {key: (weight.float(), offset.float()) for key, (weight, offset) in solved.items()}


def train_probes(
    family: Family,
    transformer: nn.Module,
    batches: Iterable[TrainingBatch],
    probes: dict[str, tuple[Tensor, Tensor]],
    *,
    lr: float,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Descend L_fit (Eq. 2) from `probes`, a step a batch; probes share no gradient."""
    maps = {key: nn.Linear(weight.shape[1], weight.shape[0]) for key, (weight, _) in probes.items()}
    for key, (weight, bias) in probes.items():
        maps[key].load_state_dict({"weight": weight, "bias": bias})
    optimizer = torch.optim.Adam([p for linear in maps.values() for p in linear.parameters()], lr=lr)

    def descend(key: str, x: Tensor, dx: Tensor) -> None:
        with torch.enable_grad():
            (maps[key](x.cpu()) - dx.cpu()).square().sum(dim=-1).mean().backward()

    for batch in batches:
        optimizer.zero_grad()
        each_pair(family, transformer, batch, descend)
        optimizer.step()
    return {key: (linear.weight.detach(), linear.bias.detach()) for key, linear in maps.items()}


def relative_residuals(
    family: Family,
    transformer: nn.Module,
    batches: Iterable[TrainingBatch],
    probes: dict[str, tuple[Tensor, Tensor]],
) -> dict[str, float]:
    """||l_i(x) - T_i||^2 / ||T_i - T_{i-1}||^2 per block and stream; 1 means no better than identity."""
    sums: dict[str, list[float]] = {}

    def add(key: str, x: Tensor, dx: Tensor) -> None:
        weight, bias = probes[key]
        error = x.cpu() @ weight.T + bias - dx.cpu()
        total = sums.setdefault(key, [0.0, 0.0])
        total[0] += error.double().square().sum().item()
        total[1] += dx.double().square().sum().item()

    for batch in batches:
        each_pair(family, transformer, batch, add)
    return {key: error / size if size else 0.0 for key, (error, size) in sums.items()}


def run(run: Run) -> None:
    settings, folder = run.config.probe, run.probe_folder
    header = Probes.header_for(run.probe_settings)
    if is_current(folder / "probes.json", header):
        run.say("probe", f"reused {folder}")
        return
    stream = run.stream(run.config.data.calibration_seed, settings.batch_size)
    # Fitted on the first batches, judged on later ones, trained on those after both.
    heldout = settings.num_batches + settings.num_heldout_batches

    def batches(start: int, stop: int, description: str) -> Iterable[TrainingBatch]:
        for step in track(range(start, stop), description, console=run.console, transient=True):
            yield run.to_device(stream(step))

    parts: tuple[Any, Any] = run.family, run.pipeline.transformer
    probes = fit_probes(*parts, batches(0, settings.num_batches, "probes"), ridge=settings.ridge, bias=settings.bias)
    if settings.init == "zero":
        probes = {key: (torch.zeros_like(w), torch.zeros_like(b)) for key, (w, b) in probes.items()}
    if settings.train_steps:
        training = batches(heldout, heldout + settings.train_steps, "probe training")
        probes = train_probes(*parts, training, probes, lr=settings.lr)
    residuals = relative_residuals(*parts, batches(settings.num_batches, heldout, "held-out residuals"), probes)
    weights = {key: weight for key, (weight, _) in probes.items()}
    biases = {key: bias for key, (_, bias) in probes.items()}
    Probes(header, weights, biases, residuals).save(folder)
    for stream_name in sorted({key.rpartition(".")[2] for key in residuals}):
        values = [value for key, value in residuals.items() if key.endswith(stream_name)]
        run.say(
            "probe",
            f"{stream_name}: held-out relative residual {min(values):.3f} to {max(values):.3f} "
            f"over {len(values)} blocks",
        )
    run.say("probe", f"wrote {folder}")
