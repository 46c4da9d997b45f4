"""Draw with the pipeline in its current arrangement, with LoRAs, a ControlNet and compiled blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import Any

import torch
from diffusers import ModelMixin
from PIL import Image
from torch import nn

from ppcl.benchmarks.base import Prompt
from ppcl.context import Run
from ppcl.data.cached import CachedStream
from ppcl.data.recording.record import call_arguments
from ppcl.data.recording.stream import RecordedStream
from ppcl.data.recording.table import Row
from ppcl.errors import UsageError
from ppcl.families.base import without_needless_mask
from ppcl.pictures.loras import TeacherLora, put_on_loras
from ppcl.pictures.opening import open_picture
from ppcl.pictures.outputs import Drawn, drawn_by
from ppcl.surgery.controlnet import hook_residuals
from ppcl.surgery.noise_levels import ByNoiseLevel
from ppcl.surgery.plugboard import Plugboard
from ppcl.taps import free_bytes
from ppcl.training.loop import compiled


def denoising_step(run: Run) -> dict[str, Any]:
    """Return the transformer's inputs for one forward of batch size 1, on the run's device.

    They have the size of `model.sampling`, with cached data as a held-out sample of that aspect ratio has it.
    """
    height, width = run.config.model.sampling.size
    if run.config.data.stored:
        stream = run.data.stream(run.config.data.calibration_seed, 1)
        assert isinstance(stream, CachedStream | RecordedStream)
        return run.data.to_device(stream.example(width / height).inputs)
    images = torch.zeros(1, 3, height, width)
    latents, size = run.family.encode_images(run.teacher.pipeline, images)
    last = run.config.benchmark.prompts_per_category - 1
    prompt = [run.family.world.make_scene(run.config.data.eval_seed, last, run.family.categories[-1]).caption]
    references = run.family.encode_references(run.teacher.pipeline, [images] * run.family.num_references)
    conditions = without_needless_mask(run.family.encode_prompts(run.teacher.pipeline, prompt)(prompt)) | references
    sigmas = torch.full((1,), 0.5).to(latents)
    return run.data.to_device(run.family.forward_inputs(latents, conditions, sigmas, size))


def draw(
    run: Run,
    pipeline: Any,
    prompts: Sequence[str],
    numbers: Sequence[int],
    given: Sequence[Sequence[Image.Image]] = (),
    **arguments: Any,
) -> list[Drawn]:
    """Return what the pipeline draws for each of `prompts`.

    `numbers`: the number of each picture in its set. Picture n starts from noise with the seed `seed` + n, so that it
        does not depend on the batches.
    `given`: the pictures that an edit model is given with each prompt.
    `arguments`: further arguments of the pipeline's call.
    """
    drawn: list[Drawn] = []
    for part in _calls(len(prompts), given, run.family.prompts_per_call or len(prompts)):
        generators = [torch.Generator().manual_seed(run.config.seed + number) for number in numbers[part]]
        call = run.family.sampling_arguments(run.config.model.sampling, len(generators))
        call |= run.family.prompt_arguments(pipeline, prompts[part], given[part])
        drawn += drawn_by(pipeline, pipeline(generator=generators, **call, **arguments), call)
    return drawn


def draw_row(run: Run, pipeline: Any, row: Row, number: int, **arguments: Any) -> Drawn:
    """Return what the pipeline draws with the arguments of a row of `data.path`, as picture `number` of its set."""
    call = call_arguments(run, row, number) | arguments
    call.pop("output_type", None)  # latents, which are recorded
    (drawn,) = drawn_by(pipeline, pipeline(**call), call)
    return drawn


def _calls(count: int, given: Sequence[Sequence[Image.Image]], most: int) -> Iterator[slice]:
    """Yield the parts of `count` prompts that are drawn in one call of the pipeline, each of at most `most` prompts.

    Prompts of one part have given pictures of the same sizes, since a call resizes all of them alike.
    """
    sizes = [[picture.size for picture in pictures] for pictures in given] or [[]] * count
    for _, alike in groupby(range(count), key=sizes.__getitem__):
        numbers = list(alike)
        for start in range(0, len(numbers), most):
            part = numbers[start : start + most]
            yield slice(part[0], part[-1] + 1)


def given_pictures(run: Run, prompt: Prompt) -> list[Image.Image]:
    """Return the PIL pictures that are given with a prompt.

    An array is enlarged to the size of `model.sampling`, so that each of its pixels becomes a square of one colour.
    """
    height, width = run.config.model.sampling.size
    size = width, height
    return [
        item if isinstance(item, Image.Image) else Image.fromarray(item).resize(size, Image.Resampling.NEAREST)
        for item in prompt.references
    ]


@contextmanager
def decoded_latents(pipeline: Any) -> Iterator[list[torch.Tensor]]:
    """Yield a list that collects the final latents `[B, C, ...]` which the VAE decodes within the context.

    They are copied to the CPU in float16. The list stays empty for a pipeline without a VAE.
    """
    found: list[torch.Tensor] = []
    vae = getattr(pipeline, "vae", None)
    if vae is None:
        yield found
        return
    decode, own = vae.decode, "decode" in vars(vae)

    def keep(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(latents.detach().to("cpu", torch.float16))
        return decode(latents, *args, **kwargs)

    vae.decode = keep
    try:
        yield found
    finally:
        if own:
            vae.decode = decode
        else:
            del vae.decode


@contextmanager
def equipped(run: Run, board: Plugboard, loras: list[TeacherLora]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield the pipeline to draw with, and further arguments of its call. Afterwards LoRAs and compilation are undone.

    `board`: says which of the teacher's blocks the transformer currently has. `loras`: the LoRAs to put on. Raises
        `UsageError` if the ControlNet cannot be loaded or does not suit the model.
    """
    config = run.config.generate
    with ExitStack() as stack:
        if loras:
            put_on_loras(run, loras, board)
            stack.callback(run.teacher.pipeline.unload_lora_weights)
        pipeline: Any = run.teacher.pipeline
        arguments: dict[str, Any] = {}
        if config.controlnet:
            pipeline, arguments = _with_controlnet(run, board)
        if config.compile:
            stack.enter_context(compiled(_blocks(run)))
        if config.offload == "model":
            pipeline.enable_model_cpu_offload(device=run.device)
        elif config.offload == "group":
            _offload_blocks(run, pipeline)
        yield pipeline, arguments


def _offload_blocks(run: Run, pipeline: Any) -> None:
    """Let every block of diffusers' models, and every layer of all others, wait in host memory until it runs.

    The VAE stays on the device: the pipeline calls its methods `encode` and `decode`, before which nothing is moved. To
    a CUDA device the next block is copied while one runs. These copies come from pinned memory: of all weights where
    the host has room for that, else of a block just before it is copied.
    """
    from diffusers.hooks import apply_group_offloading  # imports torchao, which is loud, where it is installed

    models = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    pipeline.vae.to(run.device)
    weights = sum(parameter.nbytes for model in models.values() for parameter in model.parameters())
    for name, model in models.items():
        if name != "vae":
            level: dict[str, Any] = {
                "offload_type": "leaf_level"
            }  # text encoders, in which diffusers would find no blocks
            if isinstance(model, ModelMixin):
                level = {"offload_type": "block_level", "num_blocks_per_group": 1}
            apply_group_offloading(
                model,
                run.device,
                use_stream=run.device.type == "cuda",
                low_cpu_mem_usage=1.2 * weights > free_bytes(torch.device("cpu")),
                **level,
            )


def _blocks(run: Run) -> list[nn.Module]:
    """Return all blocks of the pipeline's transformer, of both models if it switches between two."""
    transformer = run.teacher.transformer
    models = transformer.models if isinstance(transformer, ByNoiseLevel) else [transformer]
    return [block for model in models for block in run.family.blocks(model).values()]


def _with_controlnet(run: Run, board: Plugboard) -> tuple[Any, dict[str, Any]]:
    """Return the ControlNet pipeline of the family, with the current components, and the arguments of its call."""
    import diffusers

    config, known = run.config.generate, run.family.facts
    model_class, pipeline_class = (getattr(diffusers, name) for name in known.controlnet_classes)
    try:
        controlnet = model_class.from_pretrained(config.controlnet, dtype=run.teacher.dtype)
    except (OSError, ValueError):
        raise UsageError(
            f"generate.controlnet={config.controlnet} could not be loaded as {model_class.__name__}; give a folder, or "
            "a hub id in reach."
        ) from None
    transformer = run.teacher.transformer
    heads, theirs = (model.config.num_attention_heads for model in (transformer, controlnet))
    if (heads, transformer.config.attention_head_dim) != (theirs, controlnet.config.attention_head_dim):
        raise UsageError(
            f"generate.controlnet={config.controlnet} is of another width than model={run.config.model.name}; "
            "give one that was trained for it."
        )
    modes, mode = controlnet.config.get("num_mode"), config.control_mode
    if modes is None and mode is not None:
        raise UsageError(f"generate.control_mode={mode} has no effect: generate.controlnet is no ControlNet-Union.")
    if modes is not None and (mode is None or mode >= modes):
        raise UsageError(
            f"generate.control_mode={mode} must be a number from 0 to {modes - 1}, the kind of picture that the "
            f"ControlNet-Union generate.controlnet={config.controlnet} is given."
        )
    hook_residuals(transformer, run.family.facts, board.blocks)
    pipeline = pipeline_class(**run.teacher.pipeline.components, controlnet=controlnet.to(run.device))
    pipeline.set_progress_bar_config(disable=True)
    height, width = run.config.model.sampling.size
    image = open_picture(str(config.control_image)).resize((width, height))
    arguments = {"control_image": image, "controlnet_conditioning_scale": config.control_scale}
    return pipeline, arguments if mode is None else arguments | {"control_mode": mode}
