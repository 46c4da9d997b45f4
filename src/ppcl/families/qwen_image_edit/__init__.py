"""Qwen-Image-Edit, -2509 and -2511: Qwen-Image's transformer on input pictures and an instruction."""

from __future__ import annotations

from dataclasses import replace

from ppcl.families.facts import FamilyFacts, SingleFile
from ppcl.families.qwen_image import FACTS as QWEN_IMAGE

_EDIT: FamilyFacts = replace(
    QWEN_IMAGE[0],
    name="qwen_image_edit",
    implementation="ppcl.families.qwen_image_edit.family.QwenImageEdit",
    pipeline_classes=("QwenImageEditPipeline",),
    builders={"tiny_qwen_image_edit": "ppcl.families.qwen_image_edit.tiny"},
    world="edits",
    categories=("recolor", "remove", "add", "move"),
    num_references=1,
    max_references=1,
    controlnet_classes=(),
    single_file=SingleFile("Qwen-Image-Edit", "https://github.com/QwenLM/Qwen-Image", "QwenImageTransformer2DModel"),
)
_EDIT_PLUS = replace(
    _EDIT,
    name="qwen_image_edit_2509",
    implementation="ppcl.families.qwen_image_edit.family.QwenImageEditPlus",
    pipeline_classes=("QwenImageEditPlusPipeline",),
    builders={"tiny_qwen_image_edit_2509": "ppcl.families.qwen_image_edit.tiny_2509"},
    categories=("insert", "match_color"),
    num_references=2,
    max_references=3,
    single_file=SingleFile(
        "Qwen-Image-Edit-Plus",
        "https://github.com/QwenLM/Qwen-Image",
        "QwenImageTransformer2DModel",
        special=("zero_cond_t", True, "Qwen-Image-Edit-2511"),
    ),
)
FACTS = (_EDIT, _EDIT_PLUS)
