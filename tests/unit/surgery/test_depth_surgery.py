import pytest
import torch

from ppcl.artifacts.headers import Header
from ppcl.artifacts.plugs import Plug
from ppcl.errors import UsageError
from ppcl.layers import kept_layers
from ppcl.surgery.depth import student_block
from ppcl.surgery.plugboard import Plugboard, load_student, plug

PAPER = [
    (3, 4), (5, 7), (8, 10), (11, 12), (15, 24), (25, 27), (29, 30),
    (42, 43), (45, 47), (48, 49), (52, 53), (54, 55), (56, 57),
]  # fmt: skip
INTERVALS = {"transformer_blocks": [(0, 1), (2, 4)]}
FIRST, SECOND = "transformer_blocks.0-1", "transformer_blocks.2-4"


@pytest.mark.parametrize(
    ("num_layers", "intervals", "expected"),
    [
        (5, [], [0, 1, 2, 3, 4]),
        (5, [(0, 4)], [0]),
        (7, [(1, 2), (4, 6)], [0, 1, 3, 4]),
        (4, [(2, 3)], [0, 1, 2]),
    ],
)
def test_the_first_block_of_an_interval_stays(num_layers, intervals, expected):
    assert kept_layers(num_layers, intervals) == expected


def test_the_papers_set_leaves_35_of_60_blocks():
    kept = kept_layers(60, PAPER)
    assert len(kept) == 35
    assert {0, 3, 5, 13, 14, 15, 28, 44, 59} <= set(kept)
    assert not {4, 6, 7, 24, 57} & set(kept)


@pytest.fixture
def transformer(make_transformer):
    return make_transformer(6)


@pytest.fixture
def students(make_transformer):
    """Blocks with weights of their own."""
    other = list(make_transformer(2, seed=9).transformer_blocks)
    return {FIRST: other[0], SECOND: other[1]}


def shortened(make_transformer, teacher, modules):
    """A model of the stock class built with fewer blocks, holding copies of `modules`."""
    model = make_transformer(len(modules), seed=5)
    rest = {k: v for k, v in teacher.state_dict().items() if not k.startswith("transformer_blocks.")}
    model.load_state_dict(rest, strict=False)
    for block, module in zip(model.transformer_blocks, modules, strict=True):
        block.load_state_dict(module.state_dict())
    return model


@pytest.mark.parametrize(
    ("plugged", "removed"),
    [([FIRST, SECOND], []), ([SECOND], []), ([FIRST], [SECOND]), ([], [FIRST, SECOND]), ([], [FIRST])],
)
@torch.no_grad()
def test_every_arrangement_equals_a_model_built_that_way(
    family, make_transformer, make_batch, transformer, students, plugged, removed
):
    inputs, blocks = make_batch().inputs, list(transformer.transformer_blocks)
    modules = []
    for index, block in enumerate(blocks):
        name = {0: FIRST, 1: FIRST, 2: SECOND, 3: SECOND, 4: SECOND}.get(index)
        if name in plugged and index in (0, 2):
            modules.append(students[name])
        elif name not in plugged + removed or index in (0, 2):
            modules.append(block)
    expected = shortened(make_transformer, transformer, modules)(**inputs)[0]
    board = Plugboard(family, transformer, INTERVALS, students).arrange(students=plugged, removed=removed)
    assert torch.equal(transformer(**inputs)[0], expected)
    assert board.plugged == plugged
    assert transformer.config.num_layers == len(transformer.transformer_blocks) == len(modules)


@torch.no_grad()
def test_switching_back_gives_the_teacher_bit_for_bit(family, make_batch, transformer, students):
    inputs = make_batch().inputs
    teacher = transformer(**inputs)[0]
    board = Plugboard(family, transformer, INTERVALS, students)
    outputs = {"all": board.all().transformer(**inputs)[0], "one": board(FIRST).transformer(**inputs)[0]}
    outputs["removed"] = board.remove().transformer(**inputs)[0]
    assert all(not torch.equal(output, teacher) for output in outputs.values())
    assert torch.equal(board().transformer(**inputs)[0], teacher)
    assert torch.equal(board.all().transformer(**inputs)[0], outputs["all"])
    assert transformer.config.num_layers == 3
    assert board().transformer.config.num_layers == 6


def test_blocks_are_shared_not_copied(family, transformer, students):
    blocks = list(transformer.transformer_blocks)
    Plugboard(family, transformer, INTERVALS, students).all()
    now = list(transformer.transformer_blocks)
    assert [id(module) for module in now] == [id(m) for m in (students[FIRST], students[SECOND], blocks[5])]


def test_names_come_in_order_of_execution(family, transformer, students):
    board = Plugboard(family, transformer, INTERVALS, students)
    assert board.names == [FIRST, SECOND]
    assert board(SECOND, FIRST).plugged == [FIRST, SECOND]


@pytest.mark.parametrize("call", ["students", "removed"])
def test_an_unknown_interval_is_refused_by_name(family, transformer, students, call):
    board = Plugboard(family, transformer, INTERVALS, students).all()
    before = list(transformer.transformer_blocks)
    with pytest.raises(UsageError, match=r"transformer_blocks\.3-5 .*transformer_blocks\.0-1"):
        board.arrange(**{call: ["transformer_blocks.3-5"]})
    assert list(transformer.transformer_blocks) == before


def test_an_interval_without_student_can_be_removed_but_not_plugged(family, transformer, students):
    del students[SECOND]
    board = Plugboard(family, transformer, INTERVALS, students)
    with pytest.raises(UsageError, match=r"transformer_blocks\.2-4 has no trained student"):
        board.all()
    assert len(board.remove().transformer.transformer_blocks) == 3


@pytest.mark.parametrize(("init", "source"), [("first", 1), ("middle", 2)])
@pytest.mark.parametrize("interval", [(1, 3), (1, 4)])
def test_a_student_starts_as_a_copy(transformer, init, source, interval):
    blocks = list(transformer.transformer_blocks)
    block = student_block(blocks, interval, init)
    for name, value in block.state_dict().items():
        assert torch.equal(value, blocks[source].state_dict()[name])
    with torch.no_grad():
        block.img_mod[1].weight.add_(1)
    assert not torch.equal(block.img_mod[1].weight, blocks[source].img_mod[1].weight)


def test_an_average_student_is_the_mean_of_its_blocks(transformer):
    blocks = list(transformer.transformer_blocks)
    for name, value in student_block(blocks, (1, 3), "average").state_dict().items():
        a, b, c = (blocks[index].state_dict()[name] for index in (1, 2, 3))
        torch.testing.assert_close(value, (a + b + c) / 3, rtol=0, atol=1e-6)


def test_a_student_of_a_frozen_teacher_can_be_trained(transformer):
    blocks = list(transformer.requires_grad_(False).transformer_blocks)
    for init in ("first", "middle", "average"):
        assert all(parameter.requires_grad for parameter in student_block(blocks, (0, 2), init).parameters())


def make_plug(stack, interval, block):
    state = {key: value.detach().clone() for key, value in block.state_dict().items()}
    return Plug(Header("ppcl.plug", {"interval": list(interval)}), stack, state, {}, interval)


def test_a_plug_becomes_a_frozen_block_with_its_weights(family, transformer, students):
    block = load_student(family, transformer, make_plug("transformer_blocks", (2, 4), students[SECOND]))
    assert not block.training
    assert not any(parameter.requires_grad for parameter in block.parameters())
    for name, value in students[SECOND].state_dict().items():
        assert torch.equal(block.state_dict()[name], value)


def test_a_plug_that_does_not_fit_is_refused(family, transformer, students):
    with pytest.raises(UsageError, match=r"transformer_blocks\.5-6 does not fit a model with 6 blocks"):
        load_student(family, transformer, make_plug("transformer_blocks", (5, 6), students[FIRST]))
    wrong = make_plug("transformer_blocks", (2, 4), students[FIRST])
    wrong.state_dict.pop("img_mod.1.bias")
    with pytest.raises(UsageError, match=r"transformer_blocks\.2-4 does not fit this model"):
        load_student(family, transformer, wrong)


@torch.no_grad()
def test_plugs_on_disk_go_into_a_loaded_pipeline(tmp_path, pipeline, make_transformer, make_batch, students):
    from ppcl.families.qwen_image.tiny import build_pipeline

    loaded, inputs = build_pipeline(0, num_layers=6), make_batch().inputs
    loaded.transformer.eval()
    teacher = loaded.transformer(**inputs)[0]
    for interval, name in (((2, 4), SECOND), ((0, 1), FIRST)):
        make_plug("transformer_blocks", interval, students[name]).save(tmp_path)
    modules = [students[FIRST], students[SECOND], loaded.transformer.transformer_blocks[5]]
    expected = shortened(make_transformer, loaded.transformer, modules)(**inputs)[0]
    board = plug(loaded, tmp_path)
    assert board.plugged == [FIRST, SECOND]
    assert torch.equal(loaded.transformer(**inputs)[0], expected)
    assert torch.equal(board().transformer(**inputs)[0], teacher)
    with pytest.raises(UsageError, match="holds no plug"):
        plug(loaded, tmp_path / "nothing")


def test_plugs_that_overlap_cannot_be_plugged_together(tmp_path, pipeline, students):
    """Two runs with other intervals left their students in one folder."""
    for interval in ((0, 2), (2, 4)):
        make_plug("transformer_blocks", interval, students[SECOND]).save(tmp_path)
    with pytest.raises(UsageError, match=r"transformer_blocks\.0-2 and transformer_blocks\.2-4, which overlap"):
        plug(pipeline, tmp_path)
