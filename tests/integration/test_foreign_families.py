"""Families that ppcl knows nothing of go through every stage but those that draw, from a cache of their own data."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import assert_same_tensors, plug_tensors, ppcl, succeed
from diffusers import DiffusionPipeline
from foreign import FOREIGN, REFINER, Foreign

import ppcl as package
from ppcl.artifacts.plan import read_plug_name
from ppcl.artifacts.probes import Probes
from ppcl.config import DataConfig
from ppcl.data.cached import CachedStream
from ppcl.families.registry import FAMILIES, get_family, register
from ppcl.layers import kept_layers
from ppcl.taps import observe, stack_of

SETTINGS = [
    "model=auto",
    "data=webdataset",
    "data.held_out=0.4",
    "probe.num_batches=2",
    "probe.num_heldout_batches=1",
    "probe.batch_size=4",
    "method.min_cka=0",
    "method.num_samples=4",
    "method.num_timesteps=1",
    "method.batch_size=4",
    "distill=tiny",
    "distill.steps=2",
    "distill.batch_size=4",
    "finetune=tiny",
    "finetune.steps=2",
    "finetune.batch_size=4",
    "budget.num_batches=1",
    "trainer=cpu",
    "trainer.num_threads=1",
    "trainer.progress=false",
    "logger=none",
]

# Draws nothing: the stock class alone, called with stored arguments.
WITHOUT_PPCL = """
import sys
sys.modules["ppcl"] = None
import torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    given = torch.load(f"{folder}/given.pt")
    pipeline = DiffusionPipeline.from_pretrained(f"{folder}/pruned/export", **given["without"])
    with torch.no_grad():
        output = pipeline.transformer(**given["inputs"])[0]
    torch.save([type(pipeline.transformer).__module__, output], f"{folder}/plain.pt")
"""


@dataclass
class Made:
    """What a family's commands left, in `folder`; `common` is what they share."""

    foreign: Foreign
    folder: Path
    common: list[str]

    @property
    def names(self) -> str:
        return f"intervals.names=[{','.join(self.foreign.names)}]"

    @property
    def family(self) -> Any:
        return get_family(self.foreign.facts.name, self.foreign.arch)

    def inputs(self) -> dict[str, Any]:
        """Arguments of a forward of two samples."""
        config = DataConfig(held_out=0.4)
        return CachedStream(self.family, self.folder / "data", config, 3, 2, held_out=False)(0).inputs

    def load(self, folder: str) -> Any:
        return self.foreign.transformer_class.from_pretrained(self.folder / folder / "transformer").eval()

    def pipeline(self) -> Any:
        index = json.loads((self.folder / "teacher" / "model_index.json").read_text())
        without = {name: None for name, entry in index.items() if entry == [None, None]}
        return DiffusionPipeline.from_pretrained(self.folder / "teacher", **without)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Made]]:
    """Every family, registered while this file runs, with its runs `detected` and `pruned`."""
    found = {}
    for name, foreign in FOREIGN.items():
        register(foreign.facts)
        folder = tmp_path_factory.mktemp(name)
        foreign.write_teacher(folder / "teacher")
        foreign.write_cache(folder / "data")
        paths = [f"model.path={folder / 'teacher'}", f"data.cache={folder / 'data'}", f"paths.runs_dir={folder}"]
        found[name] = this = Made(foreign, folder, [*SETTINGS, *paths])
        succeed(*this.common, "name=detected", "stages=[probe,detect]")
        succeed(
            *this.common,
            "name=pruned",
            this.names,
            f"budget.params={foreign.budget}",
            "stages=[depth,plan,finetune,export]",
        )
    yield found
    for name in FOREIGN:
        del FAMILIES[name]


@pytest.fixture(params=FOREIGN)
def one(request: pytest.FixtureRequest, made: dict[str, Made]) -> Made:
    return made[request.param]


def equal(left: Any, right: Any) -> bool:
    """Whether two outputs, tensors or lists of them, are equal bit for bit."""
    if isinstance(left, list):
        return len(left) == len(right) and all(map(equal, left, right))
    return torch.equal(left, right)


@torch.no_grad()
def test_a_block_called_with_the_recorded_arguments_answers_alike(one: Made) -> None:
    """This is what a family has to see to: distillation relies on it."""
    transformer, inputs, seen = one.load("teacher"), one.inputs(), []
    masks = one.family.masks(inputs)

    def check(call: Any) -> None:
        seen.append(call.key)
        block = stack_of(transformer, call.stack)[call.index]
        again = one.family.streams_out(call.stack, block.forward(**call.kwargs), inputs)
        for stream, features in call.outputs.items():
            assert torch.equal(again[stream], features)
            assert masks[stream] is None or masks[stream].shape == features.shape[:2]

    observe(one.family, transformer, inputs, check)
    assert seen == list(one.family.blocks(transformer))


def test_detection_covers_every_stack_and_keeps_the_last_blocks(one: Made) -> None:
    plan = json.loads((one.folder / "detected" / "plan" / "plan.json").read_text())
    facts = one.foreign.facts
    assert plan["intervals"].keys() == plan["num_layers"].keys() == facts.stacks.keys()
    for stack, pairs in plan["intervals"].items():
        assert (one.folder / "detected" / "plan" / f"curves_{stack}.png").exists()
        assert all(v < plan["num_layers"][stack] - facts.last_blocks for _, v in pairs)
    assert any(plan["intervals"].values())


def test_probes_are_of_the_streams_that_a_block_has(made: dict[str, Made]) -> None:
    def probes(name: str) -> set[str]:
        (folder,) = (made[name].folder / "cache" / "probes").iterdir()
        return set(Probes.load(folder).weights)

    assert {key for key in probes("sd3") if ".4." in key} == {"transformer_blocks.4.image"}
    assert {key for key in probes("hunyuan_video") if REFINER in key} == {f"{REFINER}.{n}.text" for n in range(4)}
    assert probes("wan") == {f"blocks.{n}.image" for n in range(6)}


def test_curves_stop_where_a_stream_does(made: dict[str, Made]) -> None:
    curves = json.loads((made["sd3"].folder / "detected" / "plan" / "curves.json").read_text())["cka"]
    streams = curves["transformer_blocks"]
    assert [value is None for value in streams["text"][0]] == [False] * 4 + [True]
    assert streams["mean"][0][4] == streams["image"][0][4] is not None
    assert streams["mean"][0][3] == pytest.approx((streams["image"][0][3] + streams["text"][0][3]) / 2)


def test_the_export_is_the_tuned_model_to_plain_diffusers(made: dict[str, Made]) -> None:
    for one in made.values():
        index = json.loads((one.folder / "pruned" / "export" / "model_index.json").read_text())
        without = {name: None for name, entry in index.items() if entry == [None, None]}
        torch.save({"inputs": one.inputs(), "without": without}, one.folder / "given.pt")
    folders = [str(one.folder) for one in made.values()]
    subprocess.run([sys.executable, "-c", WITHOUT_PPCL, *folders], check=True, capture_output=True)
    for one in made.values():
        module, output = torch.load(one.folder / "plain.pt")
        assert module.startswith("diffusers.models.")
        tuned, teacher = one.load("pruned/finetuned"), one.load("teacher")
        with torch.no_grad():
            assert equal(output, tuned(**one.inputs())[0])
            assert not equal(output, teacher(**one.inputs())[0])
        plugged = json.loads((one.folder / "pruned" / "finetuned" / "ppcl.json").read_text())["plugged"]
        assert plugged
        for stack, key in one.foreign.facts.stacks.items():
            count = len(stack_of(teacher, stack))
            pairs = [pair for name in plugged for s, pair in [read_plug_name(name)] if s == stack]
            assert tuned.config[key] == len(stack_of(tuned, stack)) == len(kept_layers(count, pairs))


def test_a_plan_without_a_budget_counts_what_is_left(one: Made) -> None:
    succeed(*one.common, one.names, "name=counted", "stages=[plan]")
    plan = json.loads((one.folder / "counted" / "plan" / "plan.json").read_text())
    pairs: dict[str, list[Any]] = {stack: [] for stack in one.foreign.facts.stacks}
    for stack, pair in filter(None, map(read_plug_name, one.foreign.names)):
        pairs[stack].append(pair)
    arch = dict(one.foreign.arch)
    for stack, key in one.foreign.facts.stacks.items():
        arch[key] = len(kept_layers(arch[key], pairs[stack]))
    assert plan["intervals"] == {stack: [list(p) for p in found] for stack, found in pairs.items() if found}
    left = one.foreign.transformer_class(**arch)
    assert plan["parameters"]["student"] == sum(parameter.numel() for parameter in left.parameters())


def test_the_card_shows_how_to_load_what_does_not_draw(one: Made) -> None:
    card = (one.folder / "pruned" / "export" / "README.md").read_text()
    assert "DiffusionPipeline.from_pretrained(" in card
    assert "vae=None" in card
    assert "image = pipeline(" not in card
    assert "pipeline_tag" not in card


NO_STACK = "the model has no block stack blocsk (it has blocks)."
NAMES, GIVEN = "intervals.names=", "width.source=given"
TEACHERS = "takes in block 4, but from block 4 on they must stay the teacher's in this family."
BOTH_WAYS = "intervals.names and intervals.transformer_blocks exclude each other: give all in one way."
# By arguments: the sentence that refuses them.
REFUSED = {
    "wan": {
        (f"{NAMES}[blocsk.3-4]",): f"{NAMES}blocsk.3-4: {NO_STACK}",
        (f"{NAMES}[blocks.3]",): f"{NAMES}blocks.3 is no name: write STACK.U-V, such as blocks.3-4.",
        (f"{NAMES}[blocks.3-6]",): f"{NAMES}blocks.3-6 is out of range; the model's blocks are 0 to 5.",
        (f"{NAMES}[blocks.3-4,blocks.2-3]",): f"{NAMES}blocks.3-4 overlaps or precedes [2, 3]; "
        "intervals are disjoint and ordered.",
        (
            "intervals=from_plan",
            f"{NAMES}[blocks.1-2]",
        ): "intervals.names and intervals=from_plan exclude each other: give one.",
        (GIVEN, "width.names=[blocsk.3.ffn]"): f"width.names=blocsk.3.ffn: {NO_STACK}",
        (GIVEN, "width.names=[blocks.ffn]"): "width.names=blocks.ffn is no name: "
        "write STACK.N.text or STACK.N.ffn, such as blocks.3.ffn.",
        ("width.names=[blocks.3.ffn]",): "width.names is read only with width.source=given; it is none.",
    },
    "sd3": {
        (f"{NAMES}[transformer_blocks.3-4]",): f"{NAMES}transformer_blocks.3-4 {TEACHERS}",
        ("intervals.transformer_blocks=[[3,4]]",): f"intervals.transformer_blocks: [3, 4] {TEACHERS}",
        (f"{NAMES}[transformer_blocks.1-2]", "intervals.transformer_blocks=[[1,2]]"): BOTH_WAYS,
    },
}


@pytest.mark.parametrize(
    ("family", "arguments"), [(family, arguments) for family, refused in REFUSED.items() for arguments in refused]
)
def test_names_that_are_wrong_are_refused(
    made: dict[str, Made], monkeypatch: pytest.MonkeyPatch, family: str, arguments: tuple[str, ...]
) -> None:
    """In one sentence, before anything is loaded."""
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("a model is loaded"))
    outcome = ppcl(*made[family].common, "name=refused", "stages=[depth]", *arguments)
    assert outcome.code == 2
    assert outcome.err.strip() == f"ppcl: {REFUSED[family][arguments]}"


def test_a_family_without_drawing_says_so(made: dict[str, Made]) -> None:
    outcome = ppcl(*made["wan"].common, "name=refused", "data=shapes", "data.cache=null", "stages=[probe]")
    assert outcome.code == 2
    assert "model.family=wan encodes and draws no pictures: use data.cache=FOLDER" in outcome.err


def test_students_learn_from_boundaries_as_beside_the_teacher(made: dict[str, Made]) -> None:
    """Of a family that finds its streams by the forward's inputs, which the boundaries hold too."""
    one = made["z_image"]
    bounded = [*one.common, one.names, "name=bounded", "distill.from_boundaries=true"]
    succeed(*bounded, "stages=[boundaries]")
    succeed(*bounded, "stages=[depth]")
    assert_same_tensors(plug_tensors(one.folder / "bounded"), plug_tensors(one.folder / "pruned"))


def test_a_streamed_teacher_with_nested_stacks_gives_the_same_probes(made: dict[str, Made], tmp_path: Path) -> None:
    one = made["hunyuan_video"]
    succeed(*one.common, f"paths.runs_dir={tmp_path}", "model.streaming=true", "stages=[probe]")
    folders = [next((folder / "cache" / "probes").iterdir()) for folder in (one.folder, tmp_path)]
    assert folders[0].name == folders[1].name
    whole, streamed = (dict(Probes.load(folder).weights) for folder in folders)
    assert_same_tensors(whole, streamed)


@torch.no_grad()
def test_plugs_go_into_a_loaded_pipeline(made: dict[str, Made]) -> None:
    one = made["wan"]
    pipeline, inputs = one.pipeline(), one.inputs()
    before = pipeline.transformer(**inputs)[0]
    board = package.plug(pipeline, one.folder / "pruned" / "plugs")
    assert board.names == one.foreign.names
    assert len(pipeline.transformer.blocks) == 3
    state, tensors = one.load("teacher").state_dict(), plug_tensors(one.folder / "pruned")
    by_hand = one.foreign.transformer_class(**one.foreign.arch | {"num_layers": 3}).eval()
    places = [("", "blocks.0."), ("blocks.1-2/", "blocks.1."), ("blocks.3-5/", "blocks.2.")]
    kept = {key: value for key, value in state.items() if not key.startswith("blocks.") or key.startswith("blocks.0.")}
    for plug, place in places[1:]:
        kept |= {place + key.removeprefix(plug): value for key, value in tensors.items() if key.startswith(plug)}
    by_hand.load_state_dict(kept)
    assert torch.equal(pipeline.transformer(**inputs)[0], by_hand(**inputs)[0])
    board()
    assert torch.equal(pipeline.transformer(**inputs)[0], before)
