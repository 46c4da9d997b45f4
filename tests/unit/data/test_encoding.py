"""Encoding a cache: pictures are opened ahead of the encoders, in order, and only a few of them."""

import io

import torch
from PIL import Image

from ppcl.config import Config, DataConfig, ModelConfig, SamplingConfig
from ppcl.data.encoding import Encoder, encode_samples
from ppcl.data.sources import Sample
from ppcl.families.dit.tiny import build_pipeline as build_dit
from ppcl.families.registry import get_family

BATCH = 3


def test_pictures_wait_for_the_encoders_in_order_and_a_few_at_a_time(family, pipeline):
    opened, ahead, encoded = [], [], []

    class Watched(Sample):
        def open(self):
            opened.append(self.key)
            return super().open()

    def png(number):
        buffer = io.BytesIO()
        Image.new("RGB", (40, 32), (8 * number, 0, 0)).save(buffer, format="PNG")
        return buffer.getvalue()

    def advance(count):
        encoded.append(count)
        ahead.append(len(opened) - sum(encoded))

    samples = [Watched(str(number), f"a {number}", b"" if number == 4 else png(number)) for number in range(24)]
    model = ModelConfig(sampling=SamplingConfig(height=32, width=32))
    encoder = Encoder(Config(model=model, data=DataConfig(encode_batch_size=BATCH)), family, pipeline)
    (tensors, records), bad = encode_samples(encoder, samples, advance)
    assert [record["key"] for record in records] == [str(number) for number in range(24) if number != 4]
    assert [item["key"] for item in bad] == ["4"]
    assert encoded == [BATCH] * 7 + [2]
    assert max(ahead) <= 2 * BATCH + 2  # two batches, the next one, and the picture that is left out
    for number, record in enumerate(records):
        (alone, _), _ = encode_samples(encoder, [samples[int(record["key"])]])
        for name, value in alone.items():
            torch.testing.assert_close(tensors[f"{number:03d}.{name[4:]}"], value, rtol=0, atol=1e-5)


def test_a_caption_that_the_model_does_not_know_ends_nothing():
    """A DiT takes classes, and no other text."""
    pipeline = build_dit(0, 1)
    family = get_family("dit", pipeline.transformer.config)
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, format="PNG")
    captions = [next(iter(pipeline.labels)), "a class that there is not"]
    samples = [Sample(caption, caption, buffer.getvalue()) for caption in captions]
    config = Config(model=ModelConfig(sampling=SamplingConfig(height=32, width=32)), data=DataConfig())
    (_, records), bad = encode_samples(Encoder(config, family, pipeline), samples)
    assert [record["key"] for record in records] == captions[:1]
    assert [item["key"] for item in bad] == captions[1:]
    assert "is no class of this model" in bad[0]["why"]
