"""FLUX with blocks pruned in width (paper Eq. 8-9): text streams and FFNs become linear projectors.

An export holds a copy of this file, in which the imports from ppcl are replaced by the imported code. So
`trust_remote_code=True` loads the model where ppcl is not installed.

Dual-stream blocks work as in the pruned Qwen-Image. A text-pruned block reads the text of its reference, the nearest
earlier block with a text stream of its own. The reference, and all but the last of the text-pruned blocks that follow
it, return `[2, B, L, D]` in place of the text: the text output h, and the modulated text z that went into the
reference's QKV. A single-stream block runs attention and MLP in parallel on the concatenated streams. Pruned, it runs
attention, and then a residual linear map per stream.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import AdaLayerNormZeroSingle
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

from ppcl.families.pruning import ResidualLinear, packed_text, register_blocks, unpacked_text, width_roles


class FluxImageQueryAttnProcessor:
    """Joint attention with queries of the image only, since the text's output would not be used.

    Keys and values are those of text and image. Returns the image's output `[B, N, D]`.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        query, key, value, text_key, text_value = (
            projected.unflatten(-1, (-1, attn.head_dim))  # [B, tokens, heads, head_dim]
            for projected in (
                attn.to_q(hidden_states),
                attn.to_k(hidden_states),
                attn.to_v(hidden_states),
                attn.add_k_proj(encoder_hidden_states),
                attn.add_v_proj(encoder_hidden_states),
            )
        )
        query = attn.norm_q(query)
        key = torch.cat([attn.norm_added_k(text_key), attn.norm_k(key)], dim=1)
        if image_rotary_emb is not None:
            cosine, sine = image_rotary_emb  # of the text, then of the image
            length = encoder_hidden_states.shape[1]
            rotate: Any = apply_rotary_emb
            query = rotate(query, (cosine[length:], sine[length:]), sequence_dim=1)
            key = rotate(key, image_rotary_emb, sequence_dim=1)
        attended = dispatch_attention_fn(
            query,
            key,
            torch.cat([text_value, value], dim=1),
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        output = attn.to_out[0](attended.flatten(2, 3).to(query.dtype))
        return attn.to_out[1](output)


class PrunedFluxTransformerBlock(FluxTransformerBlock):
    """A dual-stream block that is pruned, or that is the reference of text-pruned blocks after it.

    z_r is the modulated text that went into the QKV of the reference, the nearest earlier block with a text stream of
    its own; h is the text output that the block before passed on.

    `project_text`: z = txt_proj(z_r) is the input of the text's QKV; the rest of the text stream is removed (Eq. 8).
    `project_text_output`: the block's text output is ehs_proj(h); otherwise it passes h on unchanged.
    `project_ffn`: the FFN, its norm and its half of the modulation are replaced by a residual linear map of the state
        after attention (Eq. 9).
    `carry`: the next block is text-pruned, so this one returns z_r beside its text output (see `packed_text`).
    `keep_text_query`: keep the text's query projection, which no output depends on.
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        *,
        project_text: bool = False,
        project_text_output: bool = False,
        project_ffn: bool = False,
        carry: bool = False,
        keep_text_query: bool = False,
    ) -> None:
        super().__init__(dim, num_attention_heads, attention_head_dim)
        self.project_text, self.project_ffn, self.carry = project_text, project_ffn, carry
        attn: Any = self.attn
        if project_text:
            del self.norm1_context, self.norm2_context, self.ff_context
            attn.to_add_out = None
            if not keep_text_query:
                attn.add_q_proj = attn.norm_added_q = None
            attn.set_processor(FluxImageQueryAttnProcessor())
            self.txt_proj = ResidualLinear(dim)
        self.ehs_proj = ResidualLinear(dim) if project_text_output else None
        if project_ffn:
            for suffix, name in (("", "img"),) if project_text else (("", "img"), ("_context", "txt")):
                delattr(self, f"norm2{suffix}")
                delattr(self, f"ff{suffix}")
                # Modulates the attention alone; its rows are the first half of the stock modulation's.
                setattr(self, f"norm1{suffix}", AdaLayerNormZeroSingle(dim))
                setattr(self, f"{name}_ffn_proj", ResidualLinear(dim))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        modulated, gate, *image_mlp = self.norm1(hidden_states, emb=temb)  # image_mlp: empty if the FFN is pruned
        attention = {
            "hidden_states": modulated,
            "image_rotary_emb": image_rotary_emb,
            **(joint_attention_kwargs or {}),
        }
        adapted: list[Tensor] = []  # outputs of an IP-Adapter
        if self.project_text:
            text, reference = unpacked_text(encoder_hidden_states)
            attended = self.attn(encoder_hidden_states=self.txt_proj(reference), **attention)
            if self.ehs_proj is not None:
                text = self.ehs_proj(text)
        else:
            reference, text_gate, *text_mlp = self.norm1_context(encoder_hidden_states, emb=temb)
            attended, text_attended, *adapted = self.attn(encoder_hidden_states=reference, **attention)
            text = encoder_hidden_states + text_gate.unsqueeze(1) * text_attended
            text = self._feed_forward(text, text_mlp, "_context", "txt")
        hidden_states = self._feed_forward(hidden_states + gate.unsqueeze(1) * attended, image_mlp, "", "img")
        for addition in adapted:
            hidden_states = hidden_states + addition
        if text.dtype == torch.float16:
            text = text.clip(-65504, 65504)
        return packed_text(text, reference) if self.carry else text, hidden_states

    def _feed_forward(self, state: Tensor, modulation: list[Tensor], suffix: str, name: str) -> Tensor:
        if self.project_ffn:
            return getattr(self, f"{name}_ffn_proj")(state)
        shift, scale, gate = (part.unsqueeze(1) for part in modulation)
        normed = getattr(self, f"norm2{suffix}")(state)
        return state + gate * getattr(self, f"ff{suffix}")(normed * (1 + scale) + shift)


class PrunedFluxSingleTransformerBlock(FluxSingleTransformerBlock):
    """A single-stream block without its MLP: attention, then a residual linear map of each stream (Eq. 9)."""

    def __init__(self, dim: int, num_attention_heads: int, attention_head_dim: int, **role: bool) -> None:
        super().__init__(dim, num_attention_heads, attention_head_dim)
        del self.proj_mlp, self.act_mlp
        self.proj_out = nn.Linear(dim, dim)  # the stock one without the columns that read the MLP
        self.img_ffn_proj = ResidualLinear(dim)
        self.txt_ffn_proj = ResidualLinear(dim)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        length = encoder_hidden_states.shape[1]
        state = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        normed, gate = self.norm(state, emb=temb)
        attended = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        state = state + gate.unsqueeze(1) * self.proj_out(attended)
        text, image = self.txt_ffn_proj(state[:, :length]), self.img_ffn_proj(state[:, length:])
        if image.dtype == torch.float16:
            text, image = text.clip(-65504, 65504), image.clip(-65504, 65504)
        return text, image


class PrunedFluxTransformer2DModel(FluxTransformer2DModel):
    """The stock transformer with pruned blocks at given positions (0-based, in this model's stacks).

    `pruned_text`, `pruned_ffn`: dual-stream blocks without a text stream, and without FFNs.
    `pruned_single_ffn`: single-stream blocks without an MLP.
    For `text_output` and `keep_text_query` see `width_roles`.
    """

    _no_split_modules = [
        "FluxTransformerBlock",
        "FluxSingleTransformerBlock",
        "PrunedFluxTransformerBlock",
        "PrunedFluxSingleTransformerBlock",
    ]
    _repeated_blocks = _no_split_modules

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        pruned_text: tuple[int, ...] = (),
        pruned_ffn: tuple[int, ...] = (),
        pruned_single_ffn: tuple[int, ...] = (),
        text_output: str = "last",
        keep_text_query: bool = False,
    ) -> None:
        super().__init__(
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            num_single_layers=num_single_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            pooled_projection_dim=pooled_projection_dim,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=axes_dims_rope,
        )
        model: Any = self
        shape = num_attention_heads * attention_head_dim, num_attention_heads, attention_head_dim
        roles = width_roles(num_layers, list(pruned_text), list(pruned_ffn), text_output, keep_text_query)
        for index, role in enumerate(roles):
            if role is not None:
                model.transformer_blocks[index] = PrunedFluxTransformerBlock(*shape, **role)
        for index in pruned_single_ffn:
            model.single_transformer_blocks[index] = PrunedFluxSingleTransformerBlock(*shape)


register_blocks(
    {
        PrunedFluxTransformerBlock: FluxTransformerBlock,
        PrunedFluxSingleTransformerBlock: FluxSingleTransformerBlock,
    },
    FluxImageQueryAttnProcessor,
)
if __name__.startswith("ppcl."):  # the name that diffusers writes when it saves the model
    PrunedFluxTransformer2DModel.__module__ = "ppcl"
