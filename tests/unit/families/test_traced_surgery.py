"""Feed-forward networks of traced models become linear maps: their fit, their pruned class, and its own code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoModel
from torch import Tensor

import ppcl
from ppcl.artifacts.headers import Header
from ppcl.config import DistillConfig
from ppcl.data.batches import TrainingBatch
from ppcl.distill.width import WidthDistillation, places
from ppcl.errors import UsageError
from ppcl.export.remote_code import add_code
from ppcl.families.traced.family import Traced, facts_of
from ppcl.families.traced.feed_forward import FeedForward
from ppcl.layers import Layout
from ppcl.surgery.count import count_parameters
from ppcl.surgery.plugboard import Plugboard
from ppcl.taps import stack_of
from tests.models_tiny.build import build
from tests.models_tiny.cases import CASES

# Two networks in a block; one with padded text beside the image; one that takes two streams joined.
NAMES = ("Flux2Transformer2DModel", "Krea2Transformer2DModel", "CogVideoXTransformer3DModel")
FFN = [1, 3]


@dataclass
class Model:
    """A tiny model, its trace, and its distillation with the FFNs of two blocks replaced."""

    transformer: Any
    family: Traced
    trace: ppcl.Trace
    batches: list[TrainingBatch]

    @property
    def stack(self) -> str:
        return self.trace.stacks[0].path

    @property
    def networks(self) -> tuple[FeedForward, ...]:
        return self.trace.stacks[0].feed_forwards

    def distillation(self) -> WidthDistillation:
        kept = places(self.family, self.transformer, {}, {})
        sets = {self.stack: {"text": [], "ffn": FFN}}
        return WidthDistillation(self.family, self.transformer, kept, sets, Layout(), DistillConfig(steps=1))


def varied(inputs: dict[str, Any], seed: int) -> dict[str, Any]:
    """Inputs of a forward with other latents and texts, so that there are more tokens than channels."""
    generator = torch.Generator().manual_seed(seed)
    names = ("hidden_states", "encoder_hidden_states")
    drawn = {name: torch.randn(inputs[name].shape, generator=generator) for name in names}
    times = torch.rand(2, generator=generator)
    whole = not inputs["timestep"].is_floating_point()
    return inputs | drawn | {"timestep": (1000 * times).long() if whole else times}


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest) -> Model:
    case = CASES[request.param]
    transformer = build(request.param, case)
    inputs = case.inputs()
    trace = ppcl.trace(transformer, inputs)
    family = Traced(facts_of(trace), dict(transformer.config))
    family.adopt(trace)
    batches = [TrainingBatch(varied(inputs, seed), torch.zeros(2, 1), torch.full((2,), 0.5)) for seed in range(12)]
    return Model(transformer, family, trace, batches)


@torch.no_grad()
def seen(model: Model, index: int, name: str) -> list[tuple[Tensor, Tensor]]:
    """What a network of a block is given and returns on each batch, `[B, tokens, D]`, by a plain hook."""
    calls: list[tuple[Tensor, Tensor]] = []
    module = stack_of(model.transformer, model.stack)[index].get_submodule(name)
    handle = module.register_forward_hook(lambda _, args, output: calls.append((args[0], output)))
    for batch in model.batches:
        model.transformer(**batch.inputs)
    handle.remove()
    return calls


def valid_rows(model: Model, index: int, network: FeedForward) -> tuple[list[Tensor], list[Tensor]]:
    """Input and output of a network on each batch, `[T, D]`, without padding."""
    x, y = [], []
    for batch, (given, returned) in zip(model.batches, seen(model, index, network.name), strict=True):
        masks = [model.family.masks(batch.inputs)[stream] for stream in network.streams]
        mask = masks[0] if len(masks) == 1 else None
        x.append(given.flatten(0, 1) if mask is None else given[mask])
        y.append(returned.flatten(0, 1) if mask is None else returned[mask])
    return x, y


def test_the_fit_is_that_of_numpy_on_what_the_network_is_given_and_returns(model: Model) -> None:
    module = model.distillation()
    module.fit_linear(model.batches, ridge=1e-12)
    assert [item.place.index for item in module.pruned] == FFN
    for number, item in enumerate(module.pruned):
        projectors = module.projectors(number)
        assert list(projectors) == [network.name for network in model.networks]
        for network in model.networks:
            x, y = (torch.cat(side).double().numpy() for side in valid_rows(model, item.place.index, network))
            x = np.hstack([x, np.ones((len(x), 1))])
            assert len(x) > 1.5 * x.shape[1]
            wanted = x @ np.linalg.lstsq(x, y, rcond=None)[0]
            linear: Any = projectors[network.name]
            weight = torch.cat([linear.weight, linear.bias[:, None]], dim=1).detach().double().numpy()
            np.testing.assert_allclose(x @ weight.T, wanted, rtol=0, atol=1e-3 * np.abs(wanted).max())
            assert np.square(wanted - y).sum() > 1e-3 * np.square(y).sum()  # it is no linear network


def test_the_fit_brings_the_output_of_the_block_closer(model: Model) -> None:
    module = model.distillation()
    zero = module.heldout(model.batches[:2])
    module.fit_linear(model.batches, ridge=1e-6)
    for before, after in zip(zero, module.heldout(model.batches[:2]), strict=True):
        streams = {stream for network in model.networks for stream in network.streams}
        linear = {key for key in after if key.startswith("linear_")}
        assert linear == {f"linear_{stream}" for stream in streams}
        assert all(after[key] < before[key] for key in linear)


def board_of(model: Model) -> Plugboard:
    module = model.distillation()
    module.fit_linear(model.batches, ridge=1e-6)
    header = Header("ppcl.projector", {})
    found = [module.projector(number, torch.nn.Module.state_dict, header, {}) for number in range(2)]
    return Plugboard(model.family, model.transformer, {}, {}, {item.name: item for item in found})


@torch.no_grad()
def output(transformer: Any, batch: TrainingBatch) -> Tensor:
    found: Tensor = transformer(**batch.inputs)[0]
    return found


def test_a_plugged_model_is_the_pruned_class_and_the_teacher_comes_back(model: Model) -> None:
    whole = output(model.transformer, model.batches[0])
    board = board_of(model).all()
    try:
        plugged = output(model.transformer, model.batches[0])
        alone = board.standalone()
        assert not torch.equal(plugged, whole)
        assert type(alone) is getattr(ppcl, f"Pruned{model.trace.model}")
        assert torch.equal(output(alone, model.batches[0]), plugged)
        counts = count_parameters(model.family, dict(model.transformer.config), {}, board.width)
        assert counts["student"] == sum(parameter.numel() for parameter in alone.parameters())
        shared = {id(parameter) for parameter in model.transformer.parameters()}
        assert shared >= {id(parameter) for parameter in alone.parameters()}
    finally:
        board()
    assert torch.equal(output(model.transformer, model.batches[0]), whole)


# What a user without ppcl runs.
LOADER = """
import json, sys
sys.modules['ppcl'] = None
import torch
from diffusers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(**torch.load(sys.argv[2], weights_only=False))[0], sys.argv[3])
print(json.dumps([type(model).__name__, type(model).__module__]))
"""


def saved(model: Model, folder: Path) -> tuple[Path, Tensor]:
    """A folder such as an export has, with the pruned transformer alone, and that model's output."""
    board = board_of(model).all()
    try:
        board.standalone().save_pretrained(folder / "transformer")
        found = output(model.transformer, model.batches[0])
    finally:
        board()
    index = {"_class_name": "DiffusionPipeline", "transformer": ["ppcl", f"Pruned{model.trace.model}"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    add_code(folder)
    return folder / "transformer", found


def assert_same(found: Tensor, wanted: Tensor) -> None:
    """Equal but for rounding: one product in Krea 2, of 7 channels, rounds by where in memory its weights lie."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_its_own_code_loads_it_where_ppcl_is_not_installed(model: Model, tmp_path: Path) -> None:
    folder, wanted = saved(model, tmp_path / "export")
    assert "ppcl" not in (folder / "transformer_pruned.py").read_text().partition('"""\n\nfrom')[2].replace('"ppcl', "")
    torch.save(model.batches[0].inputs, tmp_path / "inputs.pt")
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(folder), str(tmp_path / "inputs.pt"), str(tmp_path / "output.pt")],
        cwd=tmp_path,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    name, module = json.loads(done.stdout.splitlines()[-1])
    assert name == f"Pruned{model.trace.model}"
    assert module.startswith("diffusers_modules.")
    assert_same(torch.load(tmp_path / "output.pt"), wanted)


def test_it_loads_here_by_its_class(model: Model, tmp_path: Path) -> None:
    folder, wanted = saved(model, tmp_path)
    loaded = getattr(ppcl, f"Pruned{model.trace.model}").from_pretrained(folder).eval()
    assert_same(output(loaded, model.batches[0]), wanted)
    places = {f"{model.stack}.{index}.{network.name}" for index in FFN for network in model.networks}
    assert loaded.config.pruned_feed_forwards.keys() == places
    assert type(AutoModel.from_pretrained(str(folder), trust_remote_code=True)).__name__ == type(loaded).__name__


def test_a_block_without_such_a_network_is_refused_by_its_number() -> None:
    case = CASES["SD3Transformer2DModel"]
    transformer: Any = build("SD3Transformer2DModel", case)
    trace = ppcl.trace(transformer, case.inputs())
    family = Traced(facts_of(trace), dict(transformer.config))
    family.adopt(trace)
    last = transformer.config.num_layers - 1  # it has no text after its attention
    with pytest.raises(UsageError, match=rf"width\.transformer_blocks\.ffn: block {last} has no feed-forward network"):
        count_parameters(family, dict(transformer.config), {}, {"transformer_blocks": {"text": [], "ffn": [1, last]}})


def test_names_that_are_of_no_transformer_are_no_attributes() -> None:
    assert ppcl.PrunedWanTransformer3DModel is ppcl.PrunedWanTransformer3DModel
    with pytest.raises(AttributeError, match="PrunedNothing"):
        _ = ppcl.PrunedNothing
    with pytest.raises(AttributeError, match="PrunedFluxPipeline"):
        _ = ppcl.PrunedFluxPipeline
