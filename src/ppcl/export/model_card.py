"""The model card of an exported pipeline, as the Hub reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppcl.artifacts.files import read_json
from ppcl.artifacts.scores import ComparedRow
from ppcl.families.facts import APACHE
from ppcl.families.registry import FAMILIES
from ppcl.sentences import printable

_CARD = """---
{metadata}
---

# {title}

{base} with {teacher_layers} blocks pruned to {student_layers}
({teacher:,} to {student:,} {component} parameters) by PPCL
(Pluggable Pruning with Contiguous Layer Distillation, arXiv 2511.16156), with ppcl {version}.

{label}```python
{imports}import torch
from diffusers import DiffusionPipeline
{loader}
pipeline = DiffusionPipeline.from_pretrained("PATH_OR_ID", dtype=torch.{dtype}{without})
{use}```

<!-- quantized -->
<!-- end of quantized -->

<!-- single file -->
<!-- end of single file -->

<!-- evaluation -->
<!-- end of evaluation -->

| setting | value |
| --- | --- |
| removed intervals | {intervals} |
| variant | {variant} |
| students in | {students} |
| pruned in width | {width_sets} |
| method | {method} |
| kept layers of the base | {kept_layers} |

A LoRA or ControlNet of the base model counts its blocks: it does not fit this one until its indices
are mapped through `ppcl.kept_layers` in `{component}/config.json`. diffusers may say that it ignores `ppcl` there:
it is this record, and nothing else reads it.
"""

_CALL = """{result} = pipeline(
{arguments}
    generator=torch.Generator().manual_seed({seed}),
).{field}[0]
"""
# By the field of its output that a pipeline draws into: a name for one result, and what the Hub calls the task.
_RESULTS = {"images": ("image", "image"), "frames": ("video", "video"), "audios": ("sound", "audio")}

_WIDTH_LABEL = """> [!WARNING]
> **COMFYUI CANNOT LOAD THIS MODEL.** It is pruned in width. ComfyUI, and other loaders that skip keys they do
> not know, would load it without a word and draw noise. Use diffusers, as below.

"""

_SINGLE_FILE = """ComfyUI loads the single `.safetensors` file that comes with this folder: put it in
`models/diffusion_models`; text encoders and VAE are the base model's."""
_COUNTED = "\nmusubi-tuner loads it too and must be told the number of blocks: `--num_layers {student_layers}`."


class Code(str):
    """An argument that stands in a call as it is, without quotes."""

    __repr__ = str.__str__


def hub_id(path: str, folder: Path | None) -> str | None:
    """The Hub's name of a base model: its `path` itself, or what the Hub's cache keeps the `folder` under."""
    if folder is None:
        return path
    found = re.search(r"/models--([^/]+?)--([^/]+)/snapshots/", folder.absolute().as_posix() + "/")
    return f"{found[1]}/{found[2]}" if found else None


def license_of(family: str, base: str | None, folder: Path | None) -> dict[str, str]:
    """The card's licence fields, which a pruned model has from its base.

    What the base's own card says counts before what its family is known for. A teacher that ppcl trained from
    nothing carries nobody's licence but ppcl's own.
    """
    if folder is not None and (folder / "README.md").is_file():
        own = _licence_in(folder / "README.md", base)
        if own:
            return own
    record = None if folder is None else folder / "ppcl.json"
    if record is not None and record.is_file() and read_json(record, "The teacher").get("format") == "ppcl.teacher":
        return dict(APACHE)
    if base is not None and "schnell" in base.lower():
        return dict(APACHE)
    return dict(FAMILIES[family].licence)


def _licence_in(card: Path, base: str | None) -> dict[str, str]:
    from huggingface_hub import metadata_load

    try:
        metadata = metadata_load(card) or {}
    except ValueError:
        return {}
    found = {name: str(metadata[name]) for name in ("license", "license_name", "license_link") if metadata.get(name)}
    link = found.get("license_link", "")
    if link and "://" not in link:  # a file of the base's own repository
        if base is None:
            return {}
        found["license_link"] = f"https://huggingface.co/{base}/blob/main/{link}"
    return found if "license" in found else {}


def card_metadata(
    family: str, base: str | None, licence: Mapping[str, str], field: str | None = "images", *, given: bool = False
) -> str:
    """The YAML that the Hub reads. `base` is left out where the Hub does not know it: it would refuse the card.

    `field`: the field of its output that the pipeline draws into, None if that is not known. `given`: whether it must
        be given a picture, as all of some families are.
    """
    from huggingface_hub import ModelCardData

    data: dict[str, Any] = {"library_name": "diffusers"}
    if field is not None:
        data["pipeline_tag"] = (
            f"{'image' if given or FAMILIES[family].max_references else 'text'}-to-{_RESULTS[field][1]}"
        )
    data |= licence
    if base is not None:
        # Of what the Hub tells apart (adapter, finetune, merge, quantized) a pruned model is tuned.
        data |= {"base_model": base, "base_model_relation": "finetune"}
    data["tags"] = ["ppcl", "pruned", family]
    return ModelCardData(**data).to_yaml(original_order=list(data))


def model_card(facts: Mapping[str, Any]) -> str:
    """Markdown with the Hub's YAML header from `facts`; its sections are empty until `with_section` fills them.

    `call` are the pipeline's arguments, None where only loading is shown; `without` those that say what is not there.
    `preparation`: code that comes before the call. `field`: the field of its output that the pipeline draws into.
    """
    call: Mapping[str, Any] = facts["call"] or {}
    arguments = "\n".join(f"    {name}={value!r}," for name, value in call.items())
    given = any("load_image" in repr(value) for value in call.values())
    told = {"without": "", "preparation": "", "component": "transformer", "field": "images"} | dict(facts)
    told |= {key: plain(str(told[key])) for key in ("title", "base", "method")}  # names that a user has chosen
    return _CARD.format(
        **told,
        label="" if facts["width_sets"] == "none" else _WIDTH_LABEL,
        loader="from diffusers.utils import load_image\n" if given else "",
        use=told["preparation"] + _CALL.format(arguments=arguments, result=_RESULTS[told["field"]][0], **told)
        if facts["call"]
        else "",
    )


def plain(text: str) -> str:
    """Return `text` as Markdown that shows it as it is, also in a cell of a table."""
    return re.sub(r"([\\`*<>\[\]|#~])", r"\\\1", printable(text))


def with_section(card: str, name: str, text: str) -> str:
    """A card whose section `name`, between two comments, holds `text`; one without such a section stays as it is."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, found, rest = card.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        return card
    return f"{before}{begin}{text.strip()}\n{end}{after}" if text else f"{before}{begin}{end}{after}"


def single_file_section(family: str, student_layers: int) -> str:
    """How the single file is used; musubi-tuner knows Qwen-Image."""
    counted = _COUNTED.format(student_layers=student_layers) if FAMILIES[family].counts_blocks else ""
    return _SINGLE_FILE + counted


def quantized_section(scheme: str, dtype: str, size: int, before: int) -> str:
    """How the weights are kept; `size` and `before` are the transformer's bytes with and without that."""
    if scheme == "nf4":
        package = "bitsandbytes and a GPU"
    else:
        package = f"torchao; without `dtype=torch.{dtype}` diffusers would load the rest in bfloat16"
    return (
        f"The transformer's weights are quantised ({scheme}), {size / 1e6:,.1f} MB in place of {before / 1e6:,.1f} MB. "
        f"Loading them takes {package}."
    )


def evaluation_section(rows: Sequence[ComparedRow], label: str) -> str:
    """A table of the variants' scores and distances to the teacher, under a sentence on how they were measured.

    `label` says what the benchmark's score is. What no row has is left out: without a benchmark there are no scores.
    """
    scores = [{} if row.scores is None else row.scores.to_json() for row in rows]
    columns: dict[str, list[str | None]] = {"variant": [f"`{row.name}`" for row in rows]}
    for name in dict.fromkeys(name for found in scores for name in found):
        columns[name.replace("_", " ")] = [_number(found.get(name), 3) for found in scores]
    columns["95% interval"] = [None if row.score_interval is None else f"± {row.score_interval:.3f}" for row in rows]
    columns["drop %"] = [_number(row.drop_percent, 1) for row in rows]
    columns["velocity error"] = [_number(row.velocity_error, 4) for row in rows]
    columns["latent distance"] = [_number(row.latent_distance, 3) for row in rows]
    columns["PSNR"] = [_number(row.psnr, 1) for row in rows]
    columns["SSIM"] = [_number(row.ssim, 3) for row in rows]
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    lines = [list(columns), ["---"] * len(columns), *map(list, zip(*columns.values(), strict=True))]
    table = "\n".join(f"| {' | '.join(cell or '' for cell in line)} |" for line in lines)
    what = f"{label[0].upper()}{label[1:]}" if any(scores) else "Distance to the teacher"
    lower = ", of which lower is better" if any(row.lower_is_better for row in rows) else ""
    return f"{what}{lower}, with equal prompts, seeds and settings:\n\n{table}"


def _number(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"
