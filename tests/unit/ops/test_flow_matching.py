import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from ppcl.ops.flow_matching import interpolate, levels_of_drawing, sample_sigmas, shift_of, velocity


def test_interpolate_and_velocity_equal_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(3, 4, 5, generator=generator) for _ in range(2))
    sigmas = torch.tensor([0.0, 0.25, 1.0])
    noisy, target = interpolate(clean, noise, sigmas), velocity(clean, noise)
    for b in range(3):
        for t in range(4):
            for c in range(5):
                s, x, n = sigmas[b].item(), clean[b, t, c].item(), noise[b, t, c].item()
                assert noisy[b, t, c].item() == pytest.approx((1 - s) * x + s * n, abs=1e-6)
                assert target[b, t, c].item() == pytest.approx(n - x, abs=1e-6)
    assert torch.equal(noisy[0], clean[0])
    assert torch.equal(noisy[2], noise[2])


def test_one_euler_step_of_the_velocity_leads_back_to_the_clean_sample():
    generator = torch.Generator().manual_seed(1)
    clean, noise = (torch.randn(2, 6, 3, generator=generator) for _ in range(2))
    sigmas = torch.tensor([0.3, 0.9])
    restored = interpolate(clean, noise, sigmas) - sigmas[:, None, None] * velocity(clean, noise)
    torch.testing.assert_close(restored, clean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("scheme", ["logit_normal", "uniform"])
def test_sigmas_equal_a_plain_loop_over_the_same_draws(scheme, shift):
    sigmas = sample_sigmas(200, torch.Generator().manual_seed(3), scheme=scheme, shift=shift)
    again = torch.Generator().manual_seed(3)
    if scheme == "uniform":
        draws = torch.rand(200, generator=again).tolist()
    else:
        draws = [1 / (1 + math.exp(-z)) for z in torch.randn(200, generator=again).tolist()]
    expected = [shift * s / (1 + (shift - 1) * s) for s in draws]
    torch.testing.assert_close(sigmas, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert 0 < sigmas.min() < sigmas.max() < 1


def test_logit_normal_prefers_the_middle_and_a_shift_prefers_noise():
    uniform, middle, shifted = (
        sample_sigmas(20_000, torch.Generator().manual_seed(0), scheme=scheme, shift=shift)
        for scheme, shift in (("uniform", 1.0), ("logit_normal", 1.0), ("uniform", 3.0))
    )
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    assert uniform.var().item() == pytest.approx(1 / 12, abs=0.002)
    assert middle.var().item() == pytest.approx(0.0434, abs=0.002)  # of sigmoid(N(0, 1))
    # Mean of 3u / (1 + 2u) over u in (0, 1): 3/2 - 3/4 ln 3.
    assert shifted.mean().item() == pytest.approx(1.5 - 0.75 * math.log(3), abs=0.01)


def test_an_unknown_scheme_is_refused_by_name():
    with pytest.raises(ValueError, match="cosine"):
        sample_sigmas(2, torch.Generator(), scheme="cosine")


QWEN = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}
FLUX = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


@pytest.mark.parametrize(
    ("scheduler", "side", "expected"),
    [
        (QWEN, 512, 1.71),
        (QWEN, 1024, 2.00),
        (QWEN, 1328, 2.30),
        (FLUX, 512, 1.88),
        (FLUX, 1024, 3.16),
        (FLUX, 1328, 5.07),
    ],
)
def test_the_shift_is_that_of_the_pipeline(scheduler, side, expected):
    """Of the real configurations, against diffusers' own way to it."""
    tokens = (side // 16) ** 2
    real = FlowMatchEulerDiscreteScheduler.from_config(scheduler)
    keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(tokens, *(real.config[key] for key in keys))
    found = shift_of(scheduler, tokens)
    assert found == pytest.approx(expected, abs=0.006)
    real.set_timesteps(sigmas=torch.linspace(1.0, 0.1, 10).tolist(), mu=mu)
    levels = torch.tensor(levels_of_drawing(10, found, scheduler.get("shift_terminal", 0.0)))
    torch.testing.assert_close(real.sigmas[:-1], levels, rtol=1e-5, atol=1e-6)


def test_other_schedulers_have_a_fixed_shift_or_none():
    assert shift_of({"shift": 3.0}, 4096) == 3.0
    assert shift_of({"beta_schedule": "linear"}, 256) == 1.0
