import math
import threading

import pytest
import torch
from diffusers import DDIMScheduler

from ppcl.config import DataConfig
from ppcl.data.batches import StepLoader, batch_numbers
from ppcl.data.streams import ShapesStream
from ppcl.data.worlds import shapes
from ppcl.families.base import without_needless_mask
from ppcl.families.dit.tiny import build_pipeline as build_dit
from ppcl.families.registry import get_family
from ppcl.ops.flow_matching import levels_of_drawing, shift_of


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("taken", [0, 1, 4, 6])
def test_a_resumed_loader_yields_exactly_the_steps_that_are_left(taken, ahead):
    first = StepLoader(lambda step: step, 6, ahead=ahead)
    batches = iter(first)
    seen = [next(batches) for _ in range(taken)]
    second = StepLoader(lambda step: step, 6, ahead=ahead)
    second.load_state_dict(first.state_dict())
    assert seen + list(second) == [0, 1, 2, 3, 4, 5]
    assert len(second) == 6
    assert list(second) == []


def test_a_loader_that_reads_ahead_makes_one_batch_more_in_a_thread_that_ends():
    made = []

    def make(step):
        made.append((step, threading.current_thread() is threading.main_thread()))
        return step

    batches = iter(StepLoader(make, 100, ahead=True))
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    batches.close()
    assert made == [(step, False) for step in range(4)]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_what_fails_ahead_fails_at_its_own_step():
    def make(step):
        if step == 2:
            raise OSError("gone")
        return step

    batches = iter(StepLoader(make, 6, ahead=True))
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(OSError, match="gone"):
        next(batches)


def test_a_loader_makes_no_batch_that_is_not_asked_for():
    made = []
    batches = iter(StepLoader(made.append, 100))
    next(batches)
    next(batches)
    assert made == [0, 1]


@pytest.fixture(scope="module")
def stream(family, pipeline):
    return ShapesStream(family, pipeline, DataConfig(caption_dropout=0.3), seed=4, batch_size=8)


def equal(a, b):
    return (
        torch.equal(a.target, b.target)
        and torch.equal(a.sigmas, b.sigmas)
        and all(
            torch.equal(a.inputs[key], b.inputs[key])
            for key in ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "timestep")
        )
    )


def test_a_batch_depends_on_seed_and_step_alone(family, pipeline, stream):
    late = stream(3)
    torch.manual_seed(123)
    stream(9)
    again = ShapesStream(family, pipeline, DataConfig(caption_dropout=0.3), seed=4, batch_size=8)
    assert equal(again(3), late)
    assert not equal(again(4), late)
    assert not torch.equal(ShapesStream(family, pipeline, DataConfig(), 5, 8)(3).target, late.target)


def test_a_batch_is_its_samples_noised(family, pipeline, stream):
    """x = (1 - sigma) clean + sigma noise and target = noise - clean give the clean latents back."""
    batch = stream(2)
    scenes = [shapes.make_scene(4, index) for index in range(16, 24)]
    images, captions = shapes.pictures(scenes), [scene.caption for scene in scenes]
    clean, size = family.encode_images(pipeline, images)
    sigmas = batch.sigmas[:, None, None]
    torch.testing.assert_close(batch.inputs["hidden_states"] - sigmas * batch.target, clean, rtol=0, atol=1e-5)
    assert torch.equal(batch.inputs["timestep"], batch.sigmas)
    assert batch.inputs["img_shapes"] == [[(1, *size)]] * 8
    lengths = (batch.inputs["encoder_hidden_states_mask"].sum(dim=1) - 5).tolist()
    words = [len(caption.split()) for caption in captions]
    assert all(length in (0, count) for length, count in zip(lengths, words, strict=True))


def test_captions_are_dropped_at_the_configured_rate(stream):
    dropped = torch.cat([stream(step).inputs["encoder_hidden_states_mask"].sum(dim=1) == 5 for step in range(30)])
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.08)


def test_calibration_pairs_every_sample_with_every_noise_level(family, pipeline):
    stream = ShapesStream(family, pipeline, DataConfig(), seed=1, batch_size=4)
    batches = list(stream.calibration(num_samples=6, num_timesteps=3))
    assert [len(batch.sigmas) for batch in batches] == [4, 4, 4, 2, 2, 2]
    images = shapes.pictures([shapes.make_scene(1, index) for index in range(6)])
    clean, _ = family.encode_images(pipeline, images)
    for number, batch in enumerate(batches):
        level = 1 - number % 3 / 3
        torch.testing.assert_close(batch.sigmas, torch.full_like(batch.sigmas, level))
        start = 4 * (number // 3)
        restored = batch.inputs["hidden_states"] - level * batch.target
        torch.testing.assert_close(restored, clean[start : start + 4], rtol=0, atol=1e-5)
        assert (batch.inputs["encoder_hidden_states_mask"].sum(dim=1) > 5).all()  # no caption is dropped


def test_calibration_levels_are_shifted(family, pipeline):
    stream = ShapesStream(family, pipeline, DataConfig(shift=3.0), seed=1, batch_size=2)
    levels = [batch.sigmas[0].item() for batch in stream.calibration(2, 4)]
    assert levels == pytest.approx([1.0, 3 * 0.75 / 2.5, 3 * 0.5 / 2, 3 * 0.25 / 1.5])


@pytest.mark.parametrize("size", [1, 3, 8, 16, 60])
def test_measuring_takes_no_more_at_once_than_training_and_16_samples_a_batch_or_more(size):
    numbers = [batch_numbers(size, start, start + 1) for start in range(3)]
    assert [number for each in numbers for number in each] == list(batch_numbers(size, 0, 3))  # one after the other
    for each in numbers:
        assert 16 <= len(each) * size < 16 + size or (len(each) == 1 and size > 16)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_ranks_divide_a_batch_among_them(family, pipeline, stream, count):
    """Their rows, one after the other, are the batch that one process has: noise, levels and dropped captions too."""
    whole, shares = stream(5), []
    for number in range(count):
        own = ShapesStream(family, pipeline, DataConfig(caption_dropout=0.3), seed=4, batch_size=8)
        own.share = (number, count)
        shares.append(own(5))
    assert not whole.divided
    assert all(share.divided == (count > 1) and len(share.sigmas) == 8 // count for share in shares)
    for key in ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "timestep"):
        assert torch.equal(torch.cat([share.inputs[key] for share in shares]), whole.inputs[key])
    assert torch.equal(torch.cat([share.target for share in shares]), whole.target)


def test_calibration_is_not_divided(family, pipeline):
    streams = [ShapesStream(family, pipeline, DataConfig(), seed=4, batch_size=4) for _ in range(2)]
    streams[1].share = (1, 2)
    first, second = (next(iter(stream.calibration(4, 2))) for stream in streams)
    assert equal(first, second)
    assert not second.divided


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_dit_learns_what_its_scheduler_takes(prediction_type):
    """Who gives the target leads the pipeline's own scheduler to the picture, from any timestep."""
    pipeline, dit = build_dit(0, num_layers=1), get_family("dit")
    config = pipeline.scheduler.config
    pipeline.scheduler = DDIMScheduler.from_config(config, prediction_type=prediction_type)
    pipeline.scheduler.set_timesteps(10)
    dit.complete(pipeline)
    latents, labels = torch.randn(1, 12, 16, 16), {"class_labels": torch.tensor([0])}
    for sigma in (0.1, 0.5, 0.9):
        batch = dit.training_batch(latents, labels, torch.randn_like(latents), torch.tensor([sigma]), (16, 16))
        timestep, noisy = batch.inputs["timestep"].item(), batch.inputs["hidden_states"]
        step = pipeline.scheduler.step(batch.target, timestep, noisy)
        torch.testing.assert_close(step.pred_original_sample, latents, rtol=0, atol=1e-3)


def test_a_mask_that_masks_nothing_is_not_passed(family, pipeline):
    """As by the pipeline itself. A mask rules out the fastest attention kernels."""
    prompts = ["a red circle", "a photo of two blue squares and a green circle"]
    conditions = family.encode_prompts(pipeline, prompts)(prompts)
    latents, sigmas = torch.randn(2, 16, 48), torch.tensor([0.3, 0.6])
    padded, whole = conditions, {name: value[1:] for name, value in conditions.items()}
    for found, expected in ((padded, 2), (whole, None)):
        count = len(found["prompt_embeds"])
        inputs = family.forward_inputs(latents[:count], without_needless_mask(found), sigmas[:count], (4, 4))
        mask = inputs["encoder_hidden_states_mask"]
        assert (mask if mask is None else len(mask)) == expected
        assert family.masks(inputs)["text"] is mask


def test_without_settings_noise_levels_are_those_of_drawing(family, pipeline):
    """Uniform, then shifted by the pipeline's own scheduler for pictures of this size."""
    stream = ShapesStream(family, pipeline, DataConfig(timesteps=None, shift=None), seed=4, batch_size=256)
    stream.scheduler = scheduler = {"use_dynamic_shifting": True, "base_image_seq_len": 16, "max_image_seq_len": 64}
    scheduler["shift_terminal"] = 0.02
    shift = shift_of(scheduler, 64)
    assert shift == pytest.approx(math.exp(1.15))
    plain = stream(0).sigmas / (shift - (shift - 1) * stream(0).sigmas)  # before the shift
    assert plain.mean().item() == pytest.approx(0.5, abs=0.06)
    assert plain.var().item() == pytest.approx(1 / 12, abs=0.01)
    levels = torch.cat([batch.sigmas[:1] for batch in stream.calibration(2, 4)])
    torch.testing.assert_close(levels, torch.tensor(levels_of_drawing(4, shift, 0.02)))
