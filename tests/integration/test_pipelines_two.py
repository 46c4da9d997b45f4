"""Pipelines that ppcl does not know, at tiny size, go through all stages: FLUX.2, Z-Image, Sana and others.

The first runs always, all of them with PPCL_TEST_MODELS=1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import succeed
from diffusers import DiffusionPipeline
from torch import Tensor

import ppcl
from ppcl.data.batches import first_output
from ppcl.data.recording.files import read_call, record_of
from tests.pipelines_tiny.chain import CHAIN, SHORT, VARIANTS, only_on_demand

ARCHITECTURES = ("flux2", "z_image", "sana", "qwen_image21", "lumina2", "pixart_sigma", "krea2")
SIZE = ["model.sampling.height=64", "model.sampling.width=64"]


@dataclass
class Chain:
    """A pipeline of the module `name`, and the folder of a run through all stages."""

    name: str
    teacher: Path
    run: Path

    @property
    def recording(self) -> Path:
        (folder,) = (self.run.parent / "cache" / "recordings").iterdir()
        return folder


@pytest.fixture(scope="module", params=[ARCHITECTURES[0], *map(only_on_demand, ARCHITECTURES[1:])])
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    module = import_module(f"tests.pipelines_tiny.{name}")
    teacher = module.build(folder / "teacher")
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"a {colour} {shape}\n" for colour in ("red", "green") for shape in ("circle", "cross")))
    succeed(
        "model=auto",
        f"model.path={teacher}",
        f"data.path={prompts}",
        f"paths.runs_dir={folder / 'runs'}",
        "name=chain",
        CHAIN,
        f"generate.variants=[{','.join(VARIANTS)}]",
        *SHORT,
        *SIZE,
        *module.SETTINGS,
    )
    return Chain(name, teacher, folder / "runs" / "chain")


def test_the_report_compares_the_variants_with_the_teacher(chain: Chain) -> None:
    report = json.loads((chain.run / "report" / "report.json").read_text())
    rows = {row["name"]: row for row in report["variants"]}
    assert list(rows) == VARIANTS
    for name in VARIANTS[1:]:
        assert 0 < rows[name]["velocity_error"] < 10
        assert rows[name]["fidelity"]["noise_levels"]
    assert (chain.run / "report" / "report.html").is_file()


def test_stock_diffusers_loads_the_export_and_it_computes_the_same(chain: Chain) -> None:
    export = chain.run / "export"
    loaded = DiffusionPipeline.from_pretrained(export)
    assert not list((export / "transformer").glob("*.py"))  # of our own is only what the teacher itself had
    index = json.loads((chain.teacher / "model_index.json").read_text())
    assert type(loaded).__name__ == index["_class_name"]
    assert type(loaded.transformer).__module__.startswith("diffusers.models.transformers.")
    pruned = ppcl.load(chain.run).pipeline("ppcl-depth").transformer
    call = read_call(record_of(chain.recording, 0), 0)
    found, wanted = (_output(model, call.arguments) for model in (loaded.transformer, pruned))
    assert _same(found, wanted)
    assert not _same(found, call.output)


@torch.no_grad()
def _output(transformer: Any, arguments: Mapping[str, Any]) -> Any:
    transformer.requires_grad_(False)  # for weights that learn torch takes another matrix product
    return first_output(transformer(**arguments))


def _same(one: Any, other: Any) -> bool:
    """Whether two outputs are equal bit for bit; those of Z-Image are lists."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return len(one) == len(other) and all(map(torch.equal, one, other))
