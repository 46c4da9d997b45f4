"""DiT with FFNs replaced by linear projectors (paper Eq. 9). It has no text stream to prune.

An export holds a copy of this file, in which the imports from ppcl are replaced by the imported code. So
`trust_remote_code=True` loads the model where ppcl is not installed.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor, nn

from ppcl.families.pruning import ResidualLinear, register_blocks


class AttentionAdaLayerNormZero(AdaLayerNormZero):
    """adaLN-Zero for the attention alone: it returns the modulated input and the gate, no modulation of an FFN.

    It keeps the embedding of time and label, since the output head reads that of block 0.
    """

    def __init__(self, embedding_dim: int, num_embeddings: int) -> None:
        super().__init__(embedding_dim, num_embeddings)
        self.linear = nn.Linear(embedding_dim, 3 * embedding_dim)

    def forward(  # type: ignore[override]
        self, x: Tensor, timestep: Tensor, class_labels: Tensor, hidden_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        embedded: Any = self.emb
        conditioning = self.linear(self.silu(embedded(timestep, class_labels, hidden_dtype=hidden_dtype)))
        shift, scale, gate = conditioning.chunk(3, dim=1)
        return self.norm(x) * (1 + scale[:, None]) + shift[:, None], gate


class PrunedDiTBlock(BasicTransformerBlock):
    """A DiT block whose FFN is replaced by a residual linear map of the state after attention (Eq. 9)."""

    def __init__(self, dim: int, num_attention_heads: int, attention_head_dim: int, **options: Any) -> None:
        super().__init__(dim, num_attention_heads, attention_head_dim, norm_type="ada_norm_zero", **options)
        self.norm1: Any = AttentionAdaLayerNormZero(dim, options["num_embeds_ada_norm"])
        del self.norm3, self.ff
        self.img_ffn_proj = ResidualLinear(dim)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Any = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        normed, gate = self.norm1(hidden_states, timestep, class_labels, hidden_dtype=hidden_states.dtype)
        attended = self.attn1(normed, attention_mask=attention_mask, **(cross_attention_kwargs or {}))
        return self.img_ffn_proj(hidden_states + gate.unsqueeze(1) * attended)


class PrunedDiTTransformer2DModel(DiTTransformer2DModel):
    """The stock transformer with a `PrunedDiTBlock` at each position in `pruned_ffn` (0-based, in this model)."""

    _no_split_modules = ["BasicTransformerBlock", "PrunedDiTBlock"]
    _repeated_blocks = _no_split_modules

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_zero",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-5,
        pruned_ffn: tuple[int, ...] = (),
    ) -> None:
        super().__init__(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            dropout=dropout,
            norm_num_groups=norm_num_groups,
            attention_bias=attention_bias,
            sample_size=sample_size,
            patch_size=patch_size,
            activation_fn=activation_fn,
            num_embeds_ada_norm=num_embeds_ada_norm,
            upcast_attention=upcast_attention,
            norm_type=norm_type,
            norm_elementwise_affine=norm_elementwise_affine,
            norm_eps=norm_eps,
        )
        model: Any = self
        for index in pruned_ffn:
            model.transformer_blocks[index] = PrunedDiTBlock(
                num_attention_heads * attention_head_dim,
                num_attention_heads,
                attention_head_dim,
                dropout=dropout,
                num_embeds_ada_norm=num_embeds_ada_norm,
                attention_bias=attention_bias,
                upcast_attention=upcast_attention,
                norm_elementwise_affine=norm_elementwise_affine,
                norm_eps=norm_eps,
            )


register_blocks({PrunedDiTBlock: BasicTransformerBlock})
if __name__.startswith("ppcl."):  # the name that diffusers writes when it saves the model
    PrunedDiTTransformer2DModel.__module__ = "ppcl"
