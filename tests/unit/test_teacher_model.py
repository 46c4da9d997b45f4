"""A stage loads the parts of the teacher that it needs, and no others."""

import pytest
import torch

from ppcl.config import Config, DataConfig, ModelConfig, QuantizeConfig
from ppcl.families.registry import get_family
from ppcl.teacher_model import TeacherModel

DEVICE = torch.device("meta")  # stands for a GPU: what is on it was moved there

# By stage: the devices of transformer and encoders; None is not loaded.
WITH_CACHED_DATA = {
    "cache": (None, "meta"),
    "probe": ("meta", None),
    "depth": ("meta", None),
    "plan": ("meta", None),
    "export": ("cpu", "cpu"),
    "quantize": ("cpu", "cpu"),
    "generate": ("cpu", "meta"),  # the stage moves one variant after the other
    "evaluate": ("meta", None),
}
WITH_TOY_DATA = {"probe": ("meta", "meta"), "export": ("cpu", "cpu"), "evaluate": ("meta", "meta")}


def make_teacher(data, **groups):
    model = ModelConfig(name="x", family="qwen_image", path="embedded:tiny_qwen_image")
    return TeacherModel(Config(model=model, data=DataConfig(name=data), **groups), get_family("qwen_image"), DEVICE)


def places(teacher):
    pipeline = teacher.pipeline
    assert (pipeline.vae is None) == (pipeline.text_encoder is None)
    parts = pipeline.transformer, pipeline.text_encoder  # the toy VAE has no weights
    return tuple(None if part is None else next(part.parameters()).device.type for part in parts)


@pytest.mark.parametrize(("data", "expected"), [("folder", WITH_CACHED_DATA), ("shapes", WITH_TOY_DATA)])
def test_each_stage_has_what_it_runs_on_the_device_and_what_it_saves_in_host_memory(data, expected):
    teacher = make_teacher(data)
    assert places(teacher) == ("meta", "meta")  # outside of stages
    found = {}
    for stage in expected:
        teacher.enter(stage)
        found[stage] = places(teacher)
    assert found == expected


def test_stages_that_need_the_same_share_a_pipeline():
    teacher = make_teacher("folder")
    teacher.enter("probe")
    pipeline = teacher.pipeline
    for stage in ("detect", "report", "depth", "plan"):
        teacher.enter(stage)
        assert teacher.pipeline is pipeline


def test_least_squares_rounding_encodes_toy_pictures():
    teacher = make_teacher("shapes", quantize=QuantizeConfig(rounding="least_squares"))
    teacher.enter("quantize")
    assert places(teacher) == ("cpu", "meta")  # `Switch` moves the pruned model alone to the device
