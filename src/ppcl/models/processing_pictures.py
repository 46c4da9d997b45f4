"""Qwen2-VL's processor without its video processor, which needs torchvision."""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin, Qwen2VLProcessor


class PictureProcessor(Qwen2VLProcessor):
    """A Qwen2-VL processor that has an image processor and a tokenizer only."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


if __name__.startswith("ppcl."):  # the name that diffusers writes when it saves a pipeline
    PictureProcessor.__module__ = "ppcl"
