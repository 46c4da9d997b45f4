import pytest
import torch
from torch.nn import functional as F
from trainers import train

from ppcl.config import DistillConfig
from ppcl.distill.depth import DepthDistillation
from ppcl.distill.groups import select_intervals
from ppcl.efficiency import LiveBytes
from ppcl.errors import UsageError
from ppcl.ops.losses import direction_loss, magnitude_loss
from ppcl.surgery.plugboard import Plugboard

STACK = "transformer_blocks"
INTERVALS = {STACK: [(0, 1), (2, 4)]}
LAYERS = 7
LENGTHS = (5, 9, 7)


def settings(**changes):
    return DistillConfig(**({"steps": 3, "lr": 1e-2, "warmup_steps": 1, "gradient_checkpointing": False} | changes))


@pytest.fixture
def teacher(make_transformer):
    return make_transformer(LAYERS)


@pytest.fixture
def batch(make_batch):
    return make_batch(0, LENGTHS)


def parallel_terms(module, batch):
    """Terms per interval of one teacher pass."""
    terms = [None] * len(module.pairs)

    module.each_loss(batch, terms.__setitem__)
    return terms


@torch.no_grad()
def captured(teacher, batch):
    """Arguments and (text, image) outputs of each block by plain hooks."""
    calls = {}
    handles = [
        block.register_forward_hook(
            lambda _, args, kwargs, output, index=index: calls.update({index: (kwargs, output)}), with_kwargs=True
        )
        for index, block in enumerate(teacher.transformer_blocks)
    ]
    teacher(**batch.inputs)
    for handle in handles:
        handle.remove()
    return calls


def plain_loss(student, target):
    """Eq. 6 by loops over samples and their valid tokens."""
    total = 0.0
    for stream, (s, t) in {"text": (student[0], target[0]), "image": (student[1], target[1])}.items():
        values = []
        for sample, length in enumerate(LENGTHS):
            count = length if stream == "text" else s.shape[1]
            for token in range(count):
                a, b = s[sample, token], t[sample, token]
                values.append((a / a.norm() - b / b.norm()).square().sum().item())
        total += sum(values) / len(values)
    return total


@pytest.mark.parametrize("init", ["first", "middle", "average"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_equal_a_plain_reference(family, teacher, batch, init, checkpointing):
    """The student gets the teacher's own input at u and is judged on the teacher's output at v."""
    module = DepthDistillation(family, teacher, INTERVALS, settings(init=init, gradient_checkpointing=checkpointing))
    calls = captured(teacher, batch)
    for (u, v), terms in zip(INTERVALS[STACK], parallel_terms(module, batch), strict=True):
        with torch.no_grad():
            student = module.student(STACK, (u, v))(**calls[u][0])
        assert terms["loss"].item() == pytest.approx(plain_loss(student, calls[v][1]), rel=1e-4)
        ratio = (student[1].norm(dim=-1) / calls[v][1][1].norm(dim=-1)).mean()
        assert terms["image_norm_ratio"].item() == pytest.approx(ratio.item(), rel=1e-4)


def test_the_magnitude_term_is_added_with_its_weight(family, teacher, batch):
    plain, weighted = (
        parallel_terms(DepthDistillation(family, teacher, INTERVALS, settings(magnitude_weight=weight)), batch)
        for weight in (0.0, 0.5)
    )
    calls = captured(teacher, batch)
    mask = batch.inputs["encoder_hidden_states_mask"]
    for (u, v), without, with_it in zip(INTERVALS[STACK], plain, weighted, strict=True):
        with torch.no_grad():
            student = teacher.transformer_blocks[u].forward(**calls[u][0])
        extra = magnitude_loss(student[1], calls[v][1][1]) + magnitude_loss(student[0], calls[v][1][0], mask)
        assert with_it["loss"].item() == pytest.approx(without["loss"].item() + 0.5 * extra.item(), rel=1e-4)


def test_gradients_equal_those_of_a_direct_call(family, teacher, batch):
    """One step's gradient is that of the summed loss with the teacher held constant."""
    module = DepthDistillation(family, teacher, INTERVALS, settings())
    for terms in parallel_terms(module, batch):
        terms["loss"].backward()
    calls, mask = captured(teacher, batch), batch.inputs["encoder_hidden_states_mask"]
    for u, v in INTERVALS[STACK]:
        student = module.student(STACK, (u, v))
        found = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
        student.zero_grad()
        text, image = student(**calls[u][0])
        (direction_loss(image, calls[v][1][1]) + direction_loss(text, calls[v][1][0], mask)).backward()
        for name, parameter in student.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("max_grad_norm", [None, 1e-3])
def test_a_subset_trains_to_the_same_weights_bit_for_bit(family, make_transformer, make_batch, max_grad_norm):
    config = settings(max_grad_norm=max_grad_norm)
    teacher = make_transformer(LAYERS)
    all_of_them = train(DepthDistillation(family, teacher, INTERVALS, config), make_batch, LENGTHS)
    for pair in INTERVALS[STACK]:
        alone = train(DepthDistillation(family, teacher, {STACK: [pair]}, config), make_batch, LENGTHS)
        names = [name for name in alone if name.startswith("parts.")]
        assert names
        for name in names:
            assert torch.equal(alone[name], all_of_them[name]), name


def test_gradient_checkpointing_does_not_change_the_weights(family, teacher, make_batch):
    plain, checkpointed = (
        train(DepthDistillation(family, teacher, INTERVALS, settings(gradient_checkpointing=flag)), make_batch, LENGTHS)
        for flag in (False, True)
    )
    assert all(torch.equal(checkpointed[name], value) for name, value in plain.items())


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_only_students_learn_and_only_students_are_saved(family, teacher, make_batch, mode):
    # A chain has the teacher's blocks in it, which a run freezes; parallel training asks nothing of the caller.
    teacher.requires_grad_(mode == "parallel")
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    module = DepthDistillation(family, teacher, INTERVALS, settings(mode=mode))
    start = {name: value.clone() for name, value in module.state_dict().items()}
    after = train(module, make_batch, LENGTHS)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    students = [name for name in after if name.startswith("parts.")]
    assert set(after) == {*students, "average_losses", "average_steps"}
    assert {name.split(".")[1] for name in students} == {f"{STACK}:0-1", f"{STACK}:2-4"}
    assert sum(not torch.equal(after[name], start[name]) for name in students) > 0.9 * len(students)
    assert after["average_steps"].item() == 3
    assert (after["average_losses"] > 0).all()


@pytest.mark.parametrize(("pairs", "blocks"), [([(0, 1), (2, 4)], 5), ([(0, 1)], 2), ([(3, 6)], 7)])
def test_the_teacher_runs_no_further_than_the_last_interval(family, teacher, batch, pairs, blocks):
    module, ran = DepthDistillation(family, teacher, {STACK: pairs}, settings()), []
    for index, block in enumerate(teacher.transformer_blocks):
        block.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    parallel_terms(module, batch)
    assert ran == list(range(blocks))


def test_an_intervals_graph_is_made_when_the_teacher_passes_its_end(family, teacher, batch):
    """One student at a time: the first has been visited before the teacher runs on to the second."""
    module, order = DepthDistillation(family, teacher, INTERVALS, settings()), []
    for index, block in enumerate(teacher.transformer_blocks):
        block.register_forward_hook(lambda *_, index=index: order.append(index))
    module.each_loss(batch, lambda number, _: order.append(f"visit {number}"))
    assert order == [0, 1, "visit 0", 2, 3, 4, "visit 1"]


def test_padded_text_does_not_reach_the_loss(family, teacher, make_batch):
    module = DepthDistillation(family, teacher, INTERVALS, settings())
    batch, changed = make_batch(0, LENGTHS), make_batch(0, LENGTHS)
    changed.inputs["encoder_hidden_states"][~changed.inputs["encoder_hidden_states_mask"]] *= -30
    for plain, other in zip(parallel_terms(module, batch), parallel_terms(module, changed), strict=True):
        assert other["loss"].item() == pytest.approx(plain["loss"].item(), abs=1e-6)


def test_heldout_is_the_mean_over_batches_without_gradient(family, teacher, make_batch):
    module = DepthDistillation(family, teacher, INTERVALS, settings())
    batches = [make_batch(seed, LENGTHS) for seed in (3, 4)]
    terms = [parallel_terms(module, batch) for batch in batches]
    for number, found in enumerate(module.heldout(batches)):
        for key, value in found.items():
            assert value == pytest.approx(sum(each[number][key].item() for each in terms) / 2, rel=1e-6)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_training_lowers_the_loss(family, teacher, make_batch):
    module = DepthDistillation(family, teacher, INTERVALS, settings(steps=25, lr=3e-3))
    heldout = [make_batch(100, LENGTHS)]
    before = module.heldout(heldout)
    train(module, make_batch, LENGTHS, steps=25)
    for start, end in zip(before, module.heldout(heldout), strict=True):
        assert end["loss"] < start["loss"]


def test_the_running_loss_is_a_plain_mean_at_first(family, teacher, make_batch):
    """With a learning rate of 0 the losses of the three steps are known; none of them weighs more."""
    module = DepthDistillation(family, teacher, INTERVALS, settings(lr=0.0))
    expected = [terms["loss"] for terms in module.heldout([make_batch(step, LENGTHS) for step in range(3)])]
    assert train(module, make_batch, LENGTHS)["average_losses"].tolist() == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_is_not_finite_is_a_sentence(family, teacher, make_batch):
    """Divergence names the learning rate and the step."""
    module = DepthDistillation(family, teacher, INTERVALS, settings(lr=1e30))
    with pytest.raises(UsageError, match=r"distill\.lr=1e\+30 made the loss of .*0-1.* nan at step \d"):
        train(module, make_batch, LENGTHS)


def sequential_step(family, teacher, batch):
    """One step of the paper's ablation without a trainer."""
    module = DepthDistillation(family, teacher, INTERVALS, settings(mode="sequential"))
    module.manual_backward = lambda loss: loss.backward()
    return module, module._sequential_step(batch)


def test_sequential_students_are_fed_by_students(family, teacher, batch):
    module, logged = sequential_step(family, teacher, batch)
    targets = captured(teacher, batch)
    students = {f"{STACK}.{u}-{v}": module.student(STACK, (u, v)) for u, v in INTERVALS[STACK]}
    board = Plugboard(family, teacher, INTERVALS, students).all()
    chain = captured(teacher, batch)
    board()
    for position, (_, v) in enumerate(INTERVALS[STACK]):
        assert logged[position]["loss"].item() == pytest.approx(plain_loss(chain[position][1], targets[v][1]), rel=1e-4)
    parallel = parallel_terms(DepthDistillation(family, teacher, INTERVALS, settings()), batch)
    assert logged[0]["loss"].item() == pytest.approx(parallel[0]["loss"].item(), rel=1e-5)
    assert abs(logged[1]["loss"].item() - parallel[1]["loss"].item()) > 1e-6  # its input differs
    assert len(teacher.transformer_blocks) == LAYERS  # the teacher is put back


def test_sequential_gradients_flow_through_the_chain(family, teacher, batch):
    """The first student also answers for the second's error, which parallel training never asks of it."""
    sequential, _ = sequential_step(family, teacher, batch)
    parallel = DepthDistillation(family, teacher, INTERVALS, settings())
    for terms in parallel_terms(parallel, batch):
        terms["loss"].backward()
    for pair in INTERVALS[STACK]:
        chained, alone = (
            torch.cat([parameter.grad.flatten() for parameter in module.student(STACK, pair).parameters()])
            for module in (sequential, parallel)
        )
        assert F.cosine_similarity(chained, alone, dim=0) < 0.99999


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (None, INTERVALS),
        (["2-4"], {STACK: [(2, 4)]}),
        (["transformer_blocks.2-4", "0-1"], INTERVALS),
    ],
)
def test_intervals_are_chosen_by_name(names, expected):
    assert select_intervals(INTERVALS, names) == expected


@pytest.mark.parametrize("name", ["2-3", "transformer_blocks", "4", ""])
def test_an_unknown_interval_is_refused(name):
    with pytest.raises(UsageError, match=rf"distill\.intervals={name} .*transformer_blocks\.0-1"):
        select_intervals(INTERVALS, [name])


def test_students_are_built_one_at_a_time(family, make_transformer):
    """Each is taken away before the next is built, by its device or by its shards."""
    teacher, pairs = make_transformer(12), [(u, u + 1) for u in range(0, 12, 2)]
    block = sum(parameter.nbytes for parameter in teacher.transformer_blocks[0].parameters())
    with LiveBytes() as recorder:
        module = DepthDistillation(
            family, teacher, {STACK: pairs}, settings(), ready=lambda student: student.to("meta")
        )
    assert len(module.parts) == 6
    assert recorder.peak < 1.5 * block
