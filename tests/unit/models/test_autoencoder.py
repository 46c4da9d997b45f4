import pytest
import torch

from ppcl.data.worlds import shapes
from ppcl.models.autoencoder_pixel_unshuffle import AutoencoderPixelUnshuffle


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_decoding_undoes_encoding_bit_for_bit(factor):
    channels = 3 * factor**2
    vae = AutoencoderPixelUnshuffle(factor, channels, (0.0,) * channels, (1.0,) * channels)
    images = torch.randn(2, 3, 1, 16, 8, generator=torch.Generator().manual_seed(0))
    latents = vae.encode(images).latent_dist.mode()
    assert latents.shape == (2, channels, 1, 16 // factor, 8 // factor)
    assert torch.equal(vae.decode(latents).sample, images)
    assert torch.equal(vae.decode(vae.encode(images, return_dict=False)[0].sample(), return_dict=False)[0], images)
    assert 2 ** len(vae.temperal_downsample) == factor  # what the pipeline derives its scale from


def test_a_latent_pixel_holds_one_patch_of_the_picture():
    images = torch.arange(48.0).view(1, 3, 1, 4, 4)
    latents = AutoencoderPixelUnshuffle().encode(images).latent_dist.mode()
    assert torch.equal(latents[0, :, 0, 1, 0], images[0, :, 0, 2:4, 0:2].reshape(12))


@pytest.mark.parametrize(("factor", "z_dim"), [(2, 16), (3, 27), (4, 12)])
def test_sizes_that_do_not_fit_are_refused(factor, z_dim):
    with pytest.raises(ValueError, match=f"z_dim={z_dim}"):
        AutoencoderPixelUnshuffle(factor, z_dim)


def test_it_survives_saving_and_loading(tmp_path):
    vae = AutoencoderPixelUnshuffle(latents_mean=(0.25,) * 12)
    vae.save_pretrained(tmp_path)
    loaded = AutoencoderPixelUnshuffle.from_pretrained(tmp_path)
    assert tuple(loaded.config.latents_mean) == (0.25,) * 12
    images = torch.rand(1, 3, 1, 8, 8)
    assert torch.equal(loaded.decode(vae.encode(images).latent_dist.mode()).sample, images)


def test_packed_latents_unpack_and_decode_to_the_pictures(family, pipeline):
    """`encode_images` is the inverse of what the pipeline does after its last denoising step."""
    images = shapes.pictures([shapes.make_scene(0, index) for index in range(3)])
    packed, size = family.encode_images(pipeline, images)
    assert packed.shape == (3, 64, 48)
    assert size == (8, 8)
    latents = pipeline._unpack_latents(packed, 32, 32, pipeline.vae_scale_factor)
    mean, std = (torch.tensor(pipeline.vae.config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    restored = pipeline.vae.decode(latents * std + mean).sample[:, :, 0]
    assert torch.equal(((restored + 1) * 127.5).round(), ((images + 1) * 127.5).round())
    torch.testing.assert_close(restored, images, rtol=0, atol=1e-6)


def test_the_background_is_the_origin_of_the_latents(family, pipeline):
    blank = shapes.to_tensor([shapes.render(())])
    assert family.encode_images(pipeline, blank)[0].abs().max() < 1e-6
