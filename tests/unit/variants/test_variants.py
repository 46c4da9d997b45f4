"""Which variants are drawn where none are named."""

import pytest

from ppcl.config import BudgetConfig, Config, DistillConfig, IntervalsConfig, ModelConfig, WidthConfig, WidthSet
from ppcl.context import Run
from ppcl.variants.variants import default_variants

STUDENTS = ["plugs/transformer_blocks.1-2.json", "plugs/transformer_blocks.3-4.json"]
PROJECTOR = "plugs/transformer_blocks.0.ffn.json"
TUNED, CHOICE, QUANTIZED = "finetuned/ppcl.json", "plan/choice.json", "quantized/ppcl.json"
WIDTH = WidthConfig(source="given", transformer_blocks=WidthSet(ffn=[0]))
BASELINES = ["teacher", "removed"]


def config(**groups):
    model = ModelConfig(name="x", family="qwen_image", arch={"num_layers": 6})
    intervals = IntervalsConfig(transformer_blocks=[[1, 2], [3, 4]])
    return Config(name="x", stages=["generate"], **{"model": model, "intervals": intervals} | groups)


@pytest.mark.parametrize(
    ("files", "groups", "expected"),
    [
        ([], {"intervals": IntervalsConfig()}, ["teacher"]),
        ([QUANTIZED], {"intervals": IntervalsConfig()}, ["teacher", "ppcl-quantized"]),
        ([], {}, BASELINES),
        (STUDENTS[:1], {}, BASELINES),
        (STUDENTS, {}, [*BASELINES, "ppcl-depth"]),
        (STUDENTS, {"distill": DistillConfig(mode="none")}, BASELINES),
        (STUDENTS, {"width": WIDTH}, [*BASELINES, "ppcl-depth"]),
        (STUDENTS, {"width": WidthConfig(source="auto")}, [*BASELINES, "ppcl-depth"]),
        ([*STUDENTS, PROJECTOR], {"width": WIDTH}, [*BASELINES, "ppcl-width"]),
        ([PROJECTOR], {"width": WIDTH, "distill": DistillConfig(mode="none")}, [*BASELINES, "ppcl-width"]),
        ([*STUDENTS, CHOICE], {}, [*BASELINES, "ppcl-planned"]),
        (STUDENTS, {"budget": BudgetConfig(params=0.6)}, [*BASELINES, "ppcl-planned"]),
        ([*STUDENTS, CHOICE, TUNED], {}, [*BASELINES, "ppcl-finetuned"]),
        ([*STUDENTS, TUNED, QUANTIZED], {}, [*BASELINES, "ppcl-finetuned", "ppcl-quantized"]),
    ],
)
def test_the_newest_result_is_drawn_beside_the_baselines(tmp_path, files, groups, expected):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    assert default_variants(Run(config(**groups), tmp_path)) == expected
