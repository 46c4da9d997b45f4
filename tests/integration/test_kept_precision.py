"""Weights that diffusers keeps in float32 whatever a model's dtype is, stay so in plugs, tuned models and exports."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from commands import succeed
from diffusers import DiffusionPipeline, WanTransformer3DModel
from safetensors.torch import load_file

from ppcl.families.traced.family import Traced, facts_of
from ppcl.families.traced.known import guessed
from ppcl.streaming import load_streamed
from tests.pipelines_tiny import wan
from tests.pipelines_tiny.chain import SHORT

KEPT = {*(WanTransformer3DModel._keep_in_fp32_modules or [])}


def dtypes(folder: Path) -> dict[bool, set[torch.dtype]]:
    """Return the dtypes of stored weights of modules that are kept in float32 (True), and of all others."""
    found: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    for file in folder.glob("*.safetensors"):
        for name, value in load_file(file).items():
            found[bool(KEPT & {*name.split(".")})].add(value.dtype)
    return found


def test_they_are_stored_in_float32_beside_bfloat16(tmp_path: Path) -> None:
    teacher = wan.build(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na cross\n", encoding="utf-8")
    given = ["model=auto", f"model.path={teacher}", "model.dtype=bfloat16", f"data.path={tmp_path / 'prompts.txt'}"]
    given += [f"paths.runs_dir={tmp_path}", f"paths.cache_dir={tmp_path / 'cache'}", "name=run", *SHORT, *wan.SETTINGS]
    given += ["method.min_cka=0", "finetune.steps=2", "finetune.batch_size=2", "budget.params=0.9"]
    succeed(*given, "budget.num_batches=1", "stages=[cache,probe,detect,depth,plan,finetune,export]")
    wanted = {True: {torch.float32}, False: {torch.bfloat16}}
    for place in ("plugs", "finetuned/transformer", "export/transformer"):
        assert dtypes(tmp_path / "run" / place) == wanted, place
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "run" / "export", dtype=torch.bfloat16).transformer
    stored = load_file(next((tmp_path / "run" / "export" / "transformer").glob("*.safetensors")))
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, stored[name]), name


def test_a_streamed_model_computes_as_a_loaded_one(tmp_path: Path) -> None:
    folder = wan.build(tmp_path / "teacher") / "transformer"
    loaded = WanTransformer3DModel.from_pretrained(folder, dtype=torch.bfloat16)
    arch = json.loads((folder / "config.json").read_text())
    family = Traced(facts_of(guessed(WanTransformer3DModel, arch)), arch)
    streamed = load_streamed(family, folder, torch.device("cpu"), torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    call = {
        "hidden_states": torch.randn(1, 8, 2, 4, 4, generator=generator).bfloat16(),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 5, 48, generator=generator).bfloat16(),
    }
    with torch.no_grad():
        assert torch.equal(streamed(**call).sample, loaded(**call).sample)
    for block in streamed.blocks:
        assert block.scale_shift_table.dtype == torch.float32
