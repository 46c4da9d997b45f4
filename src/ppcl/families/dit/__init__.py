"""DiT: a class-conditional model whose blocks have an image stream only."""

from __future__ import annotations

from ppcl.families.facts import FamilyFacts, autoencoder_kl

FACTS = (
    FamilyFacts(
        "dit",
        "ppcl.families.dit.family.DiT",
        "DiTTransformer2DModel",
        stacks={"transformer_blocks": "num_layers"},
        pipeline_classes=("DiTPipeline",),
        first_block=1,
        pruned_models={"PrunedDiTTransformer2DModel": "ppcl.families.dit.transformer_dit_pruned"},
        builders={"tiny_dit": "ppcl.families.dit.tiny"},
        vae=("AutoencoderKL", autoencoder_kl(4)),
        categories=("single_object", "colors"),
        takes_lora=False,
        licence={"license": "cc-by-nc-4.0"},
    ),
)
