"""Fine-tuning against plain references: its losses, its mean of weights, its optimisers."""

import copy

import lightning as L
import pytest
import torch
from trainers import state_of, train

from ppcl.config import FinetuneConfig
from ppcl.distill.finetune import FineTune
from ppcl.errors import UsageError
from ppcl.surgery.adapter import merge_lora
from ppcl.surgery.plugboard import Plugboard

LENGTHS = (5, 9, 7)


def settings(**changes):
    return FinetuneConfig(**({"steps": 3, "lr": 1e-3, "warmup_steps": 1, "gradient_checkpointing": False} | changes))


@pytest.fixture
def batch(make_batch):
    return make_batch(0, LENGTHS)


@pytest.mark.parametrize(("output", "flow"), [(1.0, 0.0), (0.0, 1.0), (0.7, 0.3), (2.0, 0.0)])
def test_losses_equal_plain_references(family, teacher, student, batch, output, flow):
    module = FineTune(family, teacher, student, settings(output_weight=output, flow_weight=flow))
    terms = module.losses(batch)
    with torch.no_grad():
        velocity, target = student(**batch.inputs)[0], teacher(**batch.inputs)[0]
    plain = {"output": (velocity - target).pow(2).mean(), "flow": (velocity - batch.target).pow(2).mean()}
    weights = {"output": output, "flow": flow}
    assert terms.keys() == {"loss", *(key for key, weight in weights.items() if weight)}
    for key in terms.keys() - {"loss"}:
        assert terms[key].item() == pytest.approx(plain[key].item(), rel=1e-5)
    assert terms["loss"].item() == pytest.approx(sum(weights[key] * plain[key].item() for key in plain), rel=1e-5)


def test_a_copy_of_the_teacher_has_nothing_to_learn_from_it(family, teacher, batch):
    terms = FineTune(family, teacher, copy.deepcopy(teacher), settings()).losses(batch)
    assert terms["loss"].item() == terms["output"].item() == 0


def test_the_teacher_is_not_run_for_flow_matching_alone(family, teacher, student, batch):
    ran = []
    teacher.register_forward_pre_hook(lambda *_: ran.append(True))
    FineTune(family, teacher, student, settings(output_weight=0.0, flow_weight=1.0)).losses(batch)
    assert not ran


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_the_student_learns_and_only_the_student_is_saved(family, teacher, student, make_batch, optimizer):
    before, start = state_of(teacher), state_of(student)
    module = FineTune(family, teacher, student, settings(optimizer=optimizer))
    train(module, make_batch, LENGTHS)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert set(module.state_dict()) == {f"student.{name}" for name in start}
    assert module.result is student
    changed = [name for name, value in student.state_dict().items() if not torch.equal(value, start[name])]
    assert len(changed) > 0.9 * len(start)


def test_one_step_is_that_of_a_plain_optimizer(family, teacher, student, make_batch):
    """AdamW on the clipped gradient of the loss, at the first learning rate of the schedule."""
    config = settings(steps=1, max_grad_norm=0.5, weight_decay=0.1, flow_weight=0.5)
    reference = copy.deepcopy(student)
    train(FineTune(family, teacher, student, config), make_batch, LENGTHS, steps=1)
    reference.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        reference.parameters(), lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
    )
    batch = make_batch(0, LENGTHS)
    velocity = reference(**batch.inputs)[0]
    loss = (velocity - teacher(**batch.inputs)[0]).pow(2).mean() + 0.5 * (velocity - batch.target).pow(2).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
    optimizer.step()
    for (name, found), expected in zip(student.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, msg=name)


class Recorder(L.Callback):
    """The student's weights after every step."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, module, *_):
        self.weights.append([parameter.detach().clone() for parameter in module.student.parameters()])


@pytest.mark.parametrize("decay", [0.1, 0.9])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_mean_of_weights_equals_a_plain_loop(family, teacher, student, make_batch, decay, optimizer):
    """Short at first, by (1 + n) / (10 + n), then as configured."""
    mean = [parameter.detach().clone() for parameter in student.parameters()]
    module, recorder = (
        FineTune(family, teacher, student, settings(ema_decay=decay, optimizer=optimizer, steps=4)),
        Recorder(),
    )
    train(module, make_batch, LENGTHS, steps=4, callbacks=[recorder])
    assert len(recorder.weights) == 4
    for number, weights in enumerate(recorder.weights, start=1):
        keep = min(decay, (1 + number) / (10 + number))
        mean = [keep * old + (1 - keep) * new for old, new in zip(mean, weights, strict=True)]
    assert module.result is module.ema
    for (name, found), expected in zip(module.ema.named_parameters(), mean, strict=True):
        assert not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, msg=name)
    # What is saved can go on: the mean beside the student.
    assert {name.split(".")[0] for name in module.state_dict()} == {"student", "ema"}


@pytest.mark.parametrize(("optimizer", "count"), [("adamw", 1), ("muon", 2)])
def test_two_optimizers_count_one_step(family, teacher, student, make_batch, optimizer, count):
    module = FineTune(family, teacher, student, settings(optimizer=optimizer, steps=5))
    train(module, make_batch, LENGTHS, steps=5)
    trainer = module.trainer
    assert len(trainer.optimizers) == count
    steps = {int(entry["step"]) for entry in trainer.optimizers[-1].state.values()}
    assert steps == {5}
    assert all(config.scheduler.last_epoch == 5 for config in trainer.lr_scheduler_configs)
    assert all(group["lr"] == pytest.approx(0, abs=1e-9) for each in trainer.optimizers for group in each.param_groups)


def test_muon_takes_the_matrices_inside_blocks(family, teacher, student):
    """Every parameter has one optimiser; projections in and out, norms, biases and modulations stay with AdamW."""
    optimizers, schedulers = FineTune(family, teacher, student, settings(optimizer="muon")).configure_optimizers()
    names = {parameter: name for name, parameter in student.named_parameters()}
    taken = [{names[p] for group in each.param_groups for p in group["params"]} for each in optimizers]
    assert isinstance(optimizers[0], torch.optim.Muon)
    assert isinstance(optimizers[1], torch.optim.AdamW)
    assert len(schedulers) == 2
    assert not taken[0] & taken[1]
    assert taken[0] | taken[1] == set(names.values())
    assert "transformer_blocks.0.attn.to_q.weight" in taken[0]
    assert {"img_in.weight", "proj_out.weight", "transformer_blocks.0.img_mod.1.weight"} <= taken[1]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_loss_that_is_not_finite_is_a_sentence(family, teacher, student, make_batch, optimizer):
    module = FineTune(family, teacher, student, settings(lr=1e30, optimizer=optimizer))
    with pytest.raises(UsageError, match=r"finetune\.lr=1e\+30 made the loss (nan|inf) at step [12]; lower it\."):
        train(module, make_batch, LENGTHS)


def test_gradient_checkpointing_does_not_change_the_weights(family, teacher, student, make_batch, batch):
    results, losses = [], []
    for flag in (False, True):
        module = FineTune(family, teacher, copy.deepcopy(student), settings(gradient_checkpointing=flag, ema_decay=0.5))
        losses.append(module.losses(batch)["loss"].item())
        train(module, make_batch, LENGTHS)
        results.append(state_of(module))
    assert losses[0] == losses[1]
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[1][name], value) for name, value in results[0].items())


def test_training_lowers_the_loss(family, teacher, student, make_batch):
    module = FineTune(family, teacher, student, settings(steps=25, lr=3e-3))
    heldout = make_batch(100, LENGTHS)
    before = module.losses(heldout)["loss"].item()
    train(module, make_batch, LENGTHS, steps=25)
    assert module.losses(heldout)["loss"].item() < before


PLACES = {("transformer_blocks", 0): ("transformer_blocks", 1), ("transformer_blocks", 1): ("transformer_blocks", 2)}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_features_are_those_of_the_blocks_that_stand_for_one_another(family, teacher, student, batch, checkpointing):
    def image_streams(model):
        streams = []
        handles = [
            block.register_forward_hook(lambda *a: streams.append(a[-1][1])) for block in model.transformer_blocks
        ]
        with torch.no_grad():
            model(**batch.inputs)
        for handle in handles:
            handle.remove()
        return streams

    own, wanted = image_streams(student), image_streams(teacher)
    config = settings(feature_weight=0.5, output_weight=2.0, gradient_checkpointing=checkpointing)
    module = FineTune(family, teacher, student, config, PLACES)
    terms = module.losses(batch)
    errors = [(own[a] - wanted[b]).square().sum() / wanted[b].square().sum() for a, b in ((0, 1), (1, 2))]
    assert terms["feature"].item() == pytest.approx((sum(errors) / 2).item(), rel=1e-5)
    assert terms["loss"].item() == pytest.approx(2 * terms["output"].item() + 0.5 * terms["feature"].item(), rel=1e-5)
    terms["feature"].backward()
    last = student.transformer_blocks[1].img_mlp.net[2].weight.grad
    assert last is not None
    assert last.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_lora_starts_from_its_seed_alone(family, teacher, student):
    def start(seed):
        before = torch.get_rng_state()
        module = FineTune(family, teacher, copy.deepcopy(student), settings(lora_rank=2), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(1)
        return {name: value for name, value in module.student.named_parameters() if "lora_A" in name}

    first, again, other = start(0), start(0), start(1)
    assert first
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert not any(torch.equal(other[name], value) for name, value in first.items())


def test_a_lora_is_all_that_is_trained(family, teacher, student, batch, make_batch):
    before = {name: value.clone() for name, value in student.named_parameters()}
    with torch.no_grad():
        velocity = student(**batch.inputs)[0]
    module = FineTune(family, teacher, student, settings(lora_rank=2))
    with torch.no_grad():
        assert torch.equal(student(**batch.inputs)[0], velocity)  # it starts as nothing
    train(module, make_batch, LENGTHS)
    for name, value in student.named_parameters():
        if "lora_" not in name:
            assert torch.equal(value, before[name.replace(".base_layer", "")]), name
    trained = {
        name.split(".lora_")[0] for name, value in student.named_parameters() if "lora_B" in name and value.any()
    }
    linear = {n for n, m in student.named_modules() if isinstance(m, torch.nn.Linear) and "_blocks." in n}
    inner = {name.removesuffix(".base_layer") for name in linear if ".lora_" not in name}
    dead = (".txt_", ".to_add_out", ".add_q_proj")  # of the last block, whose text output reaches nothing
    assert {name for name in inner - trained if not (".1." in name and any(part in name for part in dead))} == set()


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_checkpoint_of_a_lora_holds_the_lora_alone(family, teacher, student, make_batch, decay):
    modules = [FineTune(family, teacher, copy.deepcopy(student), settings(lora_rank=2, ema_decay=decay))
               for _ in range(2)]  # fmt: skip
    train(modules[0], make_batch, LENGTHS)
    held = modules[0].state_dict()
    assert held
    assert all(".lora_" in name for name in held)
    modules[1].load_state_dict(held, strict=modules[1].strict_loading)
    found, expected = (state_of(module.result) for module in reversed(modules))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_a_merged_lora_leaves_weights_that_it_shares_as_they_are(family, pipeline):
    teacher = pipeline.transformer
    before = state_of(teacher)
    student = Plugboard(family, teacher, {}).standalone()
    module = FineTune(family, teacher, student, settings(lora_rank=2))
    memory = {value.data_ptr() for value in teacher.parameters()}
    layers = [value for value in student.parameters() if not value.requires_grad]
    assert all(value.data_ptr() in memory for value in layers)  # it costs no memory beside the teacher
    with torch.no_grad():
        for name, value in student.named_parameters():
            value.fill_(0.1) if "lora_" in name else None
    merge_lora(module.whole_result())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    changed = [name for name, value in student.state_dict().items() if not torch.equal(value, before[name])]
    assert "transformer_blocks.0.attn.to_q.weight" in changed


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_the_velocity_error_is_that_of_the_weights_that_are_kept(family, teacher, student, make_batch, decay):
    module = FineTune(family, teacher, student, settings(ema_decay=decay))
    batches = [make_batch(step, LENGTHS) for step in (100, 101)]
    for _ in range(2):
        error = size = 0.0
        with torch.no_grad():
            for batch in batches:
                target = teacher(**batch.inputs)[0]
                error += (module.result(**batch.inputs)[0] - target).square().sum().item()
                size += target.square().sum().item()
        state, random = state_of(module), torch.get_rng_state()
        assert module.velocity_error(batches) == pytest.approx(error / size, rel=1e-5)
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random)
        train(module, make_batch, LENGTHS)
