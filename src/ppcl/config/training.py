"""The keys of trainings, and of how they are watched: `distill`, `finetune`, `pretrain` and `watch`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ppcl.config.bounds import MOST_RATE, MOST_WEIGHT
from ppcl.options import option


@dataclass
class TrainingConfig:
    """Settings of distillation and fine-tuning: AdamW, linear warm-up, cosine decay. The defaults are the paper's.

    `batch_size`: samples per step, over all ranks together.
    `accumulate`: how many smaller batches these samples are divided into, one after another, which takes less memory
        and more time. The gradients are their mean.
    `lr`: learning rate. None if `relative_update` sets the rates.
    `min_lr_ratio`: the learning rate at the end, relative to `lr`.
    `warmup_steps`: steps over which the learning rate rises to `lr`.
    `max_grad_norm`: gradients with a larger norm are scaled down to it. None: no clipping.
    `optimizer_states`: how the optimiser stores its states between steps: `float32`, or with less memory `bfloat16` or
        `8bit`, see `ppcl.training.states`. Weights are float32 in any case.
    `gradient_checkpointing`: recompute activations in the backward pass, which takes less memory and more time.
    `checkpoint_every`: steps from one checkpoint to the next. A killed training resumes from the last one.
    `checkpoint_minutes`: minutes from one checkpoint to the next where that comes first. None: steps alone decide.
    """

    steps: int = option(6000, least=1)
    batch_size: int = option(2, least=1)
    accumulate: int = option(1, least=1, identity=False)
    lr: float | None = option(1e-5, above=0, most=MOST_RATE)
    min_lr_ratio: float = option(0.0, least=0, most=1)
    warmup_steps: int = option(16, least=0)
    beta1: float = option(0.9, least=0, below=1)
    beta2: float = option(0.95, least=0, below=1)
    weight_decay: float = option(0.02, least=0, most=1000)
    max_grad_norm: float | None = option(None, above=0, most=1e9)
    optimizer_states: str = option("float32", choices=("float32", "bfloat16", "8bit"), before="float32")
    gradient_checkpointing: bool = option(True, identity=False)
    checkpoint_every: int = option(500, least=1, identity=False)
    checkpoint_minutes: float | None = option(15.0, least=0, most=100_000, identity=False)


@dataclass
class DistillConfig(TrainingConfig):
    """Depth distillation (stage 1.3, Eq. 6-7): how students are trained to replace the intervals.

    `mode`: `parallel` gives every student the teacher's own activations as input. `sequential` gives it the output of
        the student before it (an ablation of the paper). `none` trains no students: each interval is cut to its first
        block.
    `init`: what a student of the interval [u, v] starts from: the `first` block u (the paper), the `middle` block
        (u + v) // 2 (the authors' script), or the `average` of blocks u to v.
    `losses`: weights, by name, of the losses between the student's output and the teacher's. `ppcl.distill.losses`
        defines `direction` (Eq. 6), `magnitude`, `relative` and `relative_per_token`.
    `optimizer`: `adamw`, or `muon` for the matrices inside blocks and AdamW for all other parameters. Muon needs
        `relative_update`.
    `relative_update`: the learning rate relative to the size of each parameter: 0.05 moves a matrix by 5% of its RMS a
        step. One value suits models of all widths, see `ppcl.training.optimizers`. None: `lr` is the learning rate.
    `magnitude_weight`: an older key, which is added to `losses.magnitude`.
    `intervals`: names of the intervals to train, and to store boundaries of, such as `transformer_blocks.3-5`. None:
        all.
    `groups`: into how many groups the intervals are divided, which are trained one after another to save memory. The
        students are the same. `auto`: as few as fit on the device.
    `from_boundaries`: whether to read the teacher's activations from disk, where `stages=[boundaries]` stored them.
    `boundaries`: the folder of these activations. None: a folder in the cache.
    `replay`: training steps per stored batch. At r, `steps` / r batches are stored, and each is used r times.
    """

    mode: str = option("parallel", choices=("parallel", "sequential", "none"))
    init: str = option("first", choices=("first", "middle", "average"))
    losses: dict[str, float] = option(
        factory=lambda: {"direction": 1.0}, least=0, most=MOST_WEIGHT, before={"direction": 1.0}
    )
    optimizer: str = option("adamw", choices=("adamw", "muon"), before="adamw")
    relative_update: float | None = option(None, above=0, most=MOST_RATE, before=None)
    magnitude_weight: float = option(0.0, least=0, most=MOST_WEIGHT)
    intervals: list[str] | None = option(None, identity=False)
    groups: Any = option(1, most=1000, identity=False)
    from_boundaries: bool = option(False, identity=False)
    boundaries: str | None = option(None, identity=False)
    replay: int = option(1, least=1, identity=False)


@dataclass
class FinetuneConfig(TrainingConfig):
    """Fine-tuning (stage 3) of the pruned model as a whole, with the students and projectors that the plan has chosen.

    Without a budget that is all of them.

    `lora_rank`: above 0 trains a LoRA of that rank on all linear layers of the blocks; 0 trains all parameters.
    `optimizer`: `adamw`, or `muon` for the matrices inside blocks, with learning rate `muon_lr`, and AdamW for the
        rest.
    `relative_update`: as in `distill`, in place of `lr` and `muon_lr`.
    `recorded`: whether the teacher's velocity of all steps is written to disk first, so that the teacher is not in
        memory while the model is tuned. It goes with `feature_weight` 0 and one process.
    `output_weight`: weight of the squared distance to the teacher's velocity, ||v_S - v_T||^2.
    `flow_weight`: weight of the flow-matching loss on the data, ||v_S - (n - x_0)||^2.
    `feature_weight`: weight of the distance between the image stream of each block and that of the teacher's block
        which it replaces. The paper does not have it.
    `feature_loss`: what that distance is. `relative`: the squared error by the teacher's squared features, as the mean
        over blocks. `masked`: the mean squared error without extreme values (TinyFusion), as the mean over blocks.
        `summed`: the mean squared error, as the sum over blocks (HierarchicalPrune).
    `feature_decay`: whether `feature_weight` falls linearly to 0 over the training.
    `mask_sigmas`: with `masked`, a value that is so many standard deviations or more from the mean of its sample counts
        as 0. Student and teacher are masked by themselves.
    `trains`: `all` parameters, or those `after_first_removed`: the embedders and all blocks before the first removed
        block stay as they are, later blocks and the output head are trained (HierarchicalPrune).
    `ema_decay`: above 0 keeps an exponential moving average of the weights with that decay as the result.
    """

    steps: int = option(1000, least=1)
    batch_size: int = option(4, least=1)
    max_grad_norm: float | None = option(1.0, above=0, most=1e9)
    checkpoint_every: int = option(250, least=1, identity=False)
    lora_rank: int = option(0, least=0, before=0)
    optimizer: str = option("adamw", choices=("adamw", "muon"))
    muon_lr: float | None = option(0.01, above=0, most=MOST_RATE)
    relative_update: float | None = option(None, above=0, most=MOST_RATE, before=None)
    recorded: bool = option(False, identity=False)
    output_weight: float = option(1.0, least=0, most=MOST_WEIGHT)
    flow_weight: float = option(0.0, least=0, most=MOST_WEIGHT)
    feature_weight: float = option(0.0, least=0, most=MOST_WEIGHT)
    feature_loss: str = option("relative", choices=("relative", "masked", "summed"), before="relative")
    feature_decay: bool = option(False, before=False)
    mask_sigmas: float = option(2.0, above=0, most=1000, before=2.0)
    trains: str = option("all", choices=("all", "after_first_removed"), before="all")
    ema_decay: float = option(0.0, least=0, below=1)


@dataclass
class PretrainConfig:
    """Training of an embedded teacher by flow matching, for `stages=[pretrain]`.

    `init`: the folder of an earlier teacher, or `embedded:NAME`, to continue from. A teacher of another family must
        have a transformer of the same shape, and only its transformer is used. None: random weights.
    `num_layers`: the number of blocks. None: as many as the model's builder makes by default.
    `categories`: the categories to train on. One that is named twice is drawn twice as often. None: those of the model,
        equally often.
    `muon_lr`, `adam_lr`: learning rates of Muon, for the matrices inside blocks, and of AdamW, for all other
        parameters.
    `text_encoder_lr`: learning rate of AdamW for the text encoder, which is then trained too. None: it stays as it is.
    `warmup_steps`: steps over which all rates rise linearly.
    `decay`: the share of `steps`, at the end, over which they fall linearly to 0.
    `checkpoint_every`, `checkpoint_minutes`: as in `distill`.
    """

    init: str | None = None
    num_layers: int | None = option(None, least=1, most=1000)
    categories: list[str] | None = option(None, before=None)
    steps: int = option(6500, least=1)
    batch_size: int = option(64, least=1)
    muon_lr: float = option(0.02, above=0, most=MOST_RATE)
    adam_lr: float = option(2e-3, above=0, most=MOST_RATE)
    text_encoder_lr: float | None = option(None, above=0, most=MOST_RATE, before=None)
    warmup_steps: int = option(50, least=1)
    decay: float = option(0.4, least=0, most=1)
    checkpoint_every: int = option(250, least=1, identity=False)
    checkpoint_minutes: float | None = option(15.0, least=0, most=100_000, identity=False)


@dataclass
class WatchConfig:
    """How a training is measured while it runs. The result does not depend on it.

    `heldout`: how many times held-out losses are measured after the start, evenly spaced. 0: only before and after the
        training.
    `batches`: held-out batches of each measurement, of as many samples as a step has.
    `share`: the time of held-out losses by that of the steps, at most. Short trainings are therefore measured less
        often. It also bounds the forwards that pictures take, as a share of those that the training takes.
    `pictures`: how many times the pruned model draws sample pictures after the start, evenly spaced. Fewer in short
        trainings, by `share`. The teacher draws them once, to compare. 0: none are drawn.
    `prompts`: how many of the first held-out captions are drawn, each from a noise of its own.
    `picture_steps`: denoising steps of each picture, which has no guidance.
    """

    heldout: int = option(8, least=0, identity=False)
    batches: int = option(2, least=1, identity=False)
    share: float = option(0.04, least=0, most=1000, identity=False)
    pictures: int = option(2, least=0, identity=False)
    prompts: int = option(4, least=1, most=100, identity=False)
    picture_steps: int = option(12, least=1, most=1000, identity=False)
