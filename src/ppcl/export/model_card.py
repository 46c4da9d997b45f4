"""The model card of an exported pipeline, as the Hub reads it."""

from __future__ import annotations

from typing import Any

_CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
license: {license}
base_model: {base_model}
tags:
- ppcl
- pruned
- {family}
---

# {title}

{base_model} with {teacher_layers} blocks pruned to {student_layers}
({teacher:,} to {student:,} transformer parameters) by PPCL
(Pluggable Pruning with Contiguous Layer Distillation, arXiv 2511.16156), with ppcl {version}.

```python
{imports}import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("PATH_OR_ID", torch_dtype=torch.{dtype})
image = pipeline(
    "a red circle and a blue square",
    negative_prompt="{negative_prompt}",
    true_cfg_scale={true_cfg_scale:g},
    num_inference_steps={num_inference_steps},
    height={height},
    width={width},
    generator=torch.Generator().manual_seed({seed}),
).images[0]
```

| setting | value |
| --- | --- |
| removed intervals | {intervals} |
| variant | {variant} |
| students in | {students} |
| pruned in width | {width_sets} |
| method | {method} |
| kept layers of the base | {kept_layers} |

{label}A LoRA or ControlNet of the base model counts its blocks: it does not fit this one until its indices
are mapped through `ppcl.kept_layers` in `transformer/config.json`.
"""

_WIDTH_LABEL = """**ComfyUI does not load this model**: it is pruned in width, and loaders that skip keys
they do not know would draw noise without saying so.

"""


def model_card(facts: dict[str, Any]) -> str:
    """Markdown with the Hub's YAML header from `facts`."""
    label = "" if facts["width_sets"] == "none" else _WIDTH_LABEL
    return _CARD.format(**facts, label=label)
