"""FLUX.1: dual-stream blocks followed by single-stream blocks."""

from __future__ import annotations

from ppcl.families.facts import FamilyFacts, SingleFile, autoencoder_kl


def _stream(name: str, query_key_value: tuple[str, str, str], norms: tuple[str, str], rest: tuple[str, ...]) -> dict:
    """Return the file's names for the modules of one stream in a dual-stream block, each with diffusers' names.

    `rest` names diffusers' modulation, output projection and feed-forward.
    """
    modulation, projection, feed_forward = rest
    return {
        f"{name}_mod.lin": (modulation,),
        f"{name}_attn.qkv": query_key_value,
        f"{name}_attn.norm.query_norm.scale": (norms[0],),
        f"{name}_attn.norm.key_norm.scale": (norms[1],),
        f"{name}_attn.proj": (projection,),
        f"{name}_mlp.0": (f"{feed_forward}.net.0.proj",),
        f"{name}_mlp.2": (f"{feed_forward}.net.2",),
    }


_SINGLE_FILE = SingleFile(
    "flux-1-dev",
    "https://github.com/black-forest-labs/flux",
    "FluxTransformer2DModel",
    special=("guidance_embeds", False, "flux-1-schnell"),
    outer={
        "img_in": ("x_embedder",),
        "txt_in": ("context_embedder",),
        "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
        "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
        "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
        "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
        "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
        "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
        "final_layer.linear": ("proj_out",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    },
    blocks={
        "transformer_blocks": (
            "double_blocks",
            _stream(
                "img",
                ("attn.to_q", "attn.to_k", "attn.to_v"),
                ("attn.norm_q.weight", "attn.norm_k.weight"),
                ("norm1.linear", "attn.to_out.0", "ff"),
            )
            | _stream(
                "txt",
                ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                ("attn.norm_added_q.weight", "attn.norm_added_k.weight"),
                ("norm1_context.linear", "attn.to_add_out", "ff_context"),
            ),
        ),
        "single_transformer_blocks": (
            "single_blocks",
            {
                "modulation.lin": ("norm.linear",),
                "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
                "linear2": ("proj_out",),
                "norm.query_norm.scale": ("attn.norm_q.weight",),
                "norm.key_norm.scale": ("attn.norm_k.weight",),
            },
        ),
    },
    swapped=("final_layer.adaLN_modulation.1",),
)

FACTS = (
    FamilyFacts(
        "flux",
        "ppcl.families.flux.family.Flux",
        "FluxTransformer2DModel",
        stacks={"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"},
        pipeline_classes=("FluxPipeline",),
        text_stacks=("transformer_blocks",),
        text_tokens=None,
        vae=("AutoencoderKL", autoencoder_kl(16)),
        encoder_gb=9.8,
        residuals={
            "transformer_blocks": "controlnet_block_samples",
            "single_transformer_blocks": "controlnet_single_block_samples",
        },
        repeated_residuals=("transformer_blocks",),
        pruned_models={"PrunedFluxTransformer2DModel": "ppcl.families.flux.transformer_flux_pruned"},
        builders={"tiny_flux": "ppcl.families.flux.tiny"},
        controlnet_classes=("FluxControlNetModel", "FluxControlNetPipeline"),
        single_file=_SINGLE_FILE,
        licence={
            "license": "other",
            "license_name": "flux-1-dev-non-commercial-license",
            "license_link": "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
        },
    ),
)
