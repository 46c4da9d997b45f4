import pytest
import torch

from ppcl.efficiency import LiveBytes
from ppcl.errors import UsageError
from ppcl.methods.probes import changes, fit_probes, relative_residuals, train_probes
from ppcl.ops import least_squares

COUNT = 3
LENGTHS = (40, 25, 33, 38)
CHANNELS = 72  # more than the width, or block 0's image input spans no more than the latents do


@pytest.fixture(scope="module")
def transformer(make_transformer):
    return make_transformer(COUNT, channels=CHANNELS)


@pytest.fixture(scope="module")
def batches(make_batch):
    return [make_batch(seed, LENGTHS, size=(6, 6), padded_to=48, channels=CHANNELS) for seed in range(3)]


@torch.no_grad()
def captured(transformer, batches):
    """Rows before and after each block, per stream, by plain hooks and loops over samples."""
    rows = {}

    def hook(index):
        def keep(block, args, kwargs, output):
            pairs = {
                "image": (kwargs["hidden_states"], output[1]),
                "text": (kwargs["encoder_hidden_states"], output[0]),
            }
            for stream, (before, after) in pairs.items():
                for sample, length in enumerate(LENGTHS):
                    count = length if stream == "text" else before.shape[1]
                    kept = rows.setdefault((index, stream), ([], []))
                    kept[0].append(before[sample, :count])
                    kept[1].append(after[sample, :count])

        return keep

    handles = [
        block.register_forward_hook(hook(index), with_kwargs=True)
        for index, block in enumerate(transformer.transformer_blocks)
    ]
    for batch in batches:
        transformer(**batch.inputs)
    for handle in handles:
        handle.remove()
    return {key: tuple(torch.cat(part).double() for part in parts) for key, parts in rows.items()}


def fit(*arguments, **settings):
    return {probe.key: (probe.weight, probe.bias) for probe in fit_probes(*arguments, **settings)}


def zeros_like(probes):
    return {key: (torch.zeros_like(weight), torch.zeros_like(bias)) for key, (weight, bias) in probes.items()}


def test_probes_are_the_least_squares_maps_of_the_blocks(family, transformer, batches):
    """Block by block equal to lstsq on activations captured without any of this package's code."""
    probes = fit(family, transformer, batches, ridge=0.0, bias=True)
    rows = captured(transformer, batches)
    assert len(probes) == 2 * COUNT
    for (index, stream), (before, after) in rows.items():
        expected = torch.linalg.lstsq(torch.cat([before, torch.ones(len(before), 1)], dim=1), after - before).solution
        weight, bias = probes[f"transformer_blocks.{index}.{stream}"]
        torch.testing.assert_close(weight.double(), expected[:-1].T, rtol=0, atol=1e-5)
        torch.testing.assert_close(bias.double(), expected[-1], rtol=0, atol=1e-5)


def test_padded_text_tokens_do_not_reach_the_probes(family, transformer, batches, make_batch):
    """Other garbage behind the same prompts, and more of it, gives the same maps."""
    changed = [make_batch(seed, LENGTHS, size=(6, 6), padded_to=48, channels=CHANNELS) for seed in range(3)]
    for batch in changed:
        mask = batch.inputs["encoder_hidden_states_mask"]
        batch.inputs["encoder_hidden_states"][~mask] *= -7
    plain, other = (fit(family, transformer, each, ridge=1e-4, bias=True) for each in (batches, changed))
    for key, (weight, bias) in plain.items():
        torch.testing.assert_close(other[key][0], weight, rtol=0, atol=1e-4)
        torch.testing.assert_close(other[key][1], bias, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [1, 100, 1 << 20])  # single rows, single samples, all at once
def test_changes_are_of_valid_rows_in_order(size, monkeypatch):
    monkeypatch.setattr(least_squares, "COPIES", size)
    before = torch.arange(12.0).view(2, 3, 2).to(torch.bfloat16)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    parts = list(changes(before, 3 * before, mask))
    x, dx = (torch.cat(each) for each in zip(*parts, strict=True))
    assert x.tolist() == [[0, 1], [2, 3], [6, 7]]
    assert torch.equal(dx, 2 * x)
    assert x.dtype == dx.dtype == torch.float32
    assert len(parts) == {1: 3, 100: 2}.get(size, 1)
    assert torch.equal(torch.cat([x for x, _ in changes(before, before, None)]), before.flatten(0, 1).float())


def test_changes_need_as_little_memory_for_a_large_batch(monkeypatch):
    monkeypatch.setattr(least_squares, "COPIES", 100_000)
    peaks = []
    for count in (4, 16):
        before, after = torch.randn(2, count, 50, 64).to(torch.bfloat16)
        mask = torch.rand(count, 50) < 0.9
        with LiveBytes() as recorder:
            for each in (mask, None):
                for _ in changes(before, after, each):
                    pass
        peaks.append(recorder.peak)
    assert peaks[1] < 1.1 * peaks[0]


def test_without_bias_the_bias_is_zero(family, transformer, batches):
    probes = fit(family, transformer, batches[:1], ridge=1e-4, bias=False)
    assert all(bias.abs().max() == 0 and weight.abs().max() > 0 for weight, bias in probes.values())


def test_residuals_equal_a_plain_reference(family, transformer, batches):
    probes = fit(family, transformer, batches[:2], ridge=1e-3, bias=True)
    residuals = relative_residuals(family, transformer, batches[2:], probes)
    for (index, stream), (before, after) in captured(transformer, batches[2:]).items():
        key = f"transformer_blocks.{index}.{stream}"
        weight, bias = (part.double() for part in probes[key])
        predicted = torch.stack([row + weight @ row + bias for row in before])
        expected = (predicted - after).square().sum() / (after - before).square().sum()
        assert residuals[key] == pytest.approx(expected.item(), rel=1e-4)


def test_residuals_come_out_of_the_fitting_pass_too(family, transformer, batches):
    fits = list(fit_probes(family, transformer, batches[:2], batches[2:], ridge=1e-3, bias=True))
    probes = {found.key: (found.weight, found.bias) for found in fits}
    apart = relative_residuals(family, transformer, batches[2:], probes)
    assert {found.key: found.residual.value for found in fits} == apart


def test_zero_probes_have_residual_one(family, transformer, batches):
    """A probe that adds nothing is no better than the identity, and no worse."""
    probes = fit(family, transformer, batches[:1], ridge=1e-3, bias=True)
    assert relative_residuals(family, transformer, batches, zeros_like(probes)) == dict.fromkeys(probes, 1.0)


def test_exactly_linear_blocks_leave_no_residual(make_linear_teacher):
    family, transformer, batches = make_linear_teacher([0.5, 0.3, 0.6, 0.2])
    probes = fit(family, transformer, batches[:1], ridge=0.0, bias=True)
    residuals = relative_residuals(family, transformer, batches[1:], probes)
    assert list(residuals) == [f"blocks.{index}.image" for index in range(4)]
    assert max(residuals.values()) < 1e-10
    for index, block in enumerate(transformer.blocks):
        torch.testing.assert_close(probes[f"blocks.{index}.image"][0], block.weight.detach(), rtol=0, atol=1e-5)
        torch.testing.assert_close(probes[f"blocks.{index}.image"][1], block.bias.detach(), rtol=0, atol=1e-5)


def test_training_lowers_the_fit_from_zero(make_linear_teacher):
    family, transformer, batches = make_linear_teacher([0.5, 0.3, 0.6])
    start = {f"blocks.{i}.image": (torch.zeros(6, 6), torch.zeros(6)) for i in range(3)}
    trained = train_probes(family, transformer, batches * 60, start, lr=0.01)
    residuals = relative_residuals(family, transformer, batches, trained)
    assert max(residuals.values()) < 0.05
    assert all(weight.abs().max() == 0 for weight, _ in start.values())  # the start is not trained in place


def test_training_moves_every_probe_of_a_real_model_down(family, transformer, batches):
    zero = zeros_like(fit(family, transformer, batches[:1], ridge=1e-3, bias=True))
    trained = train_probes(family, transformer, batches * 4, zero, lr=1e-3)
    residuals = relative_residuals(family, transformer, batches, trained)
    assert all(value < 1 for value in residuals.values())
    assert all(parameter.grad is None for parameter in transformer.parameters())


@pytest.mark.parametrize("ridge", [0.0, 1e-6])
def test_activations_that_are_not_finite_are_named(family, transformer, make_batch, ridge):
    """They come from the data here. A NaN in the teacher's weights shows in the same way."""
    batch = make_batch(0, LENGTHS, size=(6, 6), padded_to=48, channels=CHANNELS)
    batch.inputs["hidden_states"][0, 0, 0] = torch.nan
    with pytest.raises(UsageError, match=r"activations at transformer_blocks\.0\.image are not finite"):
        fit(family, transformer, [batch], ridge=ridge, bias=True)
