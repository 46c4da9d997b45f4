"""DiT: a class-conditional model whose blocks have an image stream only."""

from __future__ import annotations

from ppcl.families.facts import FamilyFacts, SingleFile, autoencoder_kl

# The names of facebookresearch/DiT, whose blocks share one embedding of time and label.
ORIGINAL = SingleFile(
    architecture="",
    implementation="",
    transformer_class="DiTTransformer2DModel",
    outer={
        "x_embedder.proj": ("pos_embed.proj",),
        "final_layer.adaLN_modulation.1": ("proj_out_1",),
        "final_layer.linear": ("proj_out_2",),
    },
    blocks={
        "transformer_blocks": (
            "blocks",
            {
                "adaLN_modulation.1": ("norm1.linear",),
                "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
                "attn.proj": ("attn1.to_out.0",),
                "mlp.fc1": ("ff.net.0.proj",),
                "mlp.fc2": ("ff.net.2",),
            },
        )
    },
    repeated={
        "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
        "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
    },
    computed={"pos_embed": "pos_embed.pos_embed"},
)

FACTS = (
    FamilyFacts(
        "dit",
        "ppcl.families.dit.family.DiT",
        "DiTTransformer2DModel",
        stacks={"transformer_blocks": "num_layers"},
        pipeline_classes=("DiTPipeline",),
        streams=("image",),
        first_block=1,
        pruned_models={"PrunedDiTTransformer2DModel": "ppcl.families.dit.transformer_dit_pruned"},
        builders={"tiny_dit": "ppcl.families.dit.tiny"},
        vae=("AutoencoderKL", autoencoder_kl(4)),
        categories=("single_object", "colors"),
        takes_lora=False,
        original=ORIGINAL,
        licence={"license": "cc-by-nc-4.0"},
    ),
)
