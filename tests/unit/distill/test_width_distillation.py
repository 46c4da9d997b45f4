"""Projectors against torch.linalg.lstsq and losses against loops, on activations captured by plain hooks."""

import pytest
import torch
from trainers import train

from ppcl.config import DistillConfig
from ppcl.distill.width import WidthDistillation, places
from ppcl.errors import UsageError
from ppcl.layers import Layout
from ppcl.methods.width import ffn_errors, select_ffn, select_text

STACK = "transformer_blocks"
LAYERS = 7
LENGTHS = (20, 31, 25)  # more valid tokens in three batches than features
INTERVALS = {STACK: [(2, 4)]}
# A run of two behind block 2, its reference without FFN, a block that loses both.
SETS = {"text": [3, 4, 6], "ffn": [2, 4]}


def settings(**changes):
    return DistillConfig(**({"steps": 3, "lr": 1e-2, "warmup_steps": 1, "gradient_checkpointing": False} | changes))


@pytest.fixture
def teacher(make_transformer):
    return make_transformer(LAYERS)


@pytest.fixture
def student(make_transformer):
    """Stands for blocks 2 to 4, with weights of its own; frozen, as a student that is loaded."""
    return make_transformer(1, seed=9).transformer_blocks[0].requires_grad_(False)


@pytest.fixture
def batches(make_batch):
    return [make_batch(seed, LENGTHS, padded_to=40) for seed in range(3)]


def distillation(family, teacher, sets=None, text_output="last", student=None, config=None, **options):
    intervals, students = (INTERVALS, {f"{STACK}.2-4": student}) if student is not None else ({}, {})
    kept = places(family, teacher, intervals, students)
    width = {STACK: {"text": [], "ffn": []} | (sets or SETS)}
    return WidthDistillation(family, teacher, kept, width, Layout(text_output), config or settings(), **options)


def randomise(module, scale=0.05):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parts.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return module


def projectors_by_block(module):
    """The text and FFN projectors of each block together."""
    found = {}
    for number, item in enumerate(module.pruned):
        found.setdefault(item.place.index, {}).update(module.projectors(number))
    return found


class Captured:
    """Arguments, z and both outputs of every teacher block."""

    @torch.no_grad()
    def __init__(self, teacher, batch):
        self.mask, self.kwargs, self.z, self.text, self.image = (
            batch.inputs["encoder_hidden_states_mask"],
            {},
            {},
            {},
            {},
        )
        handles = []
        for index, block in enumerate(teacher.transformer_blocks):

            def on_attention(_, args, kwargs, index=index):
                self.z[index] = kwargs["encoder_hidden_states"]

            def on_block(_, args, kwargs, output, index=index):
                self.kwargs[index] = kwargs
                self.text[index], self.image[index] = output

            handles.append(block.attn.register_forward_pre_hook(on_attention, with_kwargs=True))
            handles.append(block.register_forward_hook(on_block, with_kwargs=True))
        teacher(**batch.inputs)
        for handle in handles:
            handle.remove()

    def z_of(self, block, index):
        """What `block` would hand to its text QKV were it called with the teacher's input at `index`."""
        shift, scale = block.txt_mod(self.kwargs[index]["temb"]).chunk(6, dim=-1)[:2]
        return block.txt_norm1(self.kwargs[index]["encoder_hidden_states"]) * (1 + scale[:, None]) + shift[:, None]

    def after_attention(self, block, index, z):
        """Image and text behind the attention of `block`, called with the teacher's input and `z`."""
        kwargs = self.kwargs[index]
        image, text = kwargs["hidden_states"], kwargs["encoder_hidden_states"]
        mods = [mod(kwargs["temb"])[:, None].chunk(6, dim=-1) for mod in (block.img_mod, block.txt_mod)]
        attended = block.attn(
            hidden_states=block.img_norm1(image) * (1 + mods[0][1]) + mods[0][0],
            encoder_hidden_states=z,
            encoder_hidden_states_mask=self.mask,
            image_rotary_emb=kwargs["image_rotary_emb"],
        )
        return image + mods[0][2] * attended[0], text + mods[1][2] * attended[1]

    def feed_forward(self, block, index, stream, state):
        mod = getattr(block, f"{stream}_mod")(self.kwargs[index]["temb"])[:, None].chunk(6, dim=-1)
        normed = getattr(block, f"{stream}_norm2")(state) * (1 + mod[4]) + mod[3]
        return state + mod[5] * getattr(block, f"{stream}_mlp")(normed)


def affine(projector, x):
    return x + x @ projector.weight.T + projector.bias


def assert_least_squares(projector, x, y, masks):
    """`x`, `y`: one tensor per batch."""
    rows, targets = (
        torch.cat(
            [value[mask] if mask is not None else value.flatten(0, 1) for value, mask in zip(v, masks, strict=True)]
        )
        for v in (x, y)
    )
    assert len(rows) > rows.shape[1]
    known = torch.cat([rows, torch.ones(len(rows), 1)], dim=1).double()
    solution = torch.linalg.lstsq(known, (targets - rows).double()).solution.float()
    torch.testing.assert_close(projector.weight, solution[:-1].T, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(projector.bias, solution[-1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("text_output", ["last", "each"])
@torch.no_grad()
def test_projectors_start_at_the_least_squares_solution(family, teacher, batches, text_output):
    module = distillation(family, teacher, text_output=text_output)
    module.fit_linear(batches, ridge=0.0)
    calls = [Captured(teacher, batch) for batch in batches]
    masks, everything = [call.mask for call in calls], [None] * len(calls)
    blocks = teacher.transformer_blocks
    found = projectors_by_block(module)
    assert {index: set(projectors) for index, projectors in found.items()} == {
        2: {"image_ffn", "text_ffn"},
        3: {"text_in", "text_out"},
        4: {"text_in", "text_out", "image_ffn", "text_ffn"},
        6: {"text_in", "text_out"},
    }
    for index, reference in ((3, 2), (4, 2), (6, 5)):
        z = [[call.z[at] for call in calls] for at in (reference, index)]
        assert_least_squares(found[index]["text_in"], *z, masks)
        reads = reference if text_output == "last" else index - 1
        h = [[call.text[at] for call in calls] for at in (reads, index)]
        assert_least_squares(found[index]["text_out"], *h, masks)
    for at in (2, 4):  # block 4 loses its text stream too, but each projector is fitted with the rest intact
        states = [call.after_attention(blocks[at], at, call.z[at]) for call in calls]
        images, texts = [call.image[at] for call in calls], [call.text[at] for call in calls]
        assert_least_squares(found[at]["image_ffn"], [state[0] for state in states], images, everything)
        assert_least_squares(found[at]["text_ffn"], [state[1] for state in states], texts, masks)


@pytest.mark.parametrize("text_output", ["last", "each"])
@torch.no_grad()
def test_a_student_as_reference(family, teacher, student, batches, text_output):
    """z is the student's own, on the teacher's input at u; h is the teacher's output at v."""
    module = distillation(family, teacher, {"text": [5]}, text_output, student)
    module.fit_linear(batches, ridge=0.0)
    calls = [Captured(teacher, batch) for batch in batches]
    masks, projectors = [call.mask for call in calls], module.projectors(0)
    assert (module.pruned[0].reference.index, module.pruned[0].reference.end) == (2, 4)
    assert_least_squares(
        projectors["text_in"], [call.z_of(student, 2) for call in calls], [call.z[5] for call in calls], masks
    )
    assert_least_squares(
        projectors["text_out"], [call.text[4] for call in calls], [call.text[5] for call in calls], masks
    )


@pytest.mark.parametrize("text_output", ["last", "each"])
@torch.no_grad()
def test_a_student_as_base(family, teacher, student, batches, text_output):
    module = distillation(family, teacher, {"text": [2], "ffn": [2]}, text_output, student)
    module.fit_linear(batches, ridge=0.0)
    calls = [Captured(teacher, batch) for batch in batches]
    masks, projectors = [call.mask for call in calls], projectors_by_block(module)[2]
    assert module.last == (STACK, 4)
    assert_least_squares(
        projectors["text_in"], [call.z[1] for call in calls], [call.z_of(student, 2) for call in calls], masks
    )
    assert_least_squares(
        projectors["text_out"], [call.text[1] for call in calls], [call.text[4] for call in calls], masks
    )
    states = [call.after_attention(student, 2, call.z_of(student, 2)) for call in calls]
    images, texts = [call.image[4] for call in calls], [call.text[4] for call in calls]
    assert_least_squares(projectors["image_ffn"], [state[0] for state in states], images, [None] * len(calls))
    assert_least_squares(projectors["text_ffn"], [state[1] for state in states], texts, masks)


def valid_tokens(value, stream):
    return [value[sample, token] for sample, length in enumerate(LENGTHS)
            for token in range(length if stream == "text" else value.shape[1])]  # fmt: skip


def plain_direction(student, target, stream):
    """Eq. 11 of one stream by loops."""
    pairs = list(zip(valid_tokens(student, stream), valid_tokens(target, stream), strict=True))
    return sum((a / a.norm() - b / b.norm()).square().sum().item() for a, b in pairs) / len(pairs)


def plain_relative(student, target, stream):
    """Eq. 12 of one projector by loops, relative to what it stands for."""
    pairs = list(zip(valid_tokens(student, stream), valid_tokens(target, stream), strict=True))
    return sum((a - b).square().sum().item() for a, b in pairs) / sum(b.square().sum().item() for _, b in pairs)


@torch.no_grad()
def plain_terms(module, number, call, text_output):
    """Eq. 11-12 of one place; `module` lends only projectors and what it says of its places."""
    item, projectors = module.pruned[number], module.projectors(number)
    place, index, end = item.place, item.place.index, item.place.end
    z = z_target = call.z_of(place.module, index)
    terms = {}
    if item.kind == "text":
        reads = item.reference
        z_reference = call.z_of(reads.module, reads.index)
        z = affine(projectors["text_in"], z_reference)
        terms["linear_z"] = plain_relative(z, z_target, "text")
    image, text = call.after_attention(place.module, index, z)
    has_ffn = item.kind != "ffn"
    image = call.feed_forward(place.module, index, "img", image) if has_ffn else affine(projectors["image_ffn"], image)
    if item.kind == "text":
        h = call.text[reads.end] if text_output == "last" else call.text[index - 1]
        text = affine(projectors["text_out"], h)
    else:
        text = affine(projectors["text_ffn"], text)
    if not has_ffn:
        terms["linear_image"] = plain_relative(image, call.image[end], "image")
    terms["linear_text"] = plain_relative(text, call.text[end], "text")
    terms["image"] = plain_direction(image, call.image[end], "image")
    terms["text"] = plain_direction(text, call.text[end], "text")
    return terms


def all_terms(module, batch):
    terms = [None] * len(module.pruned)
    module.each_loss(batch, terms.__setitem__)
    return terms


@pytest.mark.parametrize("text_output", ["last", "each"])
@pytest.mark.parametrize("with_student", [False, True])
def test_losses_equal_a_plain_reference(family, teacher, student, batches, text_output, with_student):
    sets = {"text": [2, 5], "ffn": [1, 5]} if with_student else SETS
    module = randomise(
        distillation(family, teacher, sets, text_output, student if with_student else None, linear_weight=0.5)
    )
    call, found = Captured(teacher, batches[0]), all_terms(module, batches[0])
    for number, terms in enumerate(found):
        expected = plain_terms(module, number, call, text_output)
        weighted = {key: value * (0.5 if key.startswith("linear") else 1) for key, value in expected.items()}
        assert {key for key in terms if not key.endswith("ratio")} == {"loss", *expected}
        for key, value in weighted.items():
            assert terms[key].item() == pytest.approx(value, rel=1e-4), key
        assert terms["loss"].item() == pytest.approx(sum(weighted.values()), rel=1e-4)


@pytest.mark.parametrize("text_output", ["last", "each"])
def test_a_student_as_reference_enters_the_loss(family, teacher, student, batches, text_output):
    module = randomise(distillation(family, teacher, {"text": [5, 6]}, text_output, student))
    call = Captured(teacher, batches[0])
    assert [item.reference.base for item in module.pruned] == [f"{STACK}.2-4"] * 2
    for number, terms in enumerate(all_terms(module, batches[0])):
        expected = plain_terms(module, number, call, text_output)
        assert terms["loss"].item() == pytest.approx(sum(expected.values()), rel=1e-4)


def test_gradient_checkpointing_changes_no_gradient(family, teacher, batches):
    gradients = []
    for checkpointing in (False, True):
        module = randomise(distillation(family, teacher, config=settings(gradient_checkpointing=checkpointing)))
        for terms in all_terms(module, batches[0]):
            terms["loss"].backward()
        gradients.append({name: parameter.grad for name, parameter in module.parts.named_parameters()})
    for name, value in gradients[0].items():
        assert value.any(), name
        torch.testing.assert_close(gradients[1][name], value, rtol=0, atol=1e-7)


def test_padded_text_reaches_neither_loss_nor_fit(family, teacher, make_batch):
    found = []
    for factor in (1, -30):
        batch = make_batch(0, (30, 45, 35))
        batch.inputs["encoder_hidden_states"][~batch.inputs["encoder_hidden_states_mask"]] *= factor
        module = distillation(family, teacher)
        module.fit_linear([batch], ridge=1e-6)
        found.append((module.parts.state_dict(), [terms["loss"].item() for terms in all_terms(module, batch)]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-3)
    assert found[1][1] == pytest.approx(found[0][1], abs=1e-5)


# Training.


@pytest.mark.parametrize("text_output", ["last", "each"])
def test_only_projectors_learn_and_only_projectors_are_saved(family, teacher, student, make_batch, text_output):
    models = {"teacher": teacher, "student": student}
    before = {who: {k: v.clone() for k, v in model.state_dict().items()} for who, model in models.items()}
    module = distillation(family, teacher, {"text": [2, 5], "ffn": [1, 5]}, text_output, student)
    start = {name: value.clone() for name, value in module.state_dict().items()}
    after = train(module, make_batch, LENGTHS)
    for who, model in models.items():
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert all(torch.equal(value, before[who][name]) for name, value in model.state_dict().items()), who
    text, ffn = ("text_in", "text_out"), ("image_ffn", "text_ffn")
    parts = {"1:ffn": ffn, "2:text": text, "5:text": text, "5:ffn": ffn}
    expected = {
        f"parts.{STACK}:{name}.{key}.{kind}"
        for name, keys in parts.items()
        for key in keys
        for kind in ("weight", "bias")
    }
    assert set(after) == {*expected, "average_losses", "average_steps"}
    assert all(not torch.equal(after[name], start[name]) for name in expected)
    learning = {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
    assert learning == {id(parameter) for parameter in module.parts.parameters()}


@pytest.mark.parametrize("max_grad_norm", [None, 1e-3])
@pytest.mark.parametrize("text_output", ["last", "each"])
def test_a_subset_trains_to_the_same_weights_bit_for_bit(
    family, make_transformer, make_batch, text_output, max_grad_norm
):
    config, teacher = settings(max_grad_norm=max_grad_norm), make_transformer(LAYERS)
    together = train(distillation(family, teacher, SETS, text_output, config=config), make_batch, LENGTHS)
    subsets = [{"ffn": [2]}, {"text": [3]}, {"text": [6]}, {"text": [3, 4], "ffn": [4]}]
    for subset in subsets:
        alone = train(distillation(family, teacher, subset, text_output, config=config), make_batch, LENGTHS)
        names = [name for name in alone if name.startswith("parts.")]
        assert names
        for name in names:
            assert torch.equal(alone[name], together[name]), (subset, name)


def test_training_lowers_the_loss(family, teacher, make_batch):
    module = distillation(family, teacher, config=settings(steps=15, lr=1e-3))
    heldout = [make_batch(100, LENGTHS)]
    before = module.heldout(heldout)
    train(module, make_batch, LENGTHS, steps=15)
    for start, end in zip(before, module.heldout(heldout), strict=True):
        assert end["loss"] < start["loss"]


def test_a_loss_that_is_not_finite_is_a_sentence(family, teacher, make_batch):
    module = distillation(family, teacher, config=settings(lr=1e30))
    with pytest.raises(UsageError, match=r"width\.lr=1e\+30 made the loss of .* (nan|inf) at step \d"):
        train(module, make_batch, LENGTHS)


def test_the_teacher_runs_no_further_than_the_last_place(family, teacher, student, batches):
    ran = []
    for index, block in enumerate(teacher.transformer_blocks):
        block.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    all_terms(distillation(family, teacher, {"ffn": [1]}), batches[0])
    assert ran == [0, 1]
    ran.clear()
    all_terms(distillation(family, teacher, {"ffn": [2]}, student=student), batches[0])
    assert ran == [0, 1, 2, 3, 4]


# Selection.


def reach(distance):
    return lambda reference, pruned: 1.0 if pruned - reference <= distance else 0.5


@pytest.mark.parametrize(
    ("kept", "similarity", "most", "expected"),
    [
        (range(6), reach(9), None, [1, 2, 3, 4, 5]),
        (range(6), reach(9), 2, [4, 5]),  # deeper ones first
        (range(6), reach(9), 0, []),
        (range(6), reach(0), None, []),
        (range(6), reach(1), None, [1, 3, 5]),  # 4 would make 5 read 3
        (range(6), reach(1), 2, [3, 5]),
        (range(6), reach(2), None, [1, 2, 4, 5]),  # 3 would make 5 read 2
        ([0, 3, 4, 7], reach(3), None, [3, 7]),  # 7 reads 4; 4 would make it read 3, four away
        ([4], reach(9), None, []),
    ],
)
def test_text_streams_are_chosen_deeper_first_while_their_run_stays_similar(kept, similarity, most, expected):
    assert select_text(similarity, list(kept), 0.9, most) == expected


def test_the_threshold_itself_passes():
    table = {(0, 1): 0.98, (1, 2): 0.999, (0, 2): 0.9985, (2, 3): 0.9989}
    kept = [0, 1, 2, 3]
    assert select_text(lambda r, p: table[r, p], kept, 0.999, None) == [2]
    assert select_text(lambda r, p: table.get((r, p), 0.0), kept, 0.9989, None) == [3]  # 2 would make 3 read 1
    assert select_text(lambda r, p: table.get((r, p), 1.0), kept, 0.9985, None) == [2, 3]


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, []), (1, [("b", 2)]), (2, [("b", 2), ("a", 7)]), (9, [("b", 2), ("a", 7), ("a", 5), ("a", 0)])],
)
def test_the_most_nearly_linear_ffns_of_all_stacks_are_chosen(count, expected):
    assert select_ffn({("a", 0): 0.3, ("b", 2): 0.1, ("a", 5): 0.2, ("a", 7): 0.15}, count) == expected


@torch.no_grad()
def test_ffn_errors_are_those_of_the_fitted_blocks(family, teacher, batches):
    module = distillation(family, teacher, {"ffn": [1, 4]})
    module.fit_linear(batches[:2], ridge=1e-6)
    call, errors = Captured(teacher, batches[2]), ffn_errors(module, batches[2:])
    assert list(errors) == [(STACK, 1), (STACK, 4)]
    for number, key in enumerate(errors):
        terms = plain_terms(module, number, call, "last")
        expected = (terms["linear_image"] + terms["linear_text"]) / 2
        assert errors[key] == pytest.approx(expected, rel=1e-3)
