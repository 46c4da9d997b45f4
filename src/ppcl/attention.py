"""The attention kernels of the transformer, as `model.attention_backend` names them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ppcl.config import Config
from ppcl.errors import UsageError
from ppcl.stages import TRAINED


def check_attention(config: Config) -> None:
    """Raise `UsageError` if diffusers has no `model.attention_backend`, or if a training cannot use it."""
    name = config.model.attention_backend
    if name is None:
        return
    from diffusers.models.attention_dispatch import AttentionBackendName  # loads torch

    names = sorted(member.value for member in AttentionBackendName)
    if name not in names:
        raise UsageError(f"model.attention_backend={name} is not one that diffusers has: {', '.join(names)}.")
    training = {"pretrain", *TRAINED} & set(config.stages)
    if "sage" in name and training:
        raise UsageError(
            f"model.attention_backend={name} computes no gradients, which 'stages=[{min(training)}]' needs: use it to "
            "draw, and another one to train."
        )


@contextmanager
def attention(config: Config) -> Iterator[None]:
    """Let every model of diffusers attend with `model.attention_backend` within the context, where it is not None.

    That is the teacher as well as students and pruned models: `set_attention_backend` of diffusers would have to be
    called for each. Raises `UsageError` if the backend's package is missing, and if a batch has a mask that the backend
    does not take.
    """
    name = config.model.attention_backend
    if name is None:
        yield
        return
    from diffusers import attention_backend

    with ExitStack() as stack:
        try:
            stack.enter_context(attention_backend(name))
        except (RuntimeError, ImportError, OSError) as error:
            raise UsageError(f"model.attention_backend={name} cannot be used here: {error}") from None
        try:
            yield
        except (ValueError, RuntimeError) as error:
            if isinstance(error, ValueError) and "attn_mask" in str(error):
                raise UsageError(
                    f"model.attention_backend={name} takes no mask of padded text: use batches of one sample, or "
                    "another backend."
                ) from error
            if re.search("viable backend|FlexAttention", str(error)):  # torch finds out in the first forward
                raise UsageError(f"model.attention_backend={name} cannot be used here: {error}") from error
            raise
