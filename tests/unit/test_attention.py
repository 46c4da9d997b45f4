"""Attention kernels: the teacher, students and pruned models run those that are asked for."""

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from pruned_models import cut

from ppcl.attention import attention, check_attention
from ppcl.config import Config, ModelConfig
from ppcl.errors import UsageError
from ppcl.surgery.depth import student_block


def config(name, *stages):
    return Config(stages=[*stages], model=ModelConfig(attention_backend=name))


@pytest.mark.parametrize("name", ["native", "_native_math"])
def test_every_model_attends_with_it_and_computes_the_same(family, make_transformer, make_batch, monkeypatch, name):
    teacher, batch, ran = make_transformer(4), make_batch(text_lengths=(7, 7)), []
    teacher.transformer_blocks[1] = student_block(list(teacher.transformer_blocks), (1, 2), "first")
    models = [teacher, cut(family, teacher, {"transformer_blocks": [(1, 2)]})]
    expected = [model(**batch.inputs)[0] for model in models]
    kernel = _AttentionBackendRegistry._backends[AttentionBackendName(name)]
    counted = lambda **settings: [ran.append(name), kernel(**settings)][1]  # noqa: E731
    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName(name), counted)
    with attention(config(name)):
        found = [model(**batch.inputs)[0] for model in models]
    assert len(ran) == 4 + 3
    torch.testing.assert_close(found, expected)
    assert _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE


@pytest.mark.parametrize(
    ("name", "stages", "said"),
    [("fast", ["plan"], "attention_backend=fast is not one .*: .*native"), ("sage", ["depth"], "no gradients.*depth")],
)
def test_what_cannot_be_used_is_refused(name, stages, said):
    with pytest.raises(UsageError, match=said):
        check_attention(config(name, *stages))
    with pytest.raises(UsageError, match=r"attention_backend=_flash_3 cannot be used here: .*missing package"):
        attention(config("_flash_3")).__enter__()
    with pytest.raises(UsageError, match="takes no mask of padded text"), attention(config("native")):
        raise ValueError("`attn_mask` is not yet supported for flash-attn 2.")  # as diffusers says it
