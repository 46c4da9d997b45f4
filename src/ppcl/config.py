"""The typed configuration: one dataclass for each group of keys, with types, defaults and allowed values.

`conf/` fills these groups, and `ppcl.validation` checks them. Keys that are declared with `option` state their bounds,
and whether artifacts depend on them. No number may be NaN or infinite. None is written `null` on the command line and
in YAML.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from ppcl.options import option
from ppcl.paths import is_single_file

# The models that a run can draw and score, each an arrangement of the teacher, students and projectors:
#   removed: the teacher without blocks u+1 to v of every interval [u, v], untrained: the baseline.
#   ppcl-depth: a student for every interval. ppcl-mixed: for the share `generate.plug_fraction` of them.
#   ppcl-width: all students and all projectors. ppcl-planned: those that 'stages=[plan]' has chosen.
#   ppcl-finetuned: the planned model after fine-tuning. ppcl-quantized: the model of 'stages=[quantize]'.
VARIANTS = ("teacher", "removed", "ppcl-depth", "ppcl-mixed", "ppcl-width", "ppcl-planned", "ppcl-finetuned")
STORED_VARIANTS = (*VARIANTS, "ppcl-quantized")  # the last one exists only after 'stages=[quantize]'

# Bounds that several keys share. Larger rates and weights overflow within a few steps.
MOST_SEED = 2**32 - 1  # numpy takes no larger one
MOST_RATE = 1000
MOST_WEIGHT = 1_000_000


@dataclass
class SamplingConfig:
    """How pictures are drawn. All variants of a run are drawn with the same settings.

    `height`, `width`: the size of a picture in pixels. None, for an edit model: a megapixel, in the aspect ratio of the
        last picture that it is given.
    `num_inference_steps`: denoising steps per picture.
    `true_cfg_scale`: scale of classifier-free guidance. Above 1 every step runs the model twice, with the prompt and
        with `negative_prompt`. Dropped captions of your data are encoded as the same.
    `guidance_scale`: the guidance input of a guidance-distilled model such as FLUX.1-dev; for a DiT, the scale of its
        classifier-free guidance. Other models ignore it.
    `max_sequence_length`: the most prompt tokens that the text encoder passes on.
    `scheduler`: entries that replace those of the model's own scheduler config, such as `shift: 3.0`.
    """

    height: int | None = option(1328, least=8, most=16384)
    width: int | None = option(1328, least=8, most=16384)
    num_inference_steps: int = option(50, least=1, most=1000)
    true_cfg_scale: float = option(4.0, least=0, most=1000)
    negative_prompt: str = ""
    guidance_scale: float = option(3.5, least=0, most=1000)
    max_sequence_length: int = option(512, least=1, most=1024)
    scheduler: dict[str, Any] = option(factory=dict, before={})

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels; a square of a megapixel if they are None."""
        return self.height or 1024, self.width or 1024


@dataclass
class ModelConfig:
    """The teacher: the diffusion pipeline whose transformer is pruned.

    `family`: the model family, a name in `ppcl.families`. `auto` reads it from `path/model_index.json`.
    `path`: a pipeline folder, `embedded:NAME` for a teacher that is shipped with ppcl, or a Hugging Face Hub id
        `owner/name`. None: there are no weights, and only stages that need none can run. A file `*.safetensors` holds
        the transformer alone, with ComfyUI's or the original names.
    `base`: for such a file, the pipeline of all else: the transformer's config, VAE, text encoders. Like `path` it is a
        folder, `embedded:NAME` or a Hub id.
    `lora`: a safetensors file of a LoRA, which is merged into the transformer. The sum is the teacher.
    `revision`: the branch, tag or commit to load from the Hub. None: the default branch.
    `variant`: load weight files with this word in their names, such as `fp16` for `model.fp16.safetensors`, of the
        components that have such files. None: files without such a word.
    `dtype`: the dtype that weights are loaded in and the teacher computes in.
    `streaming`: true leaves the weights of the teacher's blocks on disk. A block is loaded just before it is used and
        the next one is prefetched, so that at most two are in memory.
    `attention_backend`: the attention kernels of the teacher, students and pruned models, by their name in diffusers,
        such as `flash` or `_native_cudnn`. None: torch's own choice. Artifacts stay valid if it changes: results differ
        by rounding, and with 8-bit kernels such as `sage` by a little more. Kernels that take no mask, such as `flash`,
        refuse batches of captions of different lengths. DiT always attends with torch's.
    `builder`: the module that builds an embedded teacher, for `stages=[pretrain]`. None for all other models.
    `categories`: the categories of the toy world that an embedded teacher was trained on; its prompts and its training
        data are of these. None: those of its family.
    `arch`: the transformer's config. If `path` is a folder, the entries of its `config.json` replace these.
    """

    name: str = MISSING
    family: str = MISSING
    path: str | None = None
    base: str | None = None
    lora: str | None = None
    revision: str | None = None
    variant: str | None = None
    dtype: str = option("float32", choices=("float32", "bfloat16", "float16"))
    streaming: bool = False
    attention_backend: str | None = option(None, identity=False)
    builder: str | None = None
    categories: list[str] | None = None
    arch: dict[str, Any] = field(default_factory=dict)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    @property
    def pipeline(self) -> str | None:
        """The pipeline of all parts but the transformer: `base` for a single file, else `path`."""
        return self.base if is_single_file(self.path) else self.path


@dataclass
class IntervalsConfig:
    """The intervals [u, v] of adjacent blocks. Block u becomes a student that replaces blocks u to v.

    `source`: `detect` takes the intervals given here, or without any those that `stages=[detect]` finds in this run.
        `plan` reads them from `path`, the JSON file of a pruning plan.
    `family`: the model family that the intervals belong to. Any other is refused. None: no check.
    `names`: the intervals of all block stacks, each written `STACK.U-V`, such as `transformer_blocks.3-5` or
        `encoder.blocks.5-7`. Files, logs and `distill.intervals` use the same names.
    `transformer_blocks`, `single_transformer_blocks`: the intervals of that stack as pairs [u, v], in place of `names`.
    `remark`, `as_printed`: a note, and the intervals as the paper prints them. They are only copied into the plan.
    """

    source: str = option("detect", choices=("detect", "plan"))
    path: str | None = None
    family: str | None = None
    names: list[str] | None = None
    transformer_blocks: list[list[int]] | None = None
    single_transformer_blocks: list[list[int]] | None = None
    remark: str | None = None
    as_printed: Any = None


@dataclass
class WidthSet:
    """The blocks of one stack that are pruned in width, by their index in the teacher.

    `text`: blocks whose text stream is replaced by linear projectors.
    `ffn`: blocks whose FFNs are replaced by linear projectors.
    """

    text: list[int] = field(default_factory=list)
    ffn: list[int] = field(default_factory=list)


@dataclass
class WidthConfig:
    """Width pruning (stage 2, Eq. 8-12): which text streams and FFNs become linear projectors, and their training.

    `source`: where the width sets, that is the blocks to prune, come from. `none`: there are none. `given`: the keys
        below. `plan`: the file `path`, the JSON of a pruning plan. `auto`: `stages=[width]` selects them.
    `family`: the model family that given sets belong to. Any other is refused. None: no check.
    `names`: the given sets of all block stacks, each entry written `STACK.N.text` or `STACK.N.ffn`.
    `transformer_blocks`, `single_transformer_blocks`: the given sets of that stack, in place of `names`.
    `text_threshold`: `auto` selects text streams whose output has at least this CKA with the output of their reference,
        which is the nearest earlier block with an intact text stream. Deeper blocks are selected first.
    `num_text`: the most text streams per stack that `auto` selects. None: no limit.
    `num_ffn`: the most FFNs that `auto` selects, over all stacks. It takes those that a linear map fits best.
    `text_output`: `last` gives each run of adjacent text-pruned blocks one output projector, which reads the text of
        the run's reference (the authors' code). `each` gives every block its own, which reads the text of the block
        before it (the paper).
    `keep_text_query`: whether a text-pruned block keeps its text query projection, though no output depends on it.
    `ridge`: ridge penalty of the least squares that initialise the projectors.
    `num_batches`: batches of calibration data for these least squares.
    `steps`: training steps after that; 0 leaves the projectors as least squares made them.
    `lr`: learning rate. None if `relative_update` sets the rates.
    `relative_update`: as in `distill`. None: that of `distill`. All other training settings are those of `distill`.
    `linear_weight`: weight of the alignment loss of Eq. 12, which is added to the loss of Eq. 11.
    """

    source: str = option("none", choices=("none", "given", "plan", "auto"))
    path: str | None = None
    family: str | None = None
    names: list[str] | None = None
    transformer_blocks: WidthSet = field(default_factory=WidthSet)
    single_transformer_blocks: WidthSet = field(default_factory=WidthSet)
    text_threshold: float = option(0.999, above=0, most=1)
    num_text: int | None = option(None, least=0)
    num_ffn: int = option(3, least=0)
    text_output: str = option("last", choices=("last", "each"))
    keep_text_query: bool = False
    ridge: float = option(1e-6, least=0, most=1000)
    num_batches: int = option(16, least=1)
    steps: int = option(2000, least=0)
    lr: float | None = option(1e-5, above=0, most=MOST_RATE)
    relative_update: float | None = option(None, above=0, most=MOST_RATE, before=None)
    linear_weight: float = option(1.0, least=0, most=MOST_WEIGHT)


@dataclass
class BudgetConfig:
    """A limit on the cost of the pruned model, for `stages=[plan]`. At most one of the first three keys may be set.

    With all of them None there is no limit, and every trained student and projector is plugged in.

    `params`: up to 1 the share of the teacher's parameters that may be left, above 1 their number.
    `memory_gb`: peak memory of one forward of the transformer in GB, weights and activations.
    `latency_ratio`: duration of one denoising step, relative to the teacher's.
    `cost`: how much quality a plug (a student or projector) is taken to cost. `velocity`: the error of the model's
        output that it adds on held-out data. `loss`: its own held-out distillation loss.
    `num_batches`: held-out batches to measure that error on.
    """

    params: float | None = option(None, above=0, most=1e15)
    memory_gb: float | None = option(None, above=0, most=1e6)
    latency_ratio: float | None = option(None, above=0, most=1)
    cost: str = option("velocity", choices=("velocity", "loss"))
    num_batches: int = option(4, least=1)


@dataclass
class ProbeConfig:
    """The linear probes of stage 1.1 (Eq. 1-2): one residual linear map per block and stream, by ridge regression.

    `num_batches`: calibration batches that the probes are fitted to.
    `num_heldout_batches`: further batches, on which their residuals are measured.
    `ridge`: ridge penalty of the normal equations.
    `bias`: whether a probe has a bias.
    `init`: what training starts from: the `closed_form` solution, or `zero`, for which `train_steps` must be above 0.
    `train_steps`: steps of gradient descent after that; 0 for none. `lr`: their learning rate.
    """

    num_batches: int = option(16, least=1)
    num_heldout_batches: int = option(4, least=1)
    batch_size: int = option(32, least=1)
    ridge: float = option(1e-6, least=0, most=1000)
    bias: bool = True
    init: str = option("closed_form", choices=("closed_form", "zero"))
    train_steps: int = option(0, least=0)
    lr: float = option(1e-4, above=0, most=MOST_RATE)


@dataclass
class MethodConfig:
    """How `stages=[detect]` finds the intervals (stage 1.2, Eq. 3-5).

    `name`: the method's name in plans and reports.
    `rule`: a module of `ppcl.methods`: `lp`, `lp_a`, `lp_b` or `cka_sensitivity`.
    `stream`: the stream whose CKA decides: `image`, `text`, or the `mean` of both.
    `debiased`: whether to use the debiased estimate of CKA.
    `start`, `end`: the first and the last block that an interval may contain. `end` None: the last block of the stack.
    `min_length`: the fewest blocks in an interval.
    `min_cka`: acceptance threshold. An interval [u, v] with cka(u, v) below it is left out.
    `threshold`: for `lp_a`, the CKA below which an interval ends.
    `extend`: for `lp_b` only, the numbers of the intervals (from 0) whose end moves from v to v + 1. None: all of them.
    `num_remove`: for `cka_sensitivity`, the number of blocks to remove.
    `num_samples`, `num_timesteps`: calibration samples, and the number of noise levels at which each is used.
        They are taken in parts that fit into memory. `batch_size`: the samples in a batch of them.
    `settings`: keys that only the rule itself declares.
    """

    name: str = "ppcl"
    rule: str = "lp"
    stream: str = option("mean", choices=("image", "text", "mean"))
    debiased: bool = False
    start: int = option(0, least=0)
    end: int | None = option(None, least=1)
    min_length: int = option(2, least=2)
    min_cka: float = option(0.0, least=-1, most=1)
    threshold: float = option(0.98, above=0, most=1)
    extend: list[int] | None = option(None, least=0)
    num_remove: int | None = option(None, least=1)
    num_samples: int = option(16, least=1)
    num_timesteps: int = option(8, least=1)
    batch_size: int = option(16, least=1)
    settings: dict[str, Any] = option(factory=dict, before={})


@dataclass
class DataConfig:
    """Pictures with captions, for calibration and training.

    `name`: `shapes` renders 32x32 toy pictures. `webdataset` and `folder` read your pictures: .tar shards, or a folder
        with a table. `stages=[cache]` encodes these once. `none`: there is no data.
    `path`: the shards or the folder. `cache`: the folder of a cache that was made elsewhere, in place of `path`.
    `captions`: the keys or columns that may hold a caption. The first that is not blank is taken. Of a list of captions
        it is the first text that is not blank. A .txt in a shard counts as the first key, if the .json has none there.
        Text is UTF-8, or UTF-16 with a byte order mark; other samples are left out.
    `given`: for an edit model, the file suffixes in a shard, or the table's columns, that hold the pictures given to
        it.
    `min_text_accuracy`: leaves out samples whose `text_accuracy` is lower. None: keeps all.
    `aspects`: shapes that pictures are cut to, as `width:height`, each with the area of `model.sampling`. Each picture
        that an edit model is given is cut to the nearest of them too, and the result to that of the last.
    `held_out`: the share of cached samples that is kept from training, for calibration and held-out losses, between 0
        and 1. None: as many as make 32 samples, but at least 2% and at most 20% of all.
    `samples_per_file`: samples in one file of a cache. `encode_batch_size`: samples that are encoded at once.
    `train_seed`, `calibration_seed`, `eval_seed`: the seeds of training batches, of held-out batches and of the prompts
        that are scored. They must differ, so that nothing is measured on samples that it was fitted to.
    `caption_dropout`: the share of training captions that are replaced by the empty one, for classifier-free guidance.
    `timesteps`: the distribution of noise levels sigma in (0, 1): `logit_normal` or `uniform`. None: `uniform`.
    `shift`: maps sigma to s sigma / (1 + (s - 1) sigma); above 1 there is more noise, below 1 less. None: that of the
        model's own scheduler, which for FLUX and Qwen-Image grows with the size of a picture. With both None, noise
        levels are as often as when the model draws.
    """

    name: str = option("shapes", choices=("shapes", "webdataset", "folder", "none"))
    path: str | None = None
    cache: str | None = None
    captions: list[str] = field(default_factory=lambda: ["prompt_en", "caption_en", "prompt_zh"])
    given: list[str] | None = None
    min_text_accuracy: float | None = option(None, least=0, most=100)
    aspects: list[str] = field(default_factory=lambda: ["1:1"])
    held_out: float | None = option(None, above=0, below=1)
    samples_per_file: int = option(256, least=1, most=1000)
    encode_batch_size: int = option(8, least=1)
    train_seed: int = option(0, least=0, most=MOST_SEED)
    calibration_seed: int = option(1, least=0, most=MOST_SEED)
    eval_seed: int = option(2, least=0, most=MOST_SEED)
    caption_dropout: float = option(0.1, least=0, most=1)
    timesteps: str | None = option("logit_normal", choices=("logit_normal", "uniform"))
    shift: float | None = option(1.0, above=0, most=1000)


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
    `feature_weight`: weight of the relative distance between the image stream of each block and that of the teacher's
        block which it replaces. The paper does not have it.
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
class ExportConfig:
    """The pipeline folder that `stages=[export]` writes, and where else it goes.

    `variant`: the variant to export. None: the newest result of this run.
    `single_file`: also write the transformer as one file for ComfyUI, beside the folder, in `single_file_dtype`
        (`bfloat16`, `float16` or `float32`).
    `max_shard_size`: the largest weight file, such as `5GB`; larger weights are split. None: the limit of diffusers.
    `push_to_hub`: the Hugging Face repository, `owner/name`, to upload the folder to. None: no upload.
    `private`: whether a repository that is created for it is private. None: the account's default.
    `commit_message`: the message of that upload. None: a default one.
    """

    variant: str | None = option(None, choices=VARIANTS[1:])
    single_file: bool = False
    single_file_dtype: str = "bfloat16"
    max_shard_size: str | None = None
    push_to_hub: str | None = None
    private: bool | None = None
    commit_message: str | None = None


@dataclass
class LoraConfig:
    """The LoRA of the full model that `stages=[remap_lora]` rewrites for the pruned model.

    `path`: its safetensors file.
    `model`: the folder of an exported model. None: this run's export.
    `source`: what a student of the interval [u, v] gets: the LoRA of its `first` block, u, or the `mean` or the `sum`
        of the LoRAs of blocks u to v, as one LoRA of higher rank. `generate.loras` are mapped in the same way.
    `counts`: whose blocks the file numbers: those of the `full` model, or `pruned`, of the exported model itself, on
        which it was trained then. For `generate.loras`, `pruned` means the teacher, if that is an export. None: as the
        file says, if ppcl wrote it, and else `full`.
    """

    path: str | None = None
    model: str | None = None
    source: str = option("first", choices=("first", "mean", "sum"))
    counts: str | None = option(None, choices=("full", "pruned"), before=None)


@dataclass
class ImportConfig:
    """A model or checkpoint published by the PPCL authors, for `stages=[import_published]`.

    `path`: a pipeline folder, a transformer folder, or the `diffusion_pytorch_model.bin` of a training.
    `residual`: whether the text projector txt_proj of a folder adds to its input. None: as the folder's config says.
    `ehs_same`: for a checkpoint with text projectors, all groups [a, b] of blocks that they were trained in.
    """

    path: str | None = None
    residual: bool | None = None
    ehs_same: list[list[int]] | None = option(None, least=0)


@dataclass
class GenerateConfig:
    """The pictures that `stages=[generate]` draws.

    `variants`: the variants to draw. None: the teacher, `removed`, and the newest result of this run.
    `name`: the name of this set of pictures, which is stored in `images/NAME`. None: a name made from the prompt or the
        benchmark.
    `plug_fraction`: for the variant `ppcl-mixed`, the share of the intervals that are students; the others stay
        teacher.
    `teacher_above`: the noise level sigma in [0, 1] above which the teacher draws in place of every pruned variant. It
        takes no training, and the memory of the teacher and of what is added to it. None: pruned variants draw alone.
    `batch_size`: pictures that are drawn at once.
    `prompt`, `prompt_file`: one prompt, or a text file with one prompt a line, in place of the benchmark's prompts. The
        file may also be GenEval's `evaluation_metadata.jsonl`, or a folder with a .txt file for each prompt, as
        DPG-Bench has.
    `num_images`: pictures per prompt, for prompts that are not a benchmark's. Each has its own seed.
    `layout`: also write the folders that the official scorer of GenEval (`geneval`) or DPG-Bench (`dpg`) reads, in
        `layouts/`, of the same pictures.
    `images`: files of the pictures that an edit model is given with each prompt.
    `loras`: safetensors files of LoRAs of the full model, and `lora_scale` their strength. Each is mapped to every
        variant.
    `controlnet`: the folder or Hub id of a ControlNet for the full model, `control_image` the file of its input
        picture, and `control_scale` its strength.
    `control_mode`: for a ControlNet-Union of FLUX, the number of the kind of picture that it is given, such as 0 for
        edges; its model card lists them. None: for all other ControlNets.
    `compile`: whether to run the blocks through `torch.compile`, each on its own.
    `offload`: what waits in host memory until it runs, to save GPU memory: `model` is whole models (text encoder,
        transformer, VAE), `group` single blocks, `none` nothing.
    """

    variants: list[str] | None = option(None, choices=STORED_VARIANTS)
    name: str | None = None
    plug_fraction: float = option(0.5, above=0, below=1)
    teacher_above: float | None = option(None, least=0, most=1, before=None)
    batch_size: int = option(60, least=1)
    prompt: str | None = None
    prompt_file: str | None = None
    num_images: int = option(1, least=1)
    layout: str | None = option(None, choices=("geneval", "dpg"), before=None)
    images: list[str] = field(default_factory=list)
    loras: list[str] = field(default_factory=list)
    lora_scale: float = option(1.0, least=-1000, most=1000)
    controlnet: str | None = None
    control_image: str | None = None
    control_scale: float = option(1.0, least=0, most=1000)
    control_mode: int | None = option(None, least=0, most=100, before=None)
    compile: bool = False
    offload: str = option("none", choices=("none", "model", "group"))


@dataclass
class BenchmarkConfig:
    """The benchmark that pictures are scored by.

    `name`: a module of `ppcl.benchmarks`. `shapes` scores toy pictures. `fidelity` compares every variant with the
        teacher, picture by picture and by noise level. `none` only measures the distance of their latents. `auto` is
        `shapes` for a toy teacher on the toy data, else `fidelity`; validation replaces it.
    `settings`: the fields of the benchmark's class.
    `prompts_per_category`: prompts that the benchmark `shapes` draws in each of its categories.
    `latency_repeats`: timed repetitions of a denoising step, of which the median is reported.
    """

    name: str = "auto"
    settings: dict[str, Any] = field(default_factory=dict)
    prompts_per_category: int = option(60, least=1)
    latency_repeats: int = option(50, least=1)


@dataclass
class TrainerConfig:
    """The device, and how training computes.

    `accelerator`: `auto`, `cpu`, `gpu` or `cuda`. `auto` takes a GPU where there is one.
    `precision`: of trained modules: `32-true` or `bf16-mixed` (autocast). Their parameters are float32 in both. None:
        `bf16-mixed` if `model.dtype` is a half precision, else `32-true`.
    `num_threads`: CPU threads of torch. None: as many as torch chooses.
    `compile`: whether trainings run the blocks through `torch.compile`, each on its own. Compiling takes a minute or
        two, which pays from about 1,000 steps on.
    `tf32`: whether trainings on a CUDA device multiply float32 matrices in TF32, which has 10 bits and is several times
        as fast. Where `precision` is `bf16-mixed` there are few such products.
    `deterministic`: whether trainings on a CUDA device give the same bits each time, and after a kill, for more time.
    `progress`: whether to show progress.
    `check_memory`: whether a command is refused at its start if the device has too little memory by estimate.
    `memory_gb`: the memory of the device in GB (1e9 bytes) that estimates and `distill.groups=auto` reckon with. None:
        what it has.
    """

    accelerator: str = option("auto", choices=("auto", "cpu", "gpu", "cuda"))
    precision: str | None = None
    num_threads: int | None = option(None, least=1, most=4096)
    compile: bool = False
    tf32: bool = True
    deterministic: bool = False
    progress: bool = True
    check_memory: bool = True
    memory_gb: float | None = option(None, above=0, most=1e6)


@dataclass
class StrategyConfig:
    """How the ranks that torchrun or srun started share the work.

    `kind`: `single` is one process. `ddp`: each rank holds the teacher and all trained modules, and computes on its own
        rows of each batch. `fsdp`: teacher, students and optimiser states are sharded over the ranks. With both, probe,
        detect, generate and evaluate divide whole batches, and each rank holds the whole teacher meanwhile.
    `cpu_offload`: with `fsdp`, whether shards stay in host memory except while their block runs.
    `shard_over`: with `fsdp`, which ranks share the shards. `machine`: those of one machine, so that each machine has
        all parameters and only gradients go over the network. `all`: those of all machines, which needs less memory.
    `timeout_minutes`: how long a rank waits for another one within a training before it gives up.
    """

    kind: str = option("single", choices=("single", "ddp", "fsdp"))
    cpu_offload: bool = False
    shard_over: str = option("machine", choices=("machine", "all"))
    timeout_minutes: float = option(30.0, above=0, most=100_000)


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


@dataclass
class LoggerConfig:
    """Where the metrics of trainings and evaluations are logged.

    `kind`: `csv` writes files in the run's folder, `wandb` logs to Weights & Biases, `none` logs nothing.
    `project`, `mode`: the project and the mode of wandb. The modes `offline` and `disabled` need no account.
    `upload`: whether W&B also gets the weights of plugs and models. False: it is told where they lie.
    """

    kind: str = option("csv", choices=("csv", "wandb", "none"))
    project: str = "ppcl"
    mode: str = option("offline", choices=("online", "offline", "disabled"))
    upload: bool = False


@dataclass
class PathsConfig:
    """Folders on disk.

    `runs_dir`: the parent folder of all runs.
    `cache_dir`: encoded data, probes and the teacher's pictures, which all runs share.
    `base_run`: the folder of an earlier run whose intervals, width sets, students, projectors and measured costs this
        run reads. It is not changed. None: this run has its own.
    """

    runs_dir: str = "runs"
    cache_dir: str = "runs/cache"
    base_run: str | None = None


@dataclass
class QuantizeConfig:
    """Weight quantisation, for `stages=[quantize]`.

    `scheme`: `int8` or `int4` by torchao, `nf4` by bitsandbytes, or `none`.
    `group_size`: for `int4`, how many neighbouring weights of a row share a scale and a zero point: 32, 64 or 128. For
        `int8` each row has one scale.
    `rounding`: `nearest`, or `least_squares`, which rounds so that a layer's outputs on calibration data change least.
    `skip`: patterns of the names of layers that are not quantised.
    `num_batches`, `batch_size`: the calibration batches for `least_squares`, and their samples.
    `damping`: ridge penalty of `least_squares`, relative to the mean square of a layer's inputs.
    `variant`: the variant to quantise. None: the newest result of this run.
    """

    scheme: str = option("none", choices=("none", "int8", "int4", "nf4"))
    group_size: int | None = option(None, least=2, most=4096)
    rounding: str = option("nearest", choices=("nearest", "least_squares"))
    skip: list[str] = field(default_factory=list)
    num_batches: int = option(8, least=1)
    batch_size: int = option(32, least=1)
    damping: float = option(1e-3, least=0, most=1000)
    variant: str | None = option(None, choices=VARIANTS)


@dataclass
class Config:
    """The root of the configuration, which `conf/config.yaml` fills.

    `name`: the run's name. Its folder is `paths.runs_dir`/`name`.
    `stages`: the stages to run. They run in the order of `ppcl.stages.STAGES`, however they are listed.
    `run`: the folder of an earlier run to continue. Its recorded configuration applies, except for the keys that this
        command gives. The recorded configuration always has None here.
    `explain`: print how much memory, disk and time each stage is estimated to need, and run none of them.
    `seed`: the seed of the first picture that `stages=[generate]` draws. Picture number n has the seed `seed` + n.
    """

    name: str = MISSING
    stages: list[str] = MISSING
    run: str | None = None
    explain: bool = False
    seed: int = option(42, least=0, most=MOST_SEED)
    model: ModelConfig = field(default_factory=ModelConfig)
    intervals: IntervalsConfig = field(default_factory=IntervalsConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    width: WidthConfig = field(default_factory=WidthConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    published: ImportConfig = field(default_factory=ImportConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)


# Results of a job that a search can minimise, as `ppcl compare` reads them.
MINIMISED = (
    *("velocity_error", "drop_percent", "latent_distance", "params_percent"),
    *("latency_ms", "peak_memory_mb", "training_seconds"),
)


@dataclass
class SearchConfig:
    """The keys of `hydra.sweeper` in a search with Optuna, `sweep=search`. They are not part of a run's configuration.

    `trials`: the number of trials in all, with those of earlier commands.
    `minimise`: the result that should be as low as possible.
    `seed`: the seed of what Optuna's sampler draws.
    `parallel`: trials that run at once. None: as many as the launcher's jobs, `hydra.launcher.n_jobs`, or else one.
    `params`: what is searched, as in a sweep: `interval(0.1, 1)`, `tag(log, interval(0.01, 1))`, `range(1, 9)`, or
        values, `a,b`. Keys that are typed in these forms are searched, too.
    """

    _target_: str = "hydra_plugins.ppcl_search.Search"
    trials: int = option(20, least=1, most=100_000)
    minimise: str = option("velocity_error", choices=MINIMISED)
    seed: int = option(0, least=0, most=MOST_SEED)
    parallel: int | None = option(None, least=1, most=10_000)
    params: dict[str, str] = field(default_factory=dict)


# Groups that may contain keys not declared here. The code that reads such a group checks its keys.
OPEN_GROUPS = ("benchmark.settings", "distill.losses", "method.settings", "model.sampling.scheduler")
