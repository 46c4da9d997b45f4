"""Qwen-Image: 60 dual-stream blocks."""

from __future__ import annotations

from ppcl.families.facts import APACHE, FamilyFacts, SingleFile

FACTS = (
    FamilyFacts(
        "qwen_image",
        "ppcl.families.qwen_image.family.QwenImage",
        "QwenImageTransformer2DModel",
        stacks={"transformer_blocks": "num_layers"},
        pipeline_classes=("QwenImagePipeline",),
        text_stacks=("transformer_blocks",),
        residuals={"transformer_blocks": "controlnet_block_samples"},
        modulations=("_mod.",),
        vae=("AutoencoderKLQwenImage", {}),
        encoder_gb=16.6,
        pruned_models={
            "PrunedQwenImageTransformer2DModel": "ppcl.families.qwen_image.transformer_qwen_image_pruned",
        },
        builders={"tiny_qwen_image": "ppcl.families.qwen_image.tiny"},
        trains_text=True,
        controlnet_classes=("QwenImageControlNetModel", "QwenImageControlNetPipeline"),
        single_file=SingleFile("Qwen-Image", "https://github.com/QwenLM/Qwen-Image", "QwenImageTransformer2DModel"),
        counts_blocks=True,
        licence=APACHE,
        published=True,
    ),
)
