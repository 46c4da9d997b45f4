"""The record of a model family: facts that checks need before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SingleFile:
    """Layout of a family's transformer in one file: that which ComfyUI loads, or that of its authors.

    `architecture`, `implementation`: values for the file's metadata; empty where no such files are written.
    `transformer_class`: the diffusers class that can be written; no other can.
    `special`: a key of the transformer's config, a value of it, and the architecture of models with that value.
    `outer`: names of modules in the file, each with the diffusers modules whose rows it joins. A name that ends in
        `.scale` is a parameter, not a module.
    `blocks`: for each stack its name in the file, and a table like `outer` for the modules within a block. If `outer`
        and `blocks` are None, the file keeps diffusers' names.
    `swapped`: modules of the file that have the two halves of diffusers' rows in the opposite order.
    `repeated`: modules of the file of which every block has a copy in diffusers, each with its name there.
    `computed`: tensors of the file that diffusers computes, each with the buffer that holds it.
    """

    architecture: str
    implementation: str
    transformer_class: str
    special: tuple[str, bool, str] | None = None
    outer: dict[str, tuple[str, ...]] | None = None
    blocks: dict[str, tuple[str, dict[str, tuple[str, ...]]]] | None = None
    swapped: tuple[str, ...] = ()
    repeated: dict[str, str] = field(default_factory=dict)
    computed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FamilyFacts:
    """Everything about a family that is known without loading its model.

    Where it is:
        `name`: the value of `model.family`.
        `implementation`: module and class of its `Family`, such as `ppcl.families.flux.family.Flux`.
        `transformer`: the diffusers class of its transformer.
        `pipeline_classes`: diffusers pipelines that hold such a transformer.
        `pruned_models`: ppcl's transformer classes for models pruned in width, each with its module.
        `builders`: names of its tiny untrained pipelines (`model.builder`), each with the module that builds it.

    Its blocks:
        `stacks`: the path of each block ModuleList within the transformer, in order of execution, and the config key
            that holds its length.
        `streams`: the streams of tokens in its blocks.
        `text_stacks`: stacks whose blocks have a separate text stream, which can be pruned.
        `first_block`: the first block of a stack that may be pruned.
        `last_blocks`: the number of blocks at the end of each stack that may not be pruned, since they are built
            differently.
        `residuals`: for each stack the argument of the forward that passes a ControlNet's residuals.
        `repeated_residuals`: stacks whose residuals are repeated from the first if there are fewer than blocks.
        `vae`: class and config of the VAE of the published model, for estimates without its folder.
        `encoder_gb`: size of its text encoders in GB (1e9 bytes), in the same case.
        `token_latents`: how many latents wide an image token is.
        `text_tokens`: the text tokens of a long caption, for estimates. None: texts are padded to
            `sampling.max_sequence_length`.
        `modulations`: parts of the names of modulation matrices in blocks that are not part of a norm. AdamW trains
            them, not Muon.

    What it draws:
        `world`: the module of `ppcl.data.worlds` that makes synthetic pictures and captions for it.
        `categories`: the categories of that world that its prompts can ask for.
        `trains_text`: whether `stages=[pretrain]` can train its text encoder, and give its tokenizer the words of
            other categories.
        `num_references`: the number of input pictures of a scene (edit models).
        `max_references`: the most input pictures that a user can give with a prompt.

    What surrounds it:
        `controlnet_classes`: diffusers' ControlNet model and pipeline classes; empty if there are none.
        `takes_lora`: whether its pipelines can load LoRAs.
        `single_file`: the file layout that ComfyUI loads; None if ComfyUI does not know the model.
        `original`: the layout of its authors' checkpoints, files `*.pt`, which are read alone; None if they are not.
        `counts_blocks`: whether LoRA trainers (musubi-tuner) must be told the number of blocks.
        `licence`: the licence fields of a model card, for the original model of this family.
        `published`: whether the PPCL authors published pruned models of it.
    """

    name: str
    implementation: str
    transformer: str
    stacks: dict[str, str]
    pipeline_classes: tuple[str, ...]
    streams: tuple[str, ...] = ("image", "text")
    text_stacks: tuple[str, ...] = ()
    first_block: int = 0
    last_blocks: int = 0
    residuals: dict[str, str] = field(default_factory=dict)
    repeated_residuals: tuple[str, ...] = ()
    vae: tuple[str, dict[str, Any]] | None = None
    encoder_gb: float = 0.0
    token_latents: int = 2
    text_tokens: int | None = 300
    modulations: tuple[str, ...] = ()
    pruned_models: dict[str, str] = field(default_factory=dict)
    builders: dict[str, str] = field(default_factory=dict)
    world: str = "shapes"
    categories: tuple[str, ...] = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    trains_text: bool = False
    num_references: int = 0
    max_references: int = 0
    controlnet_classes: tuple[str, ...] = ()
    takes_lora: bool = True
    single_file: SingleFile | None = None
    original: SingleFile | None = None
    counts_blocks: bool = False
    licence: dict[str, str] = field(default_factory=dict)
    published: bool = False


def autoencoder_kl(channels: int) -> dict[str, Any]:
    """Return the config of an 8x `AutoencoderKL` with so many latent channels, as Stable Diffusion and FLUX have it."""
    return {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": channels,
    }


APACHE = {"license": "apache-2.0"}
