"""What a user gets wrong ends with one sentence and exit code 2, before any model is loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import INTERVALS, NUM_LAYERS, PLUG_NAMES, REPOSITORY, Outcome, ppcl, ppcl_process, succeed

from ppcl.artifacts.files import read_json, write_json
from ppcl.artifacts.headers import Header, fingerprint

DRAW, ABOVE = "stages=[generate]", "generate.teacher_above=0.9"
PICTURE = REPOSITORY / "experiments/demo/samples.png"
GIVEN = "width.source=given"
TEXT, FFN = "width.transformer_blocks.text=[{}]", "width.transformer_blocks.ffn=[{}]"


def assert_one_sentence(outcome: Outcome, *fragments: str) -> None:
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.err.startswith("ppcl: ")
    assert outcome.err.endswith("\n")
    assert len(outcome.err.splitlines()) == 1, outcome.err
    for fragment in fragments:
        assert fragment in outcome.err


@pytest.fixture
def command(settings: list[str], tmp_path: Path) -> list[str]:
    return [*settings, f"paths.runs_dir={tmp_path / 'runs'}", "name=bad"]


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading the teacher fails the test: of 40 GB nobody wants to hear afterwards that a key was misspelt."""
    import diffusers

    def load(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", load)


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["stages=[probe,distil]"], ["stages=distil", "depth"]),
        (["stages=[]"], ["stages=[]"]),
        ([DRAW, "generate.teacher_above=1.5"], ["generate.teacher_above=1.5", "at least 0 and at most 1"]),
        ([DRAW, "generate.teacher_above=-0.1"], ["generate.teacher_above=-0.1"]),
        ([DRAW, ABOVE, "generate.variants=[teacher]"], [ABOVE, "no effect", "generate.variants"]),
        ([DRAW, ABOVE, "generate.offload=model", "generate.variants=[removed]"], [ABOVE, "generate.offload=model"]),
        ([DRAW, ABOVE, "generate.controlnet=DIR", f"generate.control_image={PICTURE}"], [ABOVE, "generate.controlnet"]),
        (["stages=[depth,export]", "model.streaming=true"], ["stages=[export]", "model.streaming=true", "of its own"]),
        (["stages=[depth]", "distill.mode=sequential", "model.streaming=true"], ["sequential", "model.streaming=true"]),
        (["stages=[probe]", "probe.init=zero"], ["probe.init=zero", "probe.train_steps"]),
        (["paths.base_run=runs/nowhere"], ["paths.base_run=runs/nowhere", "no folder"]),
        (["model=flux"], ["model=flux", "qwen_image"]),
        (["recip=paper"], ["recip is no configuration key", "did you mean recipe?"]),
        (["+recipes=paper"], ["recipes is no configuration key", "did you mean recipe?"]),
        (["distil.steps=3"], ["distil.steps is no configuration key", "did you mean distill.steps?"]),
        (["method=ppcl,nonesuch", "stages=[probe,detect]"], ["method=nonesuch", "ppcl_lp_a"]),
        (["distill.learning_rate=1"], ["learning_rate"]),
        (["lr=1"], ["lr"]),
        (["distill.steps"], ["distill.steps"]),
        (["distill.steps=abc"], ["distill.steps", "abc"]),
        (["distill.steps=0"], ["distill.steps=0"]),
        (["distill.lr=-1"], ["distill.lr=-1"]),
        (["distill.mode=serial"], ["distill.mode=serial", "sequential"]),
        (["data.eval_seed=1"], ["eval_seed", "differ"]),
        (["generate.variants=[teacher,student]"], ["student"]),
        (["intervals.transformer_blocks=[[1,3],[3,4]]"], ["[3, 4]", "overlaps", "[1, 3]"]),
        (["intervals.transformer_blocks=[[3,4],[1,2]]"], ["[1, 2]", "[3, 4]"]),
        (["intervals.transformer_blocks=[[4,2]]"], ["[4, 2]", "reversed"]),
        (["intervals.transformer_blocks=[[2,2]]"], ["[2, 2]"]),
        (["intervals.transformer_blocks=[[4,6]]"], ["[4, 6]", "out of range", "0 to 5"]),
        (["intervals.transformer_blocks=[[-1,2]]"], ["[-1, 2]"]),
        (["intervals.transformer_blocks=[[1,2,3]]"], ["[1, 2, 3]"]),
        (["intervals.transformer_blocks=[[1,b]]"], ["b"]),
        (["intervals.transformer_blocks=[[1,2"], ["[[1,2"]),
        (["intervals.single_transformer_blocks=[[1,2]]"], ["single_transformer_blocks"]),
        (["intervals=qwen_image_paper"], ["out of range", "0 to 5"]),
        (["intervals=from_plan"], ["intervals.path"]),
        (["model.path=/nonesuch/teacher"], ["/nonesuch/teacher"]),
        (["model.path=null"], ["model.path"]),
        (["model=tiny_qwen_image", "model.path=null"], ["model.path"]),
        ([INTERVALS, "stages=[depth]", "distill.intervals=[2-3]"], ["distill.intervals=2-3", "1-2"]),
        ([INTERVALS, "stages=[probe,detect]"], ["detect"]),
        (["stages=[depth]"], ["intervals"]),
        ([INTERVALS, "stages=[export]"], ["plugs", *PLUG_NAMES]),
        ([INTERVALS, "stages=[report]", "generate.variants=[teacher]"], ["shows scores", "add evaluate to stages"]),
        (["stages=[generate]", "generate.prompt_file=/nonesuch.txt"], ["/nonesuch.txt"]),
        (["stages=[width]", INTERVALS], ["stages=[width]", "width=auto"]),
        (["width=sideways", "stages=[plan]"], ["width=sideways", "qwen_image_paper"]),
        (["width.source=measured"], ["width.source=measured", "auto"]),
        (["width.source=given", INTERVALS], ["width.source=given", "width.transformer_blocks"]),
        (["width={text:[5]}"], ["width="]),
        ([TEXT.format("5")], ["width.transformer_blocks", "width.source=given"]),
        ([GIVEN, INTERVALS, TEXT.format("4")], ["width.transformer_blocks.text", "block 4", "0-1, 3, 5"]),
        ([GIVEN, INTERVALS, FFN.format("2")], ["width.transformer_blocks.ffn", "block 2", "0-1, 3, 5"]),
        ([GIVEN, INTERVALS, TEXT.format("6")], ["width.transformer_blocks.text", "block 6"]),
        ([GIVEN, INTERVALS, TEXT.format("-1")], ["width.transformer_blocks.text", "block -1"]),
        ([GIVEN, INTERVALS, TEXT.format("5,5")], ["width.transformer_blocks.text", "block 5 twice"]),
        ([GIVEN, INTERVALS, FFN.format("3,0,3")], ["width.transformer_blocks.ffn", "block 3 twice"]),
        ([GIVEN, INTERVALS, TEXT.format("0,1")], ["width.transformer_blocks.text", "block 0"]),
        ([GIVEN, INTERVALS, TEXT.format("x")], ["width.transformer_blocks.text", "x"]),
        (["width=qwen_image_paper", INTERVALS], ["width.transformer_blocks.text", "block 37", "0-1, 3, 5"]),
        (["width=from_plan", INTERVALS], ["width=from_plan", "width.path"]),
        (["width=from_plan", "width.path=/nonesuch.json", INTERVALS], ["width.path", "/nonesuch.json"]),
        (["width.path=/some/plan.json"], ["width.path=/some/plan.json", "width=from_plan"]),
        (["width.text_threshold=2"], ["width.text_threshold=2"]),
        (["width.text_threshold=0"], ["width.text_threshold=0"]),
        (["width.text_output=first"], ["width.text_output=first", "last"]),
        (["width.num_ffn=-1"], ["width.num_ffn=-1"]),
        (["width.num_text=-1"], ["width.num_text=-1"]),
        (["width.num_batches=0"], ["width.num_batches=0"]),
        (["width.steps=-1"], ["width.steps=-1"]),
        (["budget.params=0.6", "budget.latency_ratio=0.5"], ["budget.params", "budget.latency_ratio"]),
        (["budget.params=0.6", "budget.memory_gb=1", "budget.latency_ratio=0.5"], ["budget.memory_gb"]),
        (["budget.params=0"], ["budget.params=0"]),
        ([INTERVALS, "stages=[depth,plan]", "budget.params=1.5"], ["budget.params=1.5", "more than the whole model"]),
        ([INTERVALS, "stages=[depth,plan]", "budget.params=nan"], ["budget.params=nan", "a finite number"]),
        (["stages=[probe,detect]", "method=cka_sensitivity", "method.num_remove=6"], ["method.num_remove=6", "the 5"]),
        (["stages=[probe,detect]", "method.start=5"], ["method.start=5", "no interval"]),
        (
            ["stages=[detect]", "method=shortgpt", "method.min_length=3"],
            ["method.min_length=3 has no effect", "method.rule=shortgpt, which reads start, end, num_remove, params"],
        ),
        (["stages=[detect]", "method=amber", "method.min_cka=0.9"], ["method.min_cka=0.9 has no effect", "stream"]),
        (["stages=[detect]", "method=uniform", "method.stream=text"], ["method.stream=text has no effect"]),
        (
            ["stages=[detect]", "method=cka_sensitivity", "method.num_remove=2", "method.stream=text"],
            ["method.stream=text has no effect"],
        ),
        (["stages=[probe,detect]", "method.threshold=0.9"], ["method.threshold=0.9 has no effect", "min_length"]),
        (
            ["model=tiny_dit", "model.path=embedded:tiny_dit", "stages=[probe,detect]", "method.stream=text"],
            ["method.stream=text", "model.family=dit have no text stream", "mean, or image"],
        ),
        (["stages=[probe,detect,depth,width]", GIVEN, FFN.format("6")], ["transformer_blocks.ffn", "block 6"]),
        (["stages=[depth,width]", "width=auto", "width.num_ffn=0", "width.num_text=0"], ["width.num_ffn=0"]),
        ([INTERVALS, "stages=[depth,generate,evaluate]", "generate.variants=[removed]"], ["add teacher to", "removed"]),
        (["budget.memory_gb=-1"], ["budget.memory_gb=-1"]),
        (["budget.latency_ratio=0"], ["budget.latency_ratio=0"]),
        (["budget.params=small"], ["budget.params", "small"]),
        (["budget.cost=price"], ["budget.cost=price", "velocity"]),
        (["budget.num_batches=0"], ["budget.num_batches=0"]),
        (["model=qwen_image", "budget.params=0.6", "stages=[plan]"], ["budget.params", "model.path"]),
        (["stages=[generate]", "generate.name=a/b", "generate.prompt=x"], ["generate.name=a/b is no name of a folder"]),
        ([INTERVALS, "stages=[generate]", "generate.variants=[teacher,ppcl-width]"], ["ppcl-width", "width=auto"]),
        ([INTERVALS, "stages=[plan]", "budget.params=0.6"], ["plugs", *PLUG_NAMES, "stages=[depth]"]),
        (["finetune.output_weight=0", "finetune.flow_weight=0"], ["finetune.output_weight", "finetune.flow_weight"]),
        (["finetune.output_weight=-1"], ["finetune.output_weight=-1"]),
        (["finetune.ema_decay=1"], ["finetune.ema_decay=1"]),
        (["finetune.ema_decay=-0.1"], ["finetune.ema_decay=-0.1"]),
        (["finetune.optimizer=sgd"], ["finetune.optimizer=sgd", "muon"]),
        (["distill.optimizer_states=4bit"], ["distill.optimizer_states=4bit", "8bit"]),
        (["distill.optimizer_states=8bit", "strategy=fsdp"], ["distill.optimizer_states=8bit", "strategy=fsdp"]),
        (["distill.optimizer_states=bfloat16", "distill.beta2=0.999"], ["beta of 0.999", "distill.beta2"]),
        (["finetune.steps=0"], ["finetune.steps=0"]),
        (["finetune.batch_size=0"], ["finetune.batch_size=0"]),
        (["finetune.lr=-1"], ["finetune.lr=-1"]),
        (["finetune.muon_lr=-1"], ["finetune.muon_lr=-1"]),
        ([INTERVALS, "stages=[finetune]"], ["plugs", *PLUG_NAMES, "stages=[depth]"]),
        ([INTERVALS, "stages=[export]", "export.variant=nonsense"], ["export.variant=nonsense", "ppcl-depth"]),
        ([INTERVALS, "stages=[export]", "export.variant=teacher"], ["export.variant=teacher", "ppcl-depth"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
@pytest.mark.usefixtures("no_model")
def test_argument_is_named(command: list[str], arguments: list[str], fragments: list[str]) -> None:
    stages = [] if any("stages=" in a for a in arguments) else ["stages=[probe,depth]"]
    overridden = {argument.partition("=")[0] for argument in arguments}
    kept = [argument for argument in command if argument.partition("=")[0] not in overridden]
    if "model" in overridden:  # another group: the settings of this one need not fit
        kept = [argument for argument in kept if not argument.startswith("model.")]
    assert_one_sentence(ppcl(*kept, *stages, *arguments), *fragments)
    runs = Path(next(a for a in command if a.startswith("paths.runs_dir=")).partition("=")[2])
    # What was learnt of the teacher stays.
    assert not [path for path in runs.rglob("*") if path.is_file() and path.parent.name != "teachers"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.usefixtures("no_model")
def test_what_this_machine_lacks_is_told_before_the_work(command: list[str]) -> None:
    with_quantize, without = ([INTERVALS, f"stages=[depth,export{more}]"] for more in (",quantize", ""))
    assert_one_sentence(ppcl(*command, *with_quantize, "quantize=nf4"), "quantize.scheme=nf4 needs a CUDA GPU")
    assert_one_sentence(ppcl(*command, *without, "trainer.accelerator=gpu"), "trainer.accelerator=gpu", "no GPU")


@pytest.mark.usefixtures("no_model")
def test_a_missing_token_of_the_hub_is_told_before_the_work(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    outcome = ppcl(*command, INTERVALS, "stages=[depth,export]", "export.push_to_hub=owner/name")
    assert_one_sentence(outcome, "export.push_to_hub=owner/name", "hf auth login", "HF_TOKEN")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("key", [None, "short"])
def test_a_missing_key_of_wandb_is_told_before_the_work(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    kept = [argument for argument in command if argument != "logger=none"]
    outcome = ppcl(*kept, INTERVALS, "stages=[depth]", "logger=wandb", "logger.mode=online")
    assert_one_sentence(outcome, "logger=wandb logger.mode=online", "logger.mode=offline")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("name", ["..", "../../x", "", "cache", "'a\nb'", "/elsewhere", "a/../../b"])
def test_a_run_lies_within_the_folder_of_runs(command: list[str], tmp_path: Path, name: str) -> None:
    """And a refused name leaves no folder, also none beside."""
    (tmp_path / "deep").mkdir()
    kept = [argument for argument in command if not argument.startswith(("name=", "paths.runs_dir="))]
    outcome = ppcl(*kept, f"paths.runs_dir={tmp_path / 'deep' / 'runs'}", "stages=[plan]", f"name={name}")
    assert_one_sentence(outcome, "name=")
    assert [file.name for file in tmp_path.rglob("*") if file.name not in ("deep", "runs")] == []
    assert not (tmp_path.parent / "x").exists()


@pytest.mark.usefixtures("no_model")
def test_keys_of_no_use_are_refused_with_a_recorded_run_too(command: list[str], trained: Path) -> None:
    for override in ("+foo=1", "foo=1", "+model.foo=1", "++distill.foo.bar=1"):
        outcome = ppcl(f"run={trained}", "stages=[plan]", override)
        assert_one_sentence(outcome, "foo is no configuration key")


@pytest.mark.usefixtures("no_model")
def test_width_sets_nobody_selected_are_named(command: list[str], trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "plugs", tmp_path / "runs" / "bad" / "plugs")
    outcome = ppcl(*command, INTERVALS, "width=auto", "stages=[generate]", "generate.variants=[teacher,ppcl-width]")
    assert_one_sentence(outcome, "width=auto", "add width to stages")


@pytest.mark.usefixtures("no_model")
def test_projectors_that_are_missing_are_named(command: list[str]) -> None:
    drawn = ["stages=[generate]", "generate.variants=[ppcl-width]", "distill=none"]  # needs no students
    outcome = ppcl(*command, INTERVALS, GIVEN, FFN.format(0), *drawn)
    assert_one_sentence(outcome, "needs transformer_blocks.0.ffn, which", "stages=[width]")


@pytest.mark.parametrize(
    "arguments",
    [
        ["stages=[detect]"],
        ["stages=[depth]"],
        ["stages=[detect]", "method=shortgpt", "method.min_length=3"],
        [INTERVALS, "stages=[export]"],
        [INTERVALS, "width=auto", "stages=[finetune]"],
        [INTERVALS, "stages=[plan]", "budget.params=0.6"],
        [INTERVALS, DRAW, "distill=none", "generate.variants=[teacher,ppcl-finetuned]"],
        [INTERVALS, "stages=[evaluate]"],
        ["stages=[report]"],
        [INTERVALS, "stages=[depth,report]", "generate.variants=[removed]"],
    ],
    ids="_".join,
)
@pytest.mark.usefixtures("no_model")
def test_explain_refuses_what_the_command_refuses(command: list[str], arguments: list[str], tmp_path: Path) -> None:
    outcome = ppcl(*command, *arguments)
    assert_one_sentence(outcome)
    assert ppcl(*command, *arguments, "explain=true") == outcome
    assert not [*(tmp_path / "runs").glob("bad")]


@pytest.mark.parametrize(("key", "value"), [("text", [3, 5]), ("ffn", [0])])
@pytest.mark.usefixtures("no_model")
def test_width_sets_may_be_given_one_by_one(command: list[str], key: str, value: list[int]) -> None:
    """As the refusal of `width.source=given` without sets says."""
    given = f"width.transformer_blocks.{key}={value}".replace(" ", "")
    outcome = succeed(*command, INTERVALS, GIVEN, given, "stages=[plan]")
    assert f"without {key}: {' '.join(map(str, value))}" in outcome.out


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "no prompt"),
        (b"\n  \n", "no prompt"),
        ("a caf\u00e9".encode("latin-1"), "UTF-8"),
        (None, "no prompt"),
    ],
    ids=["empty", "blank", "latin-1", "folder"],
)
@pytest.mark.usefixtures("no_model")
def test_prompt_file_is_named(command: list[str], tmp_path: Path, content: bytes | None, fragment: str) -> None:
    path = tmp_path / "prompts.txt"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    outcome = ppcl(*command, INTERVALS, "stages=[generate]", f"generate.prompt_file={path}")
    assert_one_sentence(outcome, str(path), fragment)


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (
            json.dumps(
                {
                    "family": "qwen_image",
                    "num_layers": {"transformer_blocks": NUM_LAYERS + 2},
                    "intervals": {"transformer_blocks": [[1, 2]]},
                }
            ),
            ["was made for", str(NUM_LAYERS + 2), str(NUM_LAYERS)],
        ),
        ("{", ["JSON"]),
        ("[]", ["JSON object"]),
        ('{"intervals": {}}', ["pruning plan"]),
        (None, ["does not exist"]),
    ],
    ids=["other depth", "cut", "list", "keys missing", "missing"],
)
@pytest.mark.usefixtures("no_model")
def test_plan_is_named(command: list[str], tmp_path: Path, content: str | None, fragments: list[str]) -> None:
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_text(content)
    outcome = ppcl(*command, "intervals=from_plan", f"intervals.path={path}", "stages=[depth]")
    assert_one_sentence(outcome, str(path), *fragments)


@pytest.mark.usefixtures("no_model")
def test_plan_of_this_run_for_another_model_is_named(command: list[str], chain: Path, tmp_path: Path) -> None:
    path = tmp_path / "runs" / "bad" / "plan" / "plan.json"
    path.parent.mkdir(parents=True)
    plan = read_json(chain / "plan" / "plan.json", "The plan")
    write_json(path, plan | {"num_layers": {"transformer_blocks": 20}})
    assert_one_sentence(ppcl(*command, "stages=[depth]"), str(path), "20")


@pytest.mark.parametrize("keep", [0, 5, 0.5, -1])
@pytest.mark.usefixtures("no_model")
def test_truncated_teacher_is_named(command: list[str], teacher: Path, tmp_path: Path, keep: float) -> None:
    copy = tmp_path / "teacher"
    shutil.copytree(teacher, copy)
    (weights,) = (copy / "transformer").glob("*.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    outcome = ppcl(*command, f"model.path={copy}", "stages=[probe]")
    assert_one_sentence(outcome, str(weights), "truncated")


@pytest.mark.usefixtures("no_model")
def test_folder_that_is_no_pipeline_is_named(command: list[str], tmp_path: Path) -> None:
    assert_one_sentence(ppcl(*command, f"model.path={tmp_path}", "stages=[probe]"), str(tmp_path), "model_index.json")


@pytest.mark.usefixtures("no_model")
def test_pipeline_of_another_family_is_named(command: list[str], teacher: Path, tmp_path: Path) -> None:
    copy = tmp_path / "other"
    shutil.copytree(teacher, copy)
    index = copy / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "StableDiffusionPipeline"}))
    assert_one_sentence(ppcl(*command, f"model.path={copy}", "stages=[probe]"), str(copy), "StableDiffusionPipeline")


def test_a_hub_out_of_reach_is_said(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # read when huggingface_hub is imported
    hub = ["model=qwen_image", "model.path=owner/none", "trainer.check_memory=false"]
    outcome = ppcl_process(*command, *hub, "data=shapes", "stages=[probe]")
    assert outcome.returncode == 2, outcome.stderr
    error = next(line for line in outcome.stderr.splitlines() if line.startswith("ppcl: "))
    assert "model.path=owner/none could not be loaded ([Errno 111] Connection refused); give a pipeline folder" in error
    assert not [*(tmp_path / "runs").rglob("*")]


@pytest.mark.usefixtures("no_model")
def test_truncated_plug_is_named(command: list[str], trained: Path, tmp_path: Path) -> None:
    plugs = tmp_path / "runs" / "bad" / "plugs"
    shutil.copytree(trained / "plugs", plugs)
    cut = plugs / f"{PLUG_NAMES[1]}.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    assert_one_sentence(ppcl(*command, INTERVALS, "stages=[generate]"), str(cut), "truncated")


@pytest.mark.usefixtures("no_model")
def test_plug_of_two_runs_is_named(command: list[str], trained: Path, tmp_path: Path) -> None:
    plugs = tmp_path / "runs" / "bad" / "plugs"
    shutil.copytree(trained / "plugs", plugs)
    shutil.copy(plugs / f"{PLUG_NAMES[0]}.safetensors", plugs / f"{PLUG_NAMES[1]}.safetensors")
    assert_one_sentence(ppcl(*command, INTERVALS, "stages=[generate]"), f"{PLUG_NAMES[1]}.json")


@pytest.mark.usefixtures("no_model")
def test_plugs_of_another_teacher_are_named(
    command: list[str], trained: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same shapes and other weights: nothing would fail, and every number would be wrong."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(trained / "plugs", tmp_path / "runs" / "bad" / "plugs")
    copy = tmp_path / "other"
    shutil.copytree(teacher, copy)
    (weights,) = (copy / "transformer").glob("*.safetensors")
    save_file({key: value + 1 for key, value in load_file(weights).items()}, weights, {"format": "pt"})
    outcome = ppcl(*command, f"model.path={copy}", INTERVALS, "stages=[generate]", "generate.variants=[ppcl-depth]")
    assert_one_sentence(outcome, PLUG_NAMES[0])


@pytest.mark.usefixtures("no_model")
def test_checkpoint_of_another_training_is_named(command: list[str], trained: Path, tmp_path: Path) -> None:
    made_from = json.loads((trained / "plugs" / f"{PLUG_NAMES[0]}.json").read_text())["made_from"]
    made_from |= {"stack": "", "interval": [0, 0], "intervals": PLUG_NAMES}
    made_from["distill"]["relative_update"] = 0.5
    name = fingerprint({"intervals": PLUG_NAMES})
    folder = tmp_path / "runs" / "bad" / "plugs" / f"checkpoint-{name}"
    folder.mkdir(parents=True)
    record = Header("ppcl.depth", made_from).to_json()
    (folder / "checkpoint.json").write_text(json.dumps(record))
    (folder / "last.ckpt").write_bytes(b"not read")
    outcome = ppcl(*command, INTERVALS, "stages=[depth]")
    assert_one_sentence(outcome, str(folder / "checkpoint.json"), "distill.relative_update=0.5, now 0.1")
    assert (folder / "last.ckpt").read_bytes() == b"not read"


@pytest.mark.usefixtures("no_model")
def test_scores_need_pictures(command: list[str], trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "plugs", tmp_path / "runs" / "bad" / "plugs")
    assert_one_sentence(ppcl(*command, INTERVALS, "stages=[evaluate]"), "scores pictures", "add generate to stages")


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["stages=[probe,distil]"], "distil"),
        (["distill.steps=abc"], "abc"),
        (["model=qwen_image", "intervals.transformer_blocks=[[58,60]]"], "[58, 60]"),
    ],
    ids=["stage", "type", "interval"],
)
def test_console_script(tmp_path: Path, arguments: list[str], fragment: str) -> None:
    script = Path(sys.executable).with_name("ppcl")
    done = subprocess.run(
        [str(script), f"paths.runs_dir={tmp_path}", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == ""
    assert_one_sentence(Outcome(done.returncode, done.stdout, done.stderr), fragment)


def test_good_command_after_bad_ones(command: list[str]) -> None:
    """A refusal spoils nothing for the command that follows in the same run folder."""
    assert ppcl(*command, "intervals.transformer_blocks=[[4,9]]", "stages=[plan]").code == 2
    assert "0.667" in succeed(*command, INTERVALS, "stages=[plan]").out
