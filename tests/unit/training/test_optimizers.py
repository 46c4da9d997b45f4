"""Rates relative to the size of parameters, and Muon on sharded weights."""

import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from ppcl.config import TrainingConfig
from ppcl.training.optimizers import adamw, muon, relative_groups, root_mean_square
from ppcl.training.sharding import Sharding

RELATIVE, DECAY = 0.05, 0.02
OPTIMIZERS = {
    "muon": partial(muon, lr=0.0, weight_decay=0.0),
    "adamw": partial(adamw, config=TrainingConfig(lr=None, weight_decay=0.0)),
}


def drawn(*shape, scale=1.0, seed=0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rms(values):
    return values.square().mean().sqrt().item()


def stepped(optimizer, weight, gradient, decay=0.0):
    """What the first step adds to `weight`."""
    parameter = nn.Parameter(weight.clone())
    parameter.grad = gradient
    OPTIMIZERS[optimizer](relative_groups([parameter], optimizer, RELATIVE, decay)).step()
    return parameter.detach() - weight


@pytest.mark.parametrize("scale", [0.02, 0.5])
@pytest.mark.parametrize("shape", [(64, 64), (256, 64), (48, 192)])
def test_muon_moves_a_matrix_by_a_share_of_its_size(shape, scale):
    """Newton-Schulz ends at singular values of 0.7 to 1.2, so that an update is 0.84 to 0.93 of what is asked."""
    weight = drawn(*shape, scale=scale)
    moved = rms(stepped("muon", weight, drawn(*shape, seed=1)))
    assert 0.8 < moved / rms(weight) / RELATIVE < 1


@pytest.mark.parametrize("scale", [0.02, 0.5])
@pytest.mark.parametrize("shape", [(7,), (64, 16), (64, 64), (256, 64), (8, 4, 3, 3)])
def test_adamw_moves_a_parameter_by_a_share_of_its_size(shape, scale):
    """Less if a row has more than 16 weights, which all move alike."""
    weight = drawn(*shape, scale=scale)
    inputs = math.prod(shape[1:])
    expected = RELATIVE * min(1, 4 / math.sqrt(inputs)) if len(shape) > 1 else RELATIVE
    moved = rms(stepped("adamw", weight, drawn(*shape, seed=1)))
    assert moved / rms(weight) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("optimizer", "shape"), [("adamw", (64,)), ("adamw", (8, 16)), ("muon", (32, 32))])
def test_a_parameter_of_zeros_moves_as_one_of_a_usual_size(optimizer, shape):
    moved = rms(stepped(optimizer, torch.zeros(shape), drawn(*shape, seed=1)))
    assert moved == pytest.approx(RELATIVE * 0.02, rel=0.2 if optimizer == "muon" else 1e-3)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("scale", [0.02, 5.0])
def test_decay_takes_the_same_share_of_any_size(optimizer, scale):
    weight = drawn(64, 64, scale=scale)
    shrunk = stepped(optimizer, weight, torch.zeros(64, 64), decay=DECAY)
    torch.testing.assert_close(shrunk, -RELATIVE * DECAY * weight, rtol=2e-3, atol=1e-6 * scale)


def test_no_rate_moves_nothing():
    (group,) = relative_groups([nn.Parameter(drawn(4, 4))], "muon", 0.0, DECAY)
    assert (group["lr"], group["weight_decay"]) == (0.0, 0.0)


SHAPES = [(5, 7), (1, 4), (33, 32), (64, 3), (7, 64)]  # rows that do not divide; a rank without any


def shards_step_as_whole(rank, ranks, mesh, store, offload):
    """What each rank does: four steps of sharded weights beside torch's Muon on whole ones."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    names = ("replicate", "shard")[-len(mesh) :]
    sharding = Sharding(
        init_device_mesh("cpu", mesh, mesh_dim_names=names), torch.device("cpu"), "32-true", cpu_offload=offload
    )
    for shape in SHAPES:
        whole, layer = nn.Parameter(drawn(*shape)), nn.Linear(shape[1], shape[0])
        layer.load_state_dict({"weight": whole.detach(), "bias": drawn(shape[0])})
        sharding.unit(layer, learns=True)
        for parameter, size in ((layer.weight, drawn(*shape)), (layer.bias, drawn(shape[0]))):
            assert root_mean_square(parameter) == pytest.approx(rms(size), rel=1e-6)
        groups = [relative_groups([p], "muon", RELATIVE, DECAY) for p in (layer.weight, whole)]
        ours = muon(groups[0], lr=0.0, weight_decay=0.0)
        plain = torch.optim.Muon(groups[1], lr=0.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        for step in range(4):
            gradient = drawn(*shape, seed=step + 1)
            whole.grad = gradient.clone()
            layer.weight.grad = distribute_tensor(gradient, sharding.mesh, layer.weight.placements)
            ours.step()
            plain.step()
        assert isinstance(ours.state[layer.weight]["momentum_buffer"], DTensor)
        torch.testing.assert_close(layer.weight.full_tensor(), whole.detach(), rtol=1e-6, atol=1e-6)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize(("mesh", "offload"), [((2,), False), ((3,), True), ((2, 2), False)])
def test_muon_on_shards_is_torchs_muon(tmp_path, mesh, offload):
    ranks = math.prod(mesh)
    arguments = ranks, mesh, str(tmp_path / "store"), offload
    mp.start_processes(shards_step_as_whole, arguments, nprocs=ranks, start_method="fork")
