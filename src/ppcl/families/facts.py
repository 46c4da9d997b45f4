"""Facts of a model family that checks need before torch is loaded, in one record a family."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SingleFile:
    """How a family's transformer is laid out in one safetensors file for ComfyUI.

    `architecture` and `implementation` go into the file's metadata. Only models of `transformer_class`, a diffusers
    class, can be written. `special` is a key of the transformer's config, a value, and the architecture this value
    makes it. `outer` and, per stack, `blocks` map a module of the file to the diffusers modules that make it up; a name
    that ends in `.scale` is a parameter. Without them names stay diffusers'. Modules in `swapped` have the two halves
    of their rows in the other order.
    """

    architecture: str
    implementation: str
    transformer_class: str
    special: tuple[str, bool, str] | None = None
    outer: dict[str, tuple[str, ...]] | None = None
    blocks: dict[str, tuple[str, dict[str, tuple[str, ...]]]] | None = None
    swapped: tuple[str, ...] = ()


@dataclass(frozen=True)
class FamilyFacts:
    """Everything about a family that is known without its model.

    Where it is:
        `name`: as in `model.family`.
        `implementation`: module and class of its `Family`, `ppcl.families.flux.family.Flux`.
        `transformer`: diffusers' class of its transformer.
        `pipeline_classes`: diffusers pipelines that hold such a transformer.
        `pruned_models`: transformer classes of ours for models pruned in width, each with its module.
        `builders`: names of its tiny untrained pipelines (`model.builder`), each with its module.

    Its blocks:
        `stacks`: path of each block ModuleList within the transformer, in order of execution, to the config key that
            counts its blocks.
        `text_stacks`: stacks whose blocks have a text stream of their own that can be pruned.
        `first_block`: blocks before this one stay the teacher's.
        `last_blocks`: so many blocks at the end of each stack stay the teacher's, being of another structure.
        `residuals`: argument of the forward that brings a ControlNet's residuals, per stack.
        `repeated_residuals`: stacks whose residuals start again from the first where they are too few.
        `modulations`: parts of the names of matrices in blocks that Muon is not made for.

    What it draws:
        `world`: module of `ppcl.data.worlds` that makes scenes for it.
        `categories`: those of that world that a prompt can ask for.
        `num_references`: pictures given with a scene. `max_references`: pictures a user's prompt can be given.

    What surrounds it:
        `controlnet_classes`: diffusers' ControlNet model and pipeline, if there are such.
        `takes_lora`: whether its pipelines load LoRAs.
        `single_file`: the layout ComfyUI loads, if it knows the model.
        `counts_blocks`: whether trainers of LoRAs (musubi-tuner) must be told the number of blocks.
        `licence`: licence fields of the model that the family is known by.
        `published`: whether the PPCL authors published pruned models of it.
    """

    name: str
    implementation: str
    transformer: str
    stacks: dict[str, str]
    pipeline_classes: tuple[str, ...]
    text_stacks: tuple[str, ...] = ()
    first_block: int = 0
    last_blocks: int = 0
    residuals: dict[str, str] = field(default_factory=dict)
    repeated_residuals: tuple[str, ...] = ()
    modulations: tuple[str, ...] = ()
    pruned_models: dict[str, str] = field(default_factory=dict)
    builders: dict[str, str] = field(default_factory=dict)
    world: str = "shapes"
    categories: tuple[str, ...] = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    num_references: int = 0
    max_references: int = 0
    controlnet_classes: tuple[str, ...] = ()
    takes_lora: bool = True
    single_file: SingleFile | None = None
    counts_blocks: bool = False
    licence: dict[str, str] = field(default_factory=dict)
    published: bool = False


APACHE = {"license": "apache-2.0"}
