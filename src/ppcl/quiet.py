"""Drops messages of libraries that nobody who runs a `ppcl` command can act on.

Libraries stay at their level of warnings, so that all else comes through; above all what says that something was left
out: weights that were not used or not found, keys of a LoRA that fit nothing, prompts that were cut.
"""

from __future__ import annotations

import ast
import logging
import re
import warnings
from collections.abc import Callable

# Each by the logger that says it, and the beginning of what it says.
_MESSAGES = (
    # torchao names every compiled kernel that has no build for this machine, and does without.
    ("torchao", r"Failed to load \S+\.so: "),
    ("torchao", r"Skipping import of cpp extensions"),
    ("torchao.kernel.intmm", r"Warning: Detected no triton"),
    # It registers its enums in a way that torch will stop to allow.
    ("torch.utils._pytree", r"<enum '\w+'> is an Enum subclass"),
    # It has moved classes that only older quantised checkpoints hold.
    ("diffusers.quantizers.torchao.torchao_quantizer", r"Unable to import `torchao` Tensor objects"),
    # The rest of a quantised model stays in the model's own precision on purpose; diffusers would have it in bfloat16.
    ("diffusers.quantizers.torchao.torchao_quantizer", r"You are trying to set torch_dtype to torch\.float\d+ for int"),
    # Pictures are read by PIL: torchvision is no requirement.
    ("transformers.utils.import_utils", r"`\w+` requires torchvision \(not installed\); falling back"),
    # Pipelines' annotations name neither a VAE class of ours nor the strings that a DiT's labels are stored as.
    ("diffusers.pipelines.pipeline_utils", r"Expected types for (vae|id2label): "),
    # An empty list: there is nothing that casting could have spoilt.
    ("diffusers.models.modeling_utils", r"There are modules in \w+ that should be kept in float32: \[\]\."),
)
# Of those that come as Python's warnings, the beginning.
_WARNINGS = (
    # The teacher is, and does not learn.
    r"Found \d+ module\(s\) in eval mode at the start of training",
    # Checkpoints are meant to hold the model as it is after the step that they name.
    r"Using ModelCheckpoint with manual optimization and every_n_train_steps",
    # Losses read a sharded model's output and change nothing of it in place.
    r"FSDP2-wrapped module \(\w+\) returned a view tensor",
)
# Whose notes on what they are going to change are for those who call them in code.
_LIBRARIES = r"(lightning|lightning_fabric|pytorch_lightning|torch|torchao|diffusers|transformers|peft|wandb)\b"


def _names_ours_alone(message: str) -> bool:
    """Whether diffusers makes nothing of config entries, all of which an export has for others to read."""
    found = re.match(r"The config attributes (\{.*\}) were passed to", message, re.DOTALL)
    try:
        return found is not None and ast.literal_eval(found[1]).keys() <= {"ppcl", "auto_map"}
    except (ValueError, SyntaxError):  # something among them is no literal, which ours all are
        return False


class _Without(logging.Filter):
    """Drops the records whose message one of the tests knows."""

    def __init__(self, tests: list[Callable[[str], object]]) -> None:
        super().__init__()
        self.tests = tests

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(test(message) for test in self.tests)


def quiet_messages() -> None:
    """Drop the messages above. Imports no library, so that it can come before what prints while it is imported."""
    tests: dict[str, list[Callable[[str], object]]] = {"diffusers.configuration_utils": [_names_ours_alone]}
    for name, pattern in _MESSAGES:
        tests.setdefault(name, []).append(re.compile(pattern).match)
    for name, known in tests.items():
        logger = logging.getLogger(name)
        if not any(isinstance(item, _Without) for item in logger.filters):  # as a second call finds it
            logger.addFilter(_Without(known))
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=_LIBRARIES)
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def quiet_progress() -> None:
    """Switch off the bars that diffusers and transformers draw while they load, and Lightning's notes; imports them."""
    import diffusers
    import lightning
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    for part in (lightning.fabric, lightning.pytorch):  # which set a level of their own when they are imported
        logging.getLogger(part.__name__).setLevel(logging.WARNING)
