"""When sample pictures are drawn during a training, and why not. This depends on the configuration alone."""

from __future__ import annotations

from ppcl.context import Run
from ppcl.validation.model import has_vae, model_folder

# How many forwards of a model a step takes for each of its samples, at least. A backward pass counts as two.
_FORWARDS = {"depth": 1, "width": 1, "finetune": 4}


def picture_steps(run: Run, stage: str) -> list[int]:
    """Return the steps of a training after which pictures are drawn: evenly spaced, with 0 and the last one.

    They are `watch.pictures` after 0, or fewer, so that all pictures, with those of the teacher, take at most
    `watch.share` of the training's own forwards. Where that allows less than two sets there are none.
    """
    config = run.config
    settings, num_steps = config.watch, num_steps_of(run, stage)
    batch_size = (config.finetune if stage == "finetune" else config.distill).batch_size
    allowed = settings.share * num_steps * batch_size * _FORWARDS[stage]
    sets = int(allowed / (settings.prompts * settings.picture_steps)) - 1  # those of the teacher count as one
    count = min(settings.pictures, sets - 1, num_steps)  # and those at the start
    return [round(number * num_steps / count) for number in range(count + 1)] if count > 0 else []


def num_steps_of(run: Run, stage: str) -> int:
    """Return the number of steps that a stage trains for."""
    config = run.config
    return {"depth": config.distill.steps, "width": config.width.steps, "finetune": config.finetune.steps}[stage]


def why_no_pictures(run: Run, stage: str) -> str:
    """Return why a training draws no sample pictures, as part of a sentence; empty if it draws them or none are wanted.

    A lack of memory is no matter of this.
    """
    config, family, folder = run.config, run.family, model_folder(run.config.model)
    if not config.watch.pictures:
        return ""
    if config.strategy.kind == "fsdp":
        return "strategy=fsdp leaves no rank a whole model"
    if config.model.streaming:
        return "model.streaming=true would read the whole model for each of their steps"
    if stage == "depth" and config.distill.from_boundaries:
        return "distill.from_boundaries=true trains without the teacher"
    if stage == "finetune" and config.finetune.recorded:
        return "finetune.recorded=true trains without the teacher"
    if config.data.name == "prompts":
        return "with data=prompts trainings load the transformer alone, and drawing takes the whole pipeline"
    if not family.decodes:
        return f"model.family={family.name} has no method decode_latents"
    if folder is not None and not (has_vae(folder) and (folder / "vae").is_dir()):
        return f"{folder} has no VAE"
    if not picture_steps(run, stage):
        return f"{num_steps_of(run, stage)} steps are too few for watch.share={config.watch.share:g}"
    return ""


def draws_pictures(run: Run, stage: str) -> bool:
    """Return whether a training draws sample pictures, if memory allows it."""
    return run.config.watch.pictures > 0 and not why_no_pictures(run, stage)
