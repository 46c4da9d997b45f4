"""The keys of pictures, captions and prompts: `data`."""

from __future__ import annotations

from dataclasses import dataclass, field

from ppcl.config.bounds import MOST_SEED
from ppcl.options import option


@dataclass
class DataConfig:
    """Pictures with captions, or prompts, for calibration and training.

    `name`: `shapes` renders 32x32 toy pictures. `webdataset` and `folder` read your pictures: .tar shards, or a folder
        with a table, or else a folder of each class. `stages=[cache]` encodes these once. `prompts` needs no pictures:
        `stages=[cache]` runs the pipeline on your prompts, and records the transformer's own calls. `none`: there is
        no data.
    `path`: the shards, the folder, or the file of prompts. It has a prompt a line, or as a .jsonl an object a line with
        arguments of the pipeline's call. There a picture or a .safetensors of tensors is named by its path relative to
        the file. `cache`: the folder of a cache that was made elsewhere, in place of `path`.
    `record_steps`: with `data=prompts`, how many denoising steps of each prompt are recorded: spread evenly, and at
        other places for each prompt.
    `renoise`: with `data=prompts`, true gives the final latents of a prompt fresh noise at any level, and false takes
        calls as they were recorded. None: true where the recording shows that the model's calls can be made so.
    `captions`: the keys or columns that may hold a caption. The first that is not blank is taken. Of a list of captions
        it is the first text that is not blank. A .txt in a shard counts as the first key, if the .json has none there.
        Text is UTF-8, or UTF-16 with a byte order mark; other samples are left out.
    `given`: for an edit model, the file suffixes in a shard, or the table's columns, that hold the pictures given to
        it.
    `min_text_accuracy`: leaves out samples whose `text_accuracy` is lower. None: keeps all.
    `aspects`: shapes that pictures are cut to, as `width:height`, each with the area of `model.sampling`. Each picture
        that an edit model is given is cut to the nearest of them too, and the result to that of the last.
    `held_out`: the share of cached samples, or of recorded prompts, that is kept from training, for calibration and
        held-out losses, between 0 and 1. None: as many as make 32, but at least 2% and at most 20% of all.
    `samples_per_file`: samples in one file of a cache. `encode_batch_size`: samples that are encoded at once.
    `train_seed`, `calibration_seed`, `eval_seed`: the seeds of training batches, of held-out batches and of the prompts
        that are scored. They must differ, so that nothing is measured on samples that it was fitted to.
    `caption_dropout`: the share of training captions that are replaced by the empty one, for classifier-free guidance.
        With `data=prompts` it is the share of calls that have the negative prompt.
    `timesteps`: the distribution of noise levels sigma in (0, 1): `logit_normal` or `uniform`. None: `uniform`.
    `shift`: maps sigma to s sigma / (1 + (s - 1) sigma); above 1 there is more noise, below 1 less. None: that of the
        model's own scheduler, which for FLUX and Qwen-Image grows with the size of a picture. With both None, noise
        levels are as often as when the model draws.
    """

    name: str = option("shapes", choices=("shapes", "webdataset", "folder", "prompts", "none"))
    path: str | None = None
    cache: str | None = None
    captions: list[str] = field(default_factory=lambda: ["prompt_en", "caption_en", "prompt_zh"])
    given: list[str] | None = None
    min_text_accuracy: float | None = option(None, least=0, most=100)
    aspects: list[str] = field(default_factory=lambda: ["1:1"])
    record_steps: int = option(8, least=1, most=1000)
    renoise: bool | None = None
    held_out: float | None = option(None, above=0, below=1)
    samples_per_file: int = option(256, least=1, most=1000)
    encode_batch_size: int = option(8, least=1)
    train_seed: int = option(0, least=0, most=MOST_SEED)
    calibration_seed: int = option(1, least=0, most=MOST_SEED)
    eval_seed: int = option(2, least=0, most=MOST_SEED)
    caption_dropout: float = option(0.1, least=0, most=1)
    timesteps: str | None = option("logit_normal", choices=("logit_normal", "uniform"))
    shift: float | None = option(1.0, above=0, most=1000)

    @property
    def stored(self) -> bool:
        """Whether `stages=[cache]` writes it to disk, where all other stages read it."""
        return self.name in ("webdataset", "folder", "prompts")
