"""Final latents on disk, and how far apart two sets of them are."""

import pytest
import torch

from ppcl.pictures.drawing import decoded_latents
from ppcl.pictures.latents import latent_distance, save_latents


def write(folder, latents):
    for start in (0, 4):
        part = latents[start : start + 4]
        save_latents(folder, range(start, start + len(part)), [part[:2], part[2:]])


def test_equal_pictures_are_at_0_and_unrelated_ones_near_2(tmp_path):
    generator = torch.Generator().manual_seed(0)
    offset = torch.tensor([5.0, -3.0, 0.0])[:, None, None]  # a channel's mean says nothing of a picture
    first, second = (torch.randn(7, 3, 16, 16, generator=generator) + offset for _ in range(2))
    for name, latents in (("teacher", first), ("same", first.clone()), ("other", second)):
        write(tmp_path / name, latents)
    write(tmp_path / "mean", offset.expand(7, 3, 16, 16))
    distances = [latent_distance(tmp_path / name, tmp_path / "teacher", 7) for name in ("same", "other", "mean")]
    assert distances == [0, pytest.approx(2, abs=0.1), pytest.approx(1, abs=0.01)]


def test_missing_latents_have_no_distance(tmp_path):
    latents = torch.randn(7, 3, 4, 4)
    write(tmp_path / "teacher", latents)
    write(tmp_path / "ours", latents)
    assert latent_distance(tmp_path / "ours", tmp_path / "teacher", 8) is None
    (tmp_path / "ours" / "latents" / "00004.safetensors").unlink()
    assert latent_distance(tmp_path / "ours", tmp_path / "teacher", 7) is None
    assert latent_distance(tmp_path / "teacher", tmp_path / "nobody", 7) is None
    save_latents(tmp_path / "few", range(3), [latents[:2]])  # not one for each picture
    assert not (tmp_path / "few").exists()


def test_latents_are_collected_while_a_pipeline_decodes():
    class Pipeline:
        vae = torch.nn.Identity()

    Pipeline.vae.decode = lambda latents, scale=1.0: scale * latents
    own = Pipeline.vae.decode
    latents = torch.randn(2, 3, 4, 4)
    with decoded_latents(Pipeline()) as found:
        assert torch.equal(Pipeline.vae.decode(latents, scale=2.0), 2 * latents)
    assert torch.equal(found[0], latents.half())
    assert Pipeline.vae.decode is own
    with decoded_latents(object()) as found:
        pass
    assert found == []
