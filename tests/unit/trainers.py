"""Trainings of a few steps, without a run around them."""

import lightning as L
import torch

from ppcl.data.batches import StepLoader


def train(module, make_batch, lengths, steps=3, callbacks=None):
    """Train for `steps` batches of prompts with `lengths` tokens; returns the state it ended with."""
    torch.manual_seed(0)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, StepLoader(lambda step: make_batch(step, lengths), steps))
    assert trainer.global_step == steps
    return state_of(module)


def state_of(module):
    """A copy of its state."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
