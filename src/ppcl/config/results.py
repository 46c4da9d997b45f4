"""The keys of what a run draws, scores, exports, maps and imports, from `generate` to `published`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ppcl.options import option

# The models that a run can draw and score, each an arrangement of the teacher, students and projectors:
#   removed: the teacher without blocks u+1 to v of every interval [u, v], untrained: the baseline.
#   ppcl-depth: a student for every interval. ppcl-mixed: for the share `generate.plug_fraction` of them.
#   ppcl-width: all students and all projectors. ppcl-planned: those that 'stages=[plan]' has chosen.
#   ppcl-finetuned: the planned model after fine-tuning. ppcl-quantized: the model of 'stages=[quantize]'.
VARIANTS = ("teacher", "removed", "ppcl-depth", "ppcl-mixed", "ppcl-width", "ppcl-planned", "ppcl-finetuned")
STORED_VARIANTS = (*VARIANTS, "ppcl-quantized")  # the last one exists only after 'stages=[quantize]'


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
    `layout`: also write the folders that the official scorer of GenEval (`geneval`) or DPG-Bench (`dpg`) reads, or the
        array that ADM's evaluator reads (`npz`), in `layouts/`, of the same pictures.
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
    layout: str | None = option(None, choices=("geneval", "dpg", "npz"), before=None)
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
        teacher, picture by picture and by noise level. `fid` is the Fréchet distance of pictures from reference
        pictures. `none` only measures the distance of their latents. `auto` is
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
