"""A command prints nothing of libraries that nobody can act on, and all that says that something was left out."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from commands import INTERVALS, ppcl_process, succeed
from diffusers import DiffusionPipeline, QwenImagePipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from ppcl.quiet import quiet_messages

# Several commands in one process, which would otherwise spend its time on imports.
COMMANDS = """
import json, sys
from ppcl.cli import main
for command in json.loads(sys.argv.pop()):
    sys.argv[1:] = command
    main()
"""
REFUSED = """
import sys
from ppcl.cli import main
try:
    main()
finally:
    print("imported:", *sorted({"torch", "diffusers", "lightning"} & {*sys.modules}))
"""
WEIGHTS = "diffusion_pytorch_model.safetensors"


@contextmanager
def said_by(library: str) -> Iterator[list[str]]:
    """What a library's handlers are given."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(library).addHandler(handler)
    yield said
    logging.getLogger(library).removeHandler(handler)


@pytest.fixture
def lora(teacher: Path, tmp_path: Path) -> Path:
    transformer = DiffusionPipeline.from_pretrained(teacher).transformer
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "img_mlp.net.2"], init_lora_weights=False))
    QwenImagePipeline.save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(transformer))
    return tmp_path / "lora" / "pytorch_lora_weights.safetensors"


def test_every_stage_is_quiet(settings: list[str], lora: Path, tmp_path: Path) -> None:
    common = [*settings, f"paths.runs_dir={tmp_path}", INTERVALS]
    tuned = ["finetune=tiny", "finetune.steps=2", "finetune.batch_size=4"]
    width = ["width.source=given", "width.transformer_blocks.text=[5]", "width.steps=2", "width.num_batches=2"]
    given = [*width, *tuned, "budget.params=0.8", "quantize=int8"]
    given.append("generate.variants=[teacher,ppcl-planned,ppcl-finetuned,ppcl-quantized]")
    stages = "stages=[depth,width,plan,finetune,export,quantize,generate,evaluate,report]"
    recovery = [*tuned, "finetune.lora_rank=2", "finetune.optimizer=adamw", "stages=[depth,finetune,export]"]
    drawing = ["stages=[depth,generate]", f"generate.loras=[{lora}]", "generate.variants=[teacher,ppcl-depth]"]
    counting = ["stages=[plan]", "model=qwen_image", "intervals=qwen_image_paper", f"paths.runs_dir={tmp_path}"]
    commands = [
        counting,
        [*settings, f"paths.runs_dir={tmp_path}", "name=detected", "stages=[probe,detect]"],
        [*common, "name=whole", "trainer.progress=true", *given, stages],
        [*common, "name=recovery", *recovery],
        [*common, "name=drawn", *drawing],
    ]
    done = ppcl_process(json.dumps(commands), python=COMMANDS, anew=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\n\n" not in done.stdout  # a bar that is erased leaves an empty line where nothing can be erased
    assert "modules are of blocks that are gone" in done.stdout  # which ppcl says itself


def test_help_and_what_is_refused_import_no_library() -> None:
    for arguments, code in ((["--help"], 0), (["stages=[nonsense]"], 2), (["model=qwen_image", "seed=x"], 2)):
        done = ppcl_process(*arguments, python=REFUSED, anew=True)
        assert done.returncode == code
        assert done.stdout.splitlines()[-1] == "imported:"


def test_what_was_left_out_comes_through(settings: list[str], tmp_path: Path) -> None:
    """Weights that no module takes, and prompts that the encoder does not read to their end."""
    from ppcl.families.flux.tiny import build_pipeline

    build_pipeline(0, 2).save_pretrained(tmp_path / "teacher")
    file = tmp_path / "teacher" / "transformer" / WEIGHTS
    save_file(load_file(file) | {"of_another_model.weight": torch.zeros(2)}, file, {"format": "pt"})
    given = [f"model.path={tmp_path / 'teacher'}", "model.sampling.max_sequence_length=4", f"paths.runs_dir={tmp_path}"]
    with said_by("diffusers") as said:
        succeed(*settings, *given, "stages=[generate]", "generate.variants=[teacher]")
    text = "\n".join(said)
    assert "were not used when initializing" in text
    assert "of_another_model.weight" in text
    assert "The following part of your input was truncated" in text


KEPT = {
    "diffusers.models.modeling_utils": "Some weights of X were not initialized from the model checkpoint",
    "diffusers.loaders.lora_pipeline": "No LoRA keys associated to X found with the prefix='transformer'.",
    "diffusers.pipelines.pipeline_utils": "Keyword arguments {'x': 1} are not expected by X and will be ignored.",
    "diffusers.configuration_utils": "The config attributes {'ppcl': {'a': {}}, 'other': {'b': {}}} were passed to X",
    "transformers.utils.import_utils": "`X` requires torchvision (not installed).",
    "torchao": "Something else.",
    "lightning.pytorch": "Something of Lightning.",
}
DROPPED = {
    "torchao": "Failed to load /some/where/_C_cutlass.abi3.so: Could not load this library: /some/where",
    "torch.utils._pytree": "<enum 'Kind'> is an Enum subclass and is now natively supported",
    "transformers.utils.import_utils": "`XImageProcessor` requires torchvision (not installed); falling back to `XPil`",
    "diffusers.pipelines.pipeline_utils": "Expected types for vae: (<class 'A'>,), got <class 'B'>.",
    "diffusers.configuration_utils": "The config attributes {'ppcl': {'a': {}}, 'auto_map': {}} were passed to X",
    "diffusers.models.modeling_utils": "There are modules in X that should be kept in float32: []. Casting",
}


@pytest.mark.parametrize("kept", [True, False])
def test_filters_tell_messages_of_one_logger_apart(kept: bool) -> None:
    quiet_messages()
    quiet_messages()  # as where several commands share a process
    for name, message in (KEPT if kept else DROPPED).items():
        with said_by(name) as said:
            logging.getLogger(name).warning(message)
        assert said == [message] * kept
    named = "There are modules in X that should be kept in float32: ['norm']. Casting"
    with said_by("diffusers.models.modeling_utils") as said:
        logging.getLogger("diffusers.models.modeling_utils").warning(named)
    assert said == [named]


def test_warnings_of_libraries_are_shown_unless_they_announce_a_change() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        quiet_messages()
        for category in (UserWarning, FutureWarning, DeprecationWarning):
            warnings.warn_explicit("of a library", category, "file.py", 1, module="diffusers.models.x")
        warnings.warn_explicit("Found 3 module(s) in eval mode at the start of training.", UserWarning, "file.py", 2)
    assert [item.category for item in caught] == [UserWarning]
