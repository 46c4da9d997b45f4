"""Qwen-Image with blocks pruned in width (paper Eq. 8-9): text streams and FFNs become linear projectors.

An export holds a copy of this file, in which the imports from ppcl are replaced by the imported code. So
`trust_remote_code=True` loads the model where ppcl is not installed.

A text-pruned block reads the text of its reference, the nearest earlier block with a text stream of its own. But the
stock forward passes a block only the output of the block before it. So the reference, and all but the last of the
text-pruned blocks that follow it, return two tensors stacked in place of the text, `[2, B, L, D]`: the text output h,
and the modulated text z that went into the reference's QKV. The stock forward passes the stack on without reading it,
and checkpointing, compilation, offloading and caching see plain tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock, apply_rotary_emb_qwen
from torch import Tensor, nn

from ppcl.families.pruning import ResidualLinear, packed_text, register_blocks, unpacked_text, width_roles


class ImageQueryAttnProcessor:
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
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        head_dim = attn.inner_dim // attn.heads
        query, key, value, text_key, text_value = (
            projected.unflatten(-1, (-1, head_dim))  # [B, tokens, heads, head_dim]
            for projected in (
                attn.to_q(hidden_states),
                attn.to_k(hidden_states),
                attn.to_v(hidden_states),
                attn.add_k_proj(encoder_hidden_states),
                attn.add_v_proj(encoder_hidden_states),
            )
        )
        query, key, text_key = attn.norm_q(query), attn.norm_k(key), attn.norm_added_k(text_key)
        if image_rotary_emb is not None:
            image_freqs, text_freqs = image_rotary_emb
            query = apply_rotary_emb_qwen(query, image_freqs, use_real=False)
            key = apply_rotary_emb_qwen(key, image_freqs, use_real=False)
            text_key = apply_rotary_emb_qwen(text_key, text_freqs, use_real=False)
        mask = None
        if encoder_hidden_states_mask is not None:
            every_pixel = encoder_hidden_states_mask.new_ones(hidden_states.shape[:2])
            mask = torch.cat([encoder_hidden_states_mask, every_pixel], dim=1)[:, None, None, :]
        attended = dispatch_attention_fn(
            query,
            torch.cat([text_key, key], dim=1),
            torch.cat([text_value, value], dim=1),
            attn_mask=mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        output = attn.to_out[0](attended.flatten(2, 3).to(query.dtype))
        return attn.to_out[1](output)


class PrunedQwenImageTransformerBlock(QwenImageTransformerBlock):
    """A block that is pruned, or that is the reference of text-pruned blocks after it.

    z_r is the modulated text that went into the QKV of the reference, the nearest earlier block with a text stream of
    its own; h is the text output that the block before passed on.

    `project_text`: z = txt_proj(z_r) is the input of the text's QKV; the rest of the text stream is removed (Eq. 8).
    `project_text_output`: the block's text output is ehs_proj(h); otherwise it passes h on unchanged.
    `project_ffn`: the FFN, its norm and its half of the modulation are replaced by a residual linear map of the state
        after attention (Eq. 9).
    `carry`: the next block is text-pruned, so this one returns z_r beside its text output (see `packed_text`).
    `keep_text_query`: keep the text's query projection, which no output depends on (as in the authors' models).
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
        eps: float = 1e-6,
        zero_cond_t: bool = False,
    ) -> None:
        super().__init__(dim, num_attention_heads, attention_head_dim, eps=eps, zero_cond_t=zero_cond_t)
        self.project_text, self.project_ffn, self.carry = project_text, project_ffn, carry
        attn: Any = self.attn
        if project_text:
            del self.txt_mod, self.txt_norm1, self.txt_norm2, self.txt_mlp
            attn.to_add_out = None
            if not keep_text_query:
                attn.add_q_proj = attn.norm_added_q = None
            attn.set_processor(ImageQueryAttnProcessor())
            self.txt_proj = ResidualLinear(dim)
        self.ehs_proj = ResidualLinear(dim) if project_text_output else None
        if project_ffn:
            for stream in ("img",) if project_text else ("img", "txt"):
                delattr(self, f"{stream}_norm2")
                delattr(self, f"{stream}_mlp")
                getattr(self, f"{stream}_mod")[1] = nn.Linear(dim, 3 * dim)
                setattr(self, f"{stream}_ffn_proj", ResidualLinear(dim))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: Any = None,
    ) -> tuple[Tensor, Tensor]:
        image_mod1, *image_mod2 = self.img_mod(temb).split(3 * self.dim, dim=-1)  # image_mod2: empty if FFN pruned
        if self.zero_cond_t:
            temb = temb.chunk(2, dim=0)[0]
        modulated, gate = self._modulate(self.img_norm1(hidden_states), image_mod1, modulate_index)
        attention = {
            "hidden_states": modulated,
            "encoder_hidden_states_mask": encoder_hidden_states_mask,
            "image_rotary_emb": image_rotary_emb,
            **(joint_attention_kwargs or {}),
        }
        if self.project_text:
            text, reference = unpacked_text(encoder_hidden_states)
            attended = self.attn(encoder_hidden_states=self.txt_proj(reference), **attention)
            if self.ehs_proj is not None:
                text = self.ehs_proj(text)
        else:
            reference, text_gate, text_mod2 = text_qkv_input(self, encoder_hidden_states, temb)
            attended, text_attended = self.attn(encoder_hidden_states=reference, **attention)
            text = self._feed_forward("txt", encoder_hidden_states + text_gate * text_attended, text_mod2, None)
        hidden_states = self._feed_forward("img", hidden_states + gate * attended, image_mod2, modulate_index)
        if hidden_states.dtype == torch.float16:
            hidden_states, text = hidden_states.clip(-65504, 65504), text.clip(-65504, 65504)
        return packed_text(text, reference) if self.carry else text, hidden_states

    def _feed_forward(self, stream: str, state: Tensor, modulation: list[Tensor], index: Any) -> Tensor:
        if self.project_ffn:
            return getattr(self, f"{stream}_ffn_proj")(state)
        (ffn_modulation,) = modulation
        modulated, gate = self._modulate(getattr(self, f"{stream}_norm2")(state), ffn_modulation, index)
        return state + gate * getattr(self, f"{stream}_mlp")(modulated)


def text_qkv_input(
    block: QwenImageTransformerBlock, encoder_hidden_states: Tensor, temb: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return z `[B, L, D]`, the modulated text that goes into a block's QKV, its gate, and the FFN's modulation.

    The last is a list of one tensor, empty if the block's FFN is pruned.
    """
    first, *second = block.txt_mod(temb).split(3 * block.dim, dim=-1)
    modulated, gate = block._modulate(block.txt_norm1(encoder_hidden_states), first)
    return modulated, gate, second


class PrunedQwenImageTransformer2DModel(QwenImageTransformer2DModel):
    """The stock transformer with pruned blocks at given positions (0-based, in this model).

    `pruned_text`, `pruned_ffn`: blocks without a text stream, and without FFNs. For `text_output` and
    `keep_text_query` see `width_roles`.
    """

    _no_split_modules = ["QwenImageTransformerBlock", "PrunedQwenImageTransformerBlock"]
    _repeated_blocks = ["QwenImageTransformerBlock", "PrunedQwenImageTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 64,
        out_channels: int | None = 16,
        num_layers: int = 60,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 3584,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        zero_cond_t: bool = False,
        use_additional_t_cond: bool = False,
        use_layer3d_rope: bool = False,
        pruned_text: tuple[int, ...] = (),
        pruned_ffn: tuple[int, ...] = (),
        text_output: str = "last",
        keep_text_query: bool = False,
    ) -> None:
        super().__init__(
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=axes_dims_rope,
            zero_cond_t=zero_cond_t,
            use_additional_t_cond=use_additional_t_cond,
            use_layer3d_rope=use_layer3d_rope,
        )
        model: Any = self
        dim = num_attention_heads * attention_head_dim
        roles = width_roles(num_layers, list(pruned_text), list(pruned_ffn), text_output, keep_text_query)
        for index, role in enumerate(roles):
            if role is not None:
                model.transformer_blocks[index] = PrunedQwenImageTransformerBlock(
                    dim, num_attention_heads, attention_head_dim, zero_cond_t=zero_cond_t, **role
                )


register_blocks({PrunedQwenImageTransformerBlock: QwenImageTransformerBlock}, ImageQueryAttnProcessor)
if __name__.startswith("ppcl."):  # the name that diffusers writes when it saves the model
    PrunedQwenImageTransformer2DModel.__module__ = "ppcl"
