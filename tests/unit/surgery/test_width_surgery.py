"""Pruned blocks share what they keep, go in and out of a loaded model, and are counted right."""

from pathlib import Path

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from omegaconf import OmegaConf

from ppcl.artifacts.headers import Header
from ppcl.artifacts.plugs import Projector
from ppcl.errors import UsageError
from ppcl.families.qwen_image.transformer_qwen_image_pruned import (
    PrunedQwenImageTransformer2DModel,
    PrunedQwenImageTransformerBlock,
)
from ppcl.layers import Layout, kept_layers
from ppcl.surgery.count import count_parameters
from ppcl.surgery.plugboard import Plugboard
from ppcl.surgery.width import prune_blocks

STACK = "transformer_blocks"
CONF = Path(__file__).parents[3] / "conf"
LAYERS, WIDTH = 8, 64
INTERVALS = {STACK: [(1, 2), (5, 6)]}
FIRST, SECOND = f"{STACK}.1-2", f"{STACK}.5-6"
KEPT = [0, 1, 3, 4, 5, 7]
# 3 and 4 read student 1; 4 has no FFN either; 5 is a student without FFN; 7 reads it.
TEXT, FFN = [3, 4, 7], [0, 4, 5]
REFERENCES = {3: 1, 4: 1, 7: 5}
NAMES = [f"{STACK}.{index}.{kind}" for kind, indices in (("text", TEXT), ("ffn", FFN)) for index in indices]


@pytest.fixture
def transformer(make_transformer):
    return make_transformer(LAYERS)


@pytest.fixture
def students(make_transformer):
    """Blocks with weights of their own."""
    other = list(make_transformer(2, seed=9).transformer_blocks)
    return {FIRST: other[0], SECOND: other[1]}


def make_projector(index, kind, base=None, reference=None, seed=0, width=WIDTH):
    generator = torch.Generator().manual_seed(1000 * seed + 10 * index + len(kind))
    modules = ("txt_proj", "ehs_proj") if kind == "text" else ("img_ffn_proj", "txt_ffn_proj")
    state = {}
    for module in modules:
        state[f"{module}.weight"] = 0.1 * torch.randn(width, width, generator=generator)
        state[f"{module}.bias"] = 0.1 * torch.randn(width, generator=generator)
    header = Header("ppcl.projector", {"index": index, "kind": kind, "text_output": "last"})
    return Projector(header, STACK, state, {}, index, kind, base, reference)


@pytest.fixture
def projectors():
    """Fitted where every student and projector is plugged in."""
    made = [make_projector(index, "text", {5: SECOND}.get(index), REFERENCES[index]) for index in TEXT]
    made += [make_projector(index, "ffn", {5: SECOND}.get(index)) for index in FFN]
    return {item.name: item for item in made}


@pytest.fixture
def board(family, transformer, students, projectors):
    return Plugboard(family, transformer, INTERVALS, students, projectors)


def pointers(module):
    return {name: parameter.data_ptr() for name, parameter in module.named_parameters()}


# Blocks.


def pruned_blocks(family, transformer, text, ffn, projectors=None, layout=None, made=None):
    blocks = list(transformer.transformer_blocks)
    states = {name: item.state_dict for name, item in (projectors or {}).items()}
    kept = list(range(len(blocks)))
    return prune_blocks(family, STACK, kept, blocks, text, ffn, layout or Layout(), states, made)


@pytest.mark.parametrize("keep_text_query", [False, True])
def test_a_pruned_block_shares_what_it_keeps(family, transformer, keep_text_query):
    blocks = list(transformer.transformer_blocks)
    pruned = pruned_blocks(family, transformer, [3, 4], [2, 4], layout=Layout("last", keep_text_query))
    for index, (block, source) in enumerate(zip(pruned, blocks, strict=True)):
        if index not in (2, 3, 4):
            assert block is source
            continue
        assert isinstance(block, PrunedQwenImageTransformerBlock)
        own, found = pointers(source), pointers(block)
        new = {name for name in found if name not in own}
        assert new
        assert all(name.split(".")[0] in family.width.projectors.values() for name in new)
        assert all(pointer == own[name] for name, pointer in found.items() if name in own)  # the first half, where cut
        shape = block.get_parameter("img_mod.1.weight").shape
        assert shape == ((3 if index in (2, 4) else 6) * WIDTH, WIDTH)


def test_pruning_leaves_the_source_untouched(family, transformer, projectors):
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    names = [list(block.state_dict()) for block in transformer.transformer_blocks]
    processors = [type(block.attn.processor) for block in transformer.transformer_blocks]
    blocks = list(transformer.transformer_blocks)
    pruned_blocks(family, transformer, TEXT, FFN, projectors)
    assert list(transformer.transformer_blocks) == blocks
    assert [list(block.state_dict()) for block in blocks] == names
    assert [type(block.attn.processor) for block in blocks] == processors
    assert all(torch.equal(value, before[name]) for name, value in transformer.state_dict().items())
    assert all(parameter.requires_grad for parameter in transformer.parameters())


def test_projectors_take_dtype_and_values_and_are_the_identity_where_absent(family, transformer, projectors):
    transformer.to(torch.bfloat16)
    del projectors[f"{STACK}.7.text"]
    pruned = pruned_blocks(family, transformer, TEXT, FFN, projectors)
    for index, kind, module in ((4, "text", "txt_proj"), (4, "text", "ehs_proj"), (4, "ffn", "img_ffn_proj")):
        weight = pruned[index].get_submodule(module).weight
        assert torch.equal(weight, projectors[f"{STACK}.{index}.{kind}"].state_dict[f"{module}.weight"].bfloat16())
    assert pruned[3].ehs_proj is None  # in the middle of a run
    assert not pruned[7].txt_proj.weight.any()
    assert not pruned[7].ehs_proj.weight.any()
    assert {parameter.dtype for block in pruned for parameter in block.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("learns", [True, False])
def test_what_is_kept_learns_if_the_source_does_and_projectors_do_not(family, transformer, projectors, learns):
    transformer.requires_grad_(learns)
    pruned = pruned_blocks(family, transformer, TEXT, FFN, projectors)
    assert all(parameter.requires_grad == learns for parameter in transformer.parameters())
    for block in pruned:
        for name, parameter in block.named_parameters():
            new = name.split(".")[0] in family.width.projectors.values()
            assert parameter.requires_grad == (learns and not new), name


def test_pruned_blocks_are_in_the_sources_mode(family, transformer):
    assert not pruned_blocks(family, transformer, [3], [])[3].training
    assert pruned_blocks(family, transformer.train(), [3], [])[3].training


@pytest.mark.parametrize(("index", "kind", "key"), [(3, "text", "txt_proj"), (0, "ffn", "img_ffn_proj")])
def test_a_projector_of_another_width_is_refused(family, transformer, index, kind, key):
    wrong = make_projector(index, kind, width=32)
    with pytest.raises(UsageError, match=rf"does not fit this model: {key}\.weight is \[32, 32\], .*is \[64, 64\]"):
        pruned_blocks(
            family, transformer, [3] if kind == "text" else [], [0] if kind == "ffn" else [], {wrong.name: wrong}
        )


def test_blocks_once_made_are_kept(family, transformer, projectors):
    made = {}
    first = pruned_blocks(family, transformer, TEXT, FFN, projectors, made=made)
    again = pruned_blocks(family, transformer, TEXT, FFN, projectors, made=made)
    assert [id(block) for block in again] == [id(block) for block in first]
    other = pruned_blocks(family, transformer, TEXT, [4, 5], projectors, made=made)
    same = [index for index, (a, b) in enumerate(zip(first, other, strict=True)) if a is b]
    assert same == [1, 2, 3, 4, 5, 6, 7]


# The plugboard.


def arrangement(board):
    return {
        "blocks": list(board.transformer.transformer_blocks),
        "num_layers": board.transformer.config.num_layers,
        "kept": board.kept,
        "width": board.width,
        "plugged": board.plugged,
    }


def built(transformer, modules, state, text, ffn, text_output="last"):
    """The pruned class built by hand: the weights of `modules`, cut to size, and projectors from `state`."""
    config = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
    config |= {"num_layers": len(modules), "pruned_text": text, "pruned_ffn": ffn, "text_output": text_output}
    model = PrunedQwenImageTransformer2DModel(**config).eval()
    own = {key: value for key, value in transformer.state_dict().items() if not key.startswith(STACK)}
    own |= {f"{STACK}.{n}.{k}": v for n, module in enumerate(modules) for k, v in module.state_dict().items()}
    own |= state
    model.load_state_dict({key: own[key][: len(value)] for key, value in model.state_dict().items()})
    return model


@torch.no_grad()
def test_everything_plugged_in_equals_a_model_built_that_way(make_batch, transformer, students, projectors, board):
    inputs, blocks = make_batch().inputs, list(transformer.transformer_blocks)
    modules = [{1: students[FIRST], 5: students[SECOND]}.get(index, blocks[index]) for index in KEPT]
    state = {
        f"{STACK}.{KEPT.index(item.index)}.{key}": value
        for item in projectors.values()
        for key, value in item.state_dict.items()
    }
    expected = built(transformer, modules, state, [2, 3, 5], [0, 3, 4])(**inputs)[0]
    board.all()
    assert torch.equal(transformer(**inputs)[0], expected)
    assert board.kept == {STACK: KEPT}
    assert {kind: sorted(indices) for kind, indices in board.width[STACK].items()} == {"text": TEXT, "ffn": FFN}
    assert board.plugged == [FIRST, SECOND]
    assert transformer.config.num_layers == len(KEPT)


@torch.no_grad()
def test_switching_back_gives_the_teacher_bit_for_bit(make_batch, transformer, board):
    inputs, blocks = make_batch().inputs, list(transformer.transformer_blocks)
    teacher = transformer(**inputs)[0]
    outputs = {"all": board.all().transformer(**inputs)[0]}
    outputs["students"] = board(FIRST, SECOND).transformer(**inputs)[0]
    outputs["ffn"] = board(f"{STACK}.0.ffn", f"{STACK}.4.ffn").transformer(**inputs)[0]
    outputs["removed"] = board.remove().transformer(**inputs)[0]
    found = [teacher, *outputs.values()]
    assert not any(torch.equal(a, b) for n, a in enumerate(found) for b in found[:n] if a.shape == b.shape)
    board()
    assert list(transformer.transformer_blocks) == blocks
    assert board.width == {}
    assert board.plugged == []
    assert transformer.config.num_layers == LAYERS
    assert torch.equal(transformer(**inputs)[0], teacher)
    assert torch.equal(board.all().transformer(**inputs)[0], outputs["all"])


@pytest.mark.parametrize(
    ("names", "kept", "width"),
    [
        ([f"{STACK}.0.ffn"], list(range(LAYERS)), {"text": [], "ffn": [0]}),
        ([FIRST, f"{STACK}.3.text"], [0, 1, 3, 4, 5, 6, 7], {"text": [3], "ffn": []}),
        ([f"{STACK}.4.ffn", f"{STACK}.4.text", f"{STACK}.3.text", FIRST], [0, 1, 3, 4, 5, 6, 7],
         {"text": [3, 4], "ffn": [4]}),
        ([SECOND, f"{STACK}.5.ffn", f"{STACK}.7.text"], [0, 1, 2, 3, 4, 5, 7], {"text": [7], "ffn": [5]}),
    ],
)  # fmt: skip
@torch.no_grad()
def test_a_call_plugs_in_just_what_it_names(make_batch, transformer, students, projectors, board, names, kept, width):
    inputs, blocks = make_batch().inputs, list(transformer.transformer_blocks)
    modules = [{FIRST: 1, SECOND: 5}.get(name) for name in names]
    stand_ins = {1: students[FIRST], 5: students[SECOND]}
    modules = [stand_ins[index] if index in modules else blocks[index] for index in kept]
    state = {
        f"{STACK}.{kept.index(projectors[name].index)}.{key}": value
        for name in names
        if name in projectors
        for key, value in projectors[name].state_dict.items()
    }
    places = {kind: [kept.index(index) for index in indices] for kind, indices in width.items()}
    expected = built(transformer, modules, state, **places)(**inputs)[0]
    board.all()  # what was in before plays no part
    board(*names)
    assert torch.equal(transformer(**inputs)[0], expected)
    assert board.kept == {STACK: kept}
    assert {kind: sorted(indices) for kind, indices in board.width[STACK].items()} == width
    assert board.plugged == [name for name in (FIRST, SECOND) if name in names]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        # a projector fitted in a student needs that student
        ([f"{STACK}.5.ffn"], rf"{STACK}\.5\.ffn was fitted in {SECOND}; here block 5 is the teacher"),
        # 7 was fitted on student 5; without it the block before is the teacher's 6
        ([f"{STACK}.7.text"], rf"{STACK}\.7\.text was fitted on the text of block 5; here it would read block 6"),
        # 4 was fitted on 1 with 3 pruned too
        ([FIRST, f"{STACK}.4.text"], rf"{STACK}\.4\.text was fitted on the text of block 1; here .* block 3"),
        ([f"{STACK}.6.text"], rf"{STACK}\.6\.text is no interval or projector of this model; it has .*\.7\.text"),
        ([f"{STACK}.1-3"], rf"{STACK}\.1-3 is no interval or projector"),
    ],
)  # fmt: skip
def test_a_projector_that_does_not_fit_is_refused_before_anything_is_touched(board, names, message):
    for start in ([], [FIRST, f"{STACK}.3.text"], board.names + list(board.projectors)):
        board(*start)
        before = arrangement(board)
        with pytest.raises(UsageError, match=message):
            board(*names)
        assert arrangement(board) == before


def test_more_refusals_touch_nothing(family, transformer, students, projectors):
    teachers_own = make_projector(1, "ffn")  # fitted in the teacher's block 1
    unreadable = make_projector(0, "text", reference=0)
    wide = make_projector(3, "ffn", width=32)
    extra = {item.name: item for item in (teachers_own, unreadable, wide)}
    board = Plugboard(family, transformer, INTERVALS, students, projectors | extra)
    refusals = [
        ({"students": [FIRST], "projectors": [teachers_own.name]}, "was fitted in the teacher; here block 1 is"),
        ({"projectors": [unreadable.name]}, "no intact block lies before"),
        ({"projectors": [wide.name]}, "does not fit this model"),
        ({"projectors": [f"{STACK}.2.ffn"]}, r"2\.ffn has no trained projector; run 'stages=\[width\]'"),
        ({"students": [SECOND], "removed": [FIRST], "projectors": [f"{STACK}.3.text", *extra]}, ""),
        ({"students": [FIRST, SECOND], "projectors": [f"{STACK}.6.ffn"]}, "6.ffn has no trained projector"),
    ]
    board(FIRST, f"{STACK}.3.text")
    before = arrangement(board)
    for arguments, message in refusals:
        with pytest.raises(UsageError, match=message):
            board.arrange(**arguments)
        assert arrangement(board) == before


def test_a_projector_in_a_removed_block_is_refused(family, transformer, students):
    gone = make_projector(2, "ffn")
    board = Plugboard(family, transformer, INTERVALS, students, {gone.name: gone})
    assert board(gone.name).width == {STACK: {"text": [], "ffn": [2]}}
    before = arrangement(board)
    with pytest.raises(UsageError, match=r"projectors\.transformer_blocks\.ffn: block 2 is not among"):
        board(FIRST, gone.name)
    assert arrangement(board) == before


# Models of their own.


@pytest.mark.parametrize("text_output", ["last", "each"])
@pytest.mark.parametrize("keep_text_query", [False, True])
@torch.no_grad()
def test_a_standalone_model_equals_the_board_and_shares_with_it(
    family, make_batch, transformer, students, projectors, text_output, keep_text_query
):
    inputs, layout = make_batch().inputs, Layout(text_output, keep_text_query)
    board = Plugboard(family, transformer, INTERVALS, students, projectors, layout).all()
    expected, shared = transformer(**inputs)[0], pointers(transformer)
    model = board.standalone()
    assert type(model) is PrunedQwenImageTransformer2DModel
    assert not model.training
    assert torch.equal(model(**inputs)[0], expected)
    assert pointers(model) == shared
    config = model.config
    assert (config.num_layers, list(config.pruned_text), list(config.pruned_ffn)) == (6, [2, 3, 5], [0, 3, 4])
    assert (config.text_output, config.keep_text_query) == (text_output, keep_text_query)
    board()  # the board goes on; the model stays what it is
    assert torch.equal(model(**inputs)[0], expected)


@torch.no_grad()
def test_a_standalone_model_survives_saving(tmp_path, make_batch, transformer, board):
    inputs = make_batch().inputs
    expected = board.all().transformer(**inputs)[0]
    board.standalone().save_pretrained(tmp_path)
    assert torch.equal(PrunedQwenImageTransformer2DModel.from_pretrained(tmp_path)(**inputs)[0], expected)


@pytest.mark.parametrize("chosen", ["projectors", "students", "teacher"])
def test_a_standalone_model_of_a_frozen_one_is_frozen(transformer, board, chosen):
    board.transformer.requires_grad_(False)
    for student in board.students.values():
        student.requires_grad_(False)
    board(*{"projectors": [*board.names, *board.projectors], "students": board.names, "teacher": []}[chosen])
    assert not any(parameter.requires_grad for parameter in transformer.parameters())
    model = board.standalone()
    assert not any(parameter.requires_grad for parameter in (*transformer.parameters(), *model.parameters()))


@pytest.mark.parametrize("arrange", ["all", "remove", "teacher"])
@torch.no_grad()
def test_without_projectors_the_standalone_class_is_the_stock_one(family, make_batch, transformer, students, arrange):
    board = Plugboard(family, transformer, INTERVALS, students)
    {"all": board.all, "remove": board.remove, "teacher": board}[arrange]()
    inputs, model = make_batch().inputs, board.standalone()
    assert type(model) is QwenImageTransformer2DModel
    assert "pruned_text" not in model.config
    assert model.config.num_layers == len(model.transformer_blocks) == (LAYERS if arrange == "teacher" else 6)
    assert torch.equal(model(**inputs)[0], transformer(**inputs)[0])
    assert pointers(model) == pointers(transformer)


# Counts.


@pytest.mark.parametrize(
    ("changes", "text", "ffn"),
    [
        ({}, 10905704512, 10528131136),
        ({"keep_text_query": False}, None, 10452608064),
        ({"text_output": "each"}, None, 10575332416),
    ],
)
def test_the_papers_width_sets_leave_ten_and_a_half_billion(family, changes, text, ffn):
    read = {name: OmegaConf.load(CONF / f"{name}.yaml") for name in (
        "model/qwen_image", "intervals/qwen_image_paper", "width/qwen_image_paper"
    )}  # fmt: skip
    model, intervals, width = (OmegaConf.to_container(content) for content in read.values())
    layout = Layout(**({"text_output": "last", "keep_text_query": width["keep_text_query"]} | changes))
    pairs = {STACK: [tuple(pair) for pair in intervals[STACK]]}
    counts = count_parameters(family, model["arch"], pairs, {STACK: width[STACK]}, layout)
    assert counts["teacher"] == 20430401088
    assert counts["depth"] == 11934618688
    assert counts["student"] == counts["ffn"] == ffn
    assert text in (None, counts["text"])
    assert (counts["teacher_layers"], counts["student_layers"]) == (60, 35)


@pytest.mark.parametrize("text_output", ["last", "each"])
@pytest.mark.parametrize("keep_text_query", [False, True])
def test_counts_equal_the_model_that_is_exported(
    family, transformer, students, projectors, text_output, keep_text_query
):
    arch, layout = dict(transformer.config), Layout(text_output, keep_text_query)
    counts = count_parameters(family, arch, INTERVALS, {STACK: {"text": TEXT, "ffn": FFN}}, layout)
    board = Plugboard(family, transformer, INTERVALS, students, projectors, layout)
    sizes = {}
    for step, names in (("depth", []), ("text", NAMES[: len(TEXT)]), ("ffn", NAMES)):
        board(FIRST, SECOND, *names)
        sizes[step] = sum(parameter.numel() for parameter in board.standalone().parameters())
    assert {step: counts[step] for step in sizes} == sizes
    assert counts["student"] == sizes["ffn"]
    assert counts["student_layers"] == len(kept_layers(LAYERS, INTERVALS[STACK]))
