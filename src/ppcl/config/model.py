"""The keys of the teacher and of how pictures are drawn: `model`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from ppcl.options import option
from ppcl.paths import is_single_file


@dataclass
class SamplingConfig:
    """How pictures are drawn. All variants of a run are drawn with the same settings.

    `height`, `width`: the size of a picture in pixels. None, for an edit model: a megapixel, in the aspect ratio of the
        last picture that it is given; for a model of no known family: the size that its pipeline takes by itself.
    `num_inference_steps`: denoising steps per picture.
    `true_cfg_scale`: scale of classifier-free guidance. Above 1 every step runs the model twice, with the prompt and
        with `negative_prompt`. Dropped captions of your data are encoded as the same.
    `guidance_scale`: the guidance input of a guidance-distilled model such as FLUX.1-dev; for a DiT, the scale of its
        classifier-free guidance. Other models ignore it.
    `max_sequence_length`: the most prompt tokens that the text encoder passes on.
    `scheduler`: entries that replace those of the model's own scheduler config, such as `shift: 3.0`.
    `arguments`: for a model of no known family, further arguments of its pipeline's call, such as `num_frames: 49`.
    """

    height: int | None = option(1328, least=8, most=16384)
    width: int | None = option(1328, least=8, most=16384)
    num_inference_steps: int = option(50, least=1, most=1000)
    true_cfg_scale: float = option(4.0, least=0, most=1000)
    negative_prompt: str = ""
    guidance_scale: float = option(3.5, least=0, most=1000)
    max_sequence_length: int = option(512, least=1, most=1024)
    scheduler: dict[str, Any] = option(factory=dict, before={})
    arguments: dict[str, Any] = option(factory=dict, before={})

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels; a square of a megapixel if they are None."""
        return self.height or 1024, self.width or 1024


@dataclass
class ModelConfig:
    """The teacher: the diffusion pipeline whose transformer is pruned.

    `component`: the name of that transformer in the pipeline. Wan 2.2 has two: `transformer` draws the noisy steps and
        `transformer_2` all others. To prune both, prune one, and the other with `path` of the first one's export.

    `family`: the model family, a name in `ppcl.families`. `auto` reads it from `path/model_index.json`; of a model of
        none of them it is `traced`.
    `trace`: true finds the blocks and streams of the model by running it, as for models of no known family, although it
        is of one.
    `transformer`: for a `traced` model without a local folder, the diffusers class of its transformer.
    `path`: a pipeline folder, `embedded:NAME` for a teacher that is shipped with ppcl, or a Hugging Face Hub id
        `owner/name`. None: there are no weights, and only stages that need none can run. A file `*.safetensors` holds
        the transformer alone, with ComfyUI's or the original names. So does a checkpoint `*.pt` of DiT's authors.
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
    component: str = option("transformer", before="transformer")
    trace: bool = False
    transformer: str | None = None
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
