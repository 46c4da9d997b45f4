"""Drops the libraries' messages that a user of `ppcl` can do nothing about.

Each message is named. Log levels stay as they are, so that all other warnings come through, above all those that
something was left out: unused or missing weights, keys of a LoRA that fit no layer, prompts that were cut.
"""

from __future__ import annotations

import ast
import logging
import re
import warnings
from collections.abc import Callable

# Log messages: the logger, and the beginning of the message.
_MESSAGES = (
    # torchao names every compiled kernel that is not built for this machine, and works without it.
    ("torchao", r"Failed to load \S+\.so: "),
    ("torchao", r"Skipping import of cpp extensions"),
    ("torchao.kernel.intmm", r"Warning: Detected no triton"),
    # torchao registers its enums in a deprecated way.
    ("torch.utils._pytree", r"<enum '\w+'> is an Enum subclass"),
    # torchao has moved classes that only old quantised checkpoints need.
    ("diffusers.quantizers.torchao.torchao_quantizer", r"Unable to import `torchao` Tensor objects"),
    # diffusers advises bfloat16 for what is not quantised; we keep the model's own dtype on purpose.
    ("diffusers.quantizers.torchao.torchao_quantizer", r"You are trying to set torch_dtype to torch\.float\d+ for int"),
    # Pictures are read by PIL; torchvision is not required.
    ("transformers.utils.import_utils", r"`\w+` requires torchvision \(not installed\); falling back"),
    # The pipelines' annotations do not allow for our VAE class, nor for a DiT's labels as strings.
    ("diffusers.pipelines.pipeline_utils", r"Expected types for (vae|id2label): "),
    # A model in a .bin file is read without running code in it, which these call unsafe.
    ("diffusers.models.modeling_utils", r"An error occurred while trying to fetch .*: Error no file named"),
    ("diffusers.models.modeling_utils", r"Defaulting to unsafe serialization\."),
    # The list of modules is empty, so that no module is affected.
    ("diffusers.models.modeling_utils", r"There are modules in \w+ that should be kept in float32: \[\]\."),
)
# Python warnings: the beginning of the message.
_WARNINGS = (
    # The frozen teacher is in eval mode on purpose.
    r"Found \d+ module\(s\) in eval mode at the start of training",
    # Checkpoints of earlier versions of ppcl name a callback of Lightning, whose state no training needs.
    r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided",
    # Losses do not modify a sharded model's output in place.
    r"FSDP2-wrapped module \(\w+\) returned a view tensor",
)
# Deprecation warnings of these libraries are for developers, and are dropped.
_LIBRARIES = r"(lightning|lightning_fabric|pytorch_lightning|torch|torchao|diffusers|transformers|peft|wandb)\b"


def _names_ours_alone(message: str) -> bool:
    """Whether the message is that diffusers ignores config entries, all of which are ours (`ppcl`, `auto_map`)."""
    found = re.match(r"The config attributes (\{.*\}) were passed to", message, re.DOTALL)
    try:
        return found is not None and ast.literal_eval(found[1]).keys() <= {"ppcl", "auto_map"}
    except (ValueError, SyntaxError):  # ours are all literals
        return False


class _Without(logging.Filter):
    """Drops the log records whose message passes one of the tests."""

    def __init__(self, tests: list[Callable[[str], object]]) -> None:
        super().__init__()
        self.tests = tests

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(test(message) for test in self.tests)


def quiet_messages() -> None:
    """Drop the messages above from now on. Imports no library: some libraries already log while they are imported."""
    tests: dict[str, list[Callable[[str], object]]] = {"diffusers.configuration_utils": [_names_ours_alone]}
    for name, pattern in _MESSAGES:
        tests.setdefault(name, []).append(re.compile(pattern).match)
    for name, known in tests.items():
        logger = logging.getLogger(name)
        if not any(isinstance(item, _Without) for item in logger.filters):  # or a second call would add a second one
            logger.addFilter(_Without(known))
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=_LIBRARIES)
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def quiet_progress() -> None:
    """Switch off the loading bars of diffusers and transformers, and Lightning's notes; imports all three."""
    import diffusers
    import lightning
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    for part in (lightning.fabric, lightning.pytorch):  # importing them has set their level
        logging.getLogger(part.__name__).setLevel(logging.WARNING)
