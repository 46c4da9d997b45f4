"""Cards are read back by huggingface_hub, as the Hub does, and their code is Python."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from ppcl.artifacts.scores import ComparedRow, ScoreRow, Scores
from ppcl.config import SamplingConfig
from ppcl.export.model_card import (
    Code,
    card_metadata,
    evaluation_section,
    hub_id,
    license_of,
    model_card,
    plain,
    single_file_section,
    with_section,
)
from ppcl.families.registry import FAMILIES, get_family

FACTS = {
    "title": "qwen_image pruned by PPCL",
    "base": "Qwen/Qwen-Image",
    "version": "0.1.0",
    "variant": "ppcl-depth",
    "dtype": "bfloat16",
    "teacher_layers": 60,
    "student_layers": 35,
    "teacher": 20_430_401_088,
    "student": 11_926_000_000,
    "imports": "",
    "seed": 42,
    "intervals": "{}",
    "students": 3,
    "width_sets": "none",
    "method": "ppcl",
    "kept_layers": "{}",
}
FLUX_DEV = {
    "license": "other",
    "license_name": "flux-1-dev-non-commercial-license",
    "license_link": "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
}


def card(family: str = "qwen_image", base: str | None = "Qwen/Qwen-Image", **facts: Any) -> str:
    metadata = card_metadata(family, base, license_of(family, base, None))
    call = {"prompt": ["a red circle"], "negative_prompt": ['{"quoted"}'], "true_cfg_scale": 4.0}
    return model_card({"metadata": metadata, "call": call} | FACTS | facts)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a|b<img src=x>", r"a\|b\<img src=x\>"),
        ("[x](javascript:y)`", r"\[x\](javascript:y)\`"),
        ("red\x1b[31m\nname", r"red\\x1b\[31m\\nname"),
    ],
)
def test_names_that_a_user_has_chosen_are_text(name: str, shown: str) -> None:
    assert plain(name) == shown
    metadata = card_metadata("qwen_image", None, license_of("qwen_image", None, None))
    for fact in ("title", "base", "method"):
        assert shown in model_card({"metadata": metadata, "call": None} | FACTS | {fact: name})


def test_the_hub_reads_the_header() -> None:
    assert ModelCard(card()).data.to_dict() == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": "apache-2.0",
        "base_model": "Qwen/Qwen-Image",
        "base_model_relation": "finetune",
        "tags": ["ppcl", "pruned", "qwen_image"],
    }
    assert card().startswith("---\nlibrary_name: diffusers\n")
    flux = ModelCard(card("flux", "Freepik/flux.1-lite-8B")).data.to_dict()
    assert {key: flux[key] for key in FLUX_DEV} == FLUX_DEV


@pytest.mark.parametrize("family", [name for name in FAMILIES if "edit" in name])
def test_a_model_that_edits_makes_images_of_images(family: str) -> None:
    assert ModelCard(card(family, None)).data.pipeline_tag == "image-to-image"


def test_a_base_that_the_hub_does_not_know_is_not_named_to_it() -> None:
    data = ModelCard(card(base=None)).data.to_dict()
    assert "base_model" not in data
    assert "base_model_relation" not in data


def test_names_on_the_hub() -> None:
    assert hub_id("Qwen/Qwen-Image", None) == "Qwen/Qwen-Image"
    cached = Path("/home/me/.cache/huggingface/hub/models--black-forest-labs--FLUX.1-dev/snapshots/0123abc")
    assert hub_id(str(cached), cached) == "black-forest-labs/FLUX.1-dev"
    assert hub_id("models/FLUX.1-dev", Path("models/FLUX.1-dev")) is None
    assert hub_id("embedded:tiny_qwen_image", Path("assets/tiny_qwen_image")) is None


def test_licences_of_families() -> None:
    assert license_of("qwen_image", "Qwen/Qwen-Image", None) == {"license": "apache-2.0"}
    assert license_of("flux", "black-forest-labs/FLUX.1-dev", None) == FLUX_DEV
    assert license_of("flux", "Freepik/flux.1-lite-8B", None) == FLUX_DEV
    assert license_of("flux", "black-forest-labs/FLUX.1-schnell", None) == {"license": "apache-2.0"}
    assert license_of("dit", "facebook/DiT-XL-2-256", None) == {"license": "cc-by-nc-4.0"}
    for family in FAMILIES:
        known = family != "traced"  # of any class, so its licence is only what the base's own card says
        assert bool(license_of(family, None, None)) == known


def test_the_bases_own_card_counts_first(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE.md\n---\n# M\n", encoding="utf-8")
    link = "https://huggingface.co/me/mine/blob/main/LICENSE.md"
    mine = {"license": "other", "license_name": "mine", "license_link": link}
    assert license_of("qwen_image", "me/mine", tmp_path) == mine
    assert license_of("flux", None, tmp_path) == FLUX_DEV  # the link leads nowhere
    readme.write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    assert license_of("flux", None, tmp_path) == {"license": "mit"}
    for without in ("# no header\n", "---\n- a list\n---\n"):
        readme.write_text(without, encoding="utf-8")
        assert license_of("flux", None, tmp_path) == FLUX_DEV


def test_a_teacher_trained_here_is_not_under_the_familys_licence(tmp_path: Path) -> None:
    (tmp_path / "ppcl.json").write_text(json.dumps({"format": "ppcl.teacher"}), encoding="utf-8")
    assert license_of("flux", None, tmp_path) == {"license": "apache-2.0"}
    (tmp_path / "ppcl.json").write_text(json.dumps({"format": "ppcl.export"}), encoding="utf-8")
    assert license_of("flux", None, tmp_path) == FLUX_DEV


def code_of(text: str) -> str:
    (found,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return found


@pytest.mark.parametrize("family", ["qwen_image", "qwen_image_edit", "qwen_image_edit_2509", "flux"])
def test_the_call_is_the_familys(family: str) -> None:
    known = get_family(family, {}, SamplingConfig(negative_prompt='a "bad" one'))
    given = [[Code('load_image("PATH_OR_URL")')] * known.num_references]
    call = known.prompt_arguments(None, ["a red circle"], given) | known.sampling_arguments(known.sampling, 1)
    code = code_of(card(family, None, call=call))
    compile(code, "card", "exec")
    assert "num_inference_steps=50," in code
    assert ("import load_image" in code) == bool(known.num_references)
    assert code.count('load_image("PATH_OR_URL")') == known.num_references


def test_only_a_model_pruned_in_width_has_the_loud_label() -> None:
    assert "COMFYUI CANNOT LOAD" not in card()
    text = card(width_sets='{"transformer_blocks": {"text": [3], "ffn": []}}')
    assert "COMFYUI CANNOT LOAD THIS MODEL" in text
    assert text.index("COMFYUI") < text.index("```python")


def row(name: str, scores: Scores | None, **measured: float) -> ScoreRow:
    cost = {"num_layers": 4, "params": 100, "latency_ms": 1.0, "peak_memory_mb": 1.0}
    return ScoreRow(name=name, scores=scores, students=[], projectors=[], removed=[], **cost, **measured)


def scores(single: float, two: float, overall: float) -> Scores:
    return Scores({"single_object": single, "two_object": two}, overall)


TEACHER = row("teacher", scores(1.0, 0.5, 0.75))
ROWS = [ComparedRow.beside(TEACHER, item) for item in (TEACHER, row("ppcl-depth", scores(0.9, 0.3, 0.6)))]
EVALUATION = evaluation_section(ROWS, "share of pictures that show what the prompt asks for")


def test_the_table_has_a_row_for_each() -> None:
    lines = EVALUATION.splitlines()
    assert lines[0].startswith("Share of pictures that show what the prompt asks for, with equal prompts")
    assert lines[-4:] == [
        "| variant | single object | two object | overall | drop % |",
        "| --- | --- | --- | --- | --- |",
        "| `teacher` | 1.000 | 0.500 | 0.750 | 0.0 |",
        "| `ppcl-depth` | 0.900 | 0.300 | 0.600 | 20.0 |",
    ]


def test_the_table_has_intervals_and_distances_where_they_were_measured() -> None:
    measured = {"score_interval": 0.02, "velocity_error": 0.0123, "latent_distance": 0.5}
    rows = [TEACHER, row("ppcl-depth", scores(0.9, 0.3, 0.6), **measured)]
    lines = evaluation_section([ComparedRow.beside(TEACHER, item) for item in rows], "share").splitlines()
    assert lines[2].endswith("| overall | 95% interval | drop % | velocity error | latent distance |")
    assert lines[4].endswith("| 0.750 |  | 0.0 |  |  |")
    assert lines[5].endswith("| 0.600 | ± 0.020 | 20.0 | 0.0123 | 0.500 |")


def test_the_table_without_a_benchmark_has_distances_alone() -> None:
    teacher = row("teacher", None, velocity_error=0.0)
    rows = [ComparedRow.beside(teacher, item) for item in (teacher, row("ppcl-depth", None, velocity_error=0.0123))]
    lines = evaluation_section(rows, "").splitlines()
    assert lines[0] == "Distance to the teacher, with equal prompts, seeds and settings:"
    assert lines[2:] == [
        "| variant | velocity error |",
        "| --- | --- |",
        "| `teacher` | 0.0000 |",
        "| `ppcl-depth` | 0.0123 |",
    ]


def test_sections_are_replaced_and_the_rest_stays() -> None:
    empty = card()
    mine = empty.replace("kept layers of the base", "blocks I kept")
    filled = with_section(with_section(mine, "evaluation", EVALUATION), "single file", "ONE\n")
    assert "| `teacher` | 1.000" in filled
    assert filled.index("ONE") < filled.index("| `teacher`") < filled.index("blocks I kept")
    assert with_section(filled, "evaluation", EVALUATION) == filled
    assert with_section(with_section(filled, "evaluation", ""), "single file", "") == mine
    assert with_section("# no sections\n", "evaluation", "text") == "# no sections\n"


def test_musubi_tuner_is_told_the_number_of_blocks() -> None:
    assert "--num_layers 35" in single_file_section("qwen_image", 35)
    assert "musubi" not in single_file_section("flux", 40)
