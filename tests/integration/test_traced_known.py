"""The shipped teachers, traced: what their families state is found, and probes, intervals and losses are the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import ppcl
from ppcl.artifacts.probes import Probes
from ppcl.command import prepare
from ppcl.config import Config
from ppcl.context import Run
from ppcl.data.batches import TrainingBatch
from ppcl.distill.depth import DepthDistillation
from ppcl.families.base import Family
from ppcl.families.traced.family import Traced, facts_of
from ppcl.methods.base import Teacher
from ppcl.methods.probes import fit_probes
from ppcl.methods.registry import load_method

TEACHERS = ("tiny_qwen_image", "tiny_flux", "tiny_dit", "tiny_qwen_image_edit")


@dataclass
class Known:
    """A shipped teacher on two batches of its own data, with its family and with that which tracing finds."""

    run: Run
    batches: list[TrainingBatch]
    trace: ppcl.Trace
    traced: Traced

    @property
    def config(self) -> Config:
        return self.run.config

    @property
    def transformer(self) -> Any:
        return self.run.teacher.transformer

    def name(self, stream: str) -> str:
        """Return the name that the known family has for a stream of the traced one."""
        return "text" if stream == "encoder_hidden_states" else "image"


@pytest.fixture(scope="module", params=TEACHERS)
def known(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Known:
    folder = tmp_path_factory.mktemp("runs")
    run = prepare([f"model={request.param}", f"paths.runs_dir={folder}", "trainer=cpu", "probe.batch_size=8"])
    stream = run.data.stream(run.config.data.calibration_seed, 8)
    batches = [stream(step) for step in range(2)]
    trace = ppcl.trace(run.teacher.transformer, batches[0].inputs)
    traced = Traced(facts_of(trace), run.config.model.arch)
    traced.adopt(trace)
    return Known(run, batches, trace, traced)


def test_stacks_streams_and_masks_are_those_that_the_family_states(known: Known) -> None:
    family = known.run.family
    assert known.traced.stacks == family.stacks
    inputs = known.batches[0].inputs
    for stack in known.trace.stacks:
        found = {known.name(stream.name) for stream in stack.streams}
        assert found == ({"image"} if known.run.family.name == "dit" else {"image", "text"})
    masks = {known.name(name): mask for name, mask in known.traced.masks(inputs).items()}
    stated = family.masks(inputs)
    assert masks.keys() == stated.keys()
    for name, mask in stated.items():
        assert (mask is None) == (masks[name] is None), name
        assert mask is None or torch.equal(mask.bool(), masks[name])


def test_probes_are_the_same_to_the_bit(known: Known) -> None:
    def fitted(family: Family) -> dict[str, Any]:
        found = fit_probes(family, known.transformer, known.batches[:1], known.batches[1:], ridge=1e-4, bias=True)
        return {fit.key: fit for fit in found}

    theirs, ours = fitted(known.run.family), fitted(known.traced)
    renamed = {f"{key.rpartition('.')[0]}.{known.name(key.rpartition('.')[2])}": fit for key, fit in ours.items()}
    assert renamed.keys() == theirs.keys()
    for key, fit in theirs.items():
        assert torch.equal(fit.weight, renamed[key].weight)
        assert fit.residual.value == renamed[key].residual.value


@pytest.mark.parametrize(
    "overrides", [["method=ppcl"], ["method=shortgpt", "method.params=0.7"], ["method=flux_lite", "method.params=0.7"]]
)
def test_intervals_are_the_same(known: Known, overrides: list[str]) -> None:
    run = prepare([f"model={known.config.model.name}", *overrides])

    def found(family: Family) -> Any:
        teacher = Teacher(family, known.transformer, lambda: known.batches, lambda: _probes(known, family))
        return load_method(run.config.method).detect(teacher).intervals

    assert found(known.traced) == found(run.family)


def _probes(known: Known, family: Family) -> Probes:
    fits = list(fit_probes(family, known.transformer, known.batches[:1], known.batches[1:], ridge=1e-4, bias=True))
    weights, biases = {fit.key: fit.weight for fit in fits}, {fit.key: fit.bias for fit in fits}
    return Probes(Probes.header_for({}), weights, biases, {})


def test_losses_of_a_student_are_the_same_to_the_bit(known: Known) -> None:
    stack, blocks = next(iter(known.run.num_layers.items()))
    assert blocks > 6

    def losses(family: Family) -> list[float]:
        module = DepthDistillation(family, known.transformer, {stack: [(2, 5)]}, known.config.distill)
        found: list[dict[str, torch.Tensor]] = []
        module.each_loss(known.batches[0], lambda number, terms: found.append(terms))
        return [found[0]["loss"].item(), *sorted(value.item() for value in found[0].values())]

    assert losses(known.traced) == losses(known.run.family)
