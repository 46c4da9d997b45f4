"""Text in the shapes world: rows of letters, and their reader."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from scipy import ndimage

from ppcl.benchmarks.shapes import evaluation_scenes, fulfils, read, score
from ppcl.data.worlds import glyphs, shapes
from ppcl.families.qwen_image.tiny import build_tokenizer
from ppcl.families.registry import get_family

SCENES = [shapes.make_scene(11, index, "text") for index in range(300)]


def row_of(letters, y=8):
    """The picture of `letters`, in a scene of as many."""
    scene = next(scene for scene in SCENES if len(scene.text) == len(letters))
    objects = [replace(item, shape=letter, y=y) for item, letter in zip(scene.objects, letters, strict=True)]
    return shapes.render(tuple(objects))


def test_letters_are_told_apart_by_more_than_twice_what_may_be_wrong():
    for first, second in combinations(glyphs.TEMPLATES.values(), 2):
        assert (first != second).sum() > 2 * glyphs.MAX_WRONG


def test_a_row_is_written_on_the_lattice_in_one_colour():
    lengths = dict.fromkeys(range(2, 9), 0)
    for scene in SCENES:
        lengths[len(scene.text)] += 1
        assert scene.caption == f"the text {' '.join(scene.text)}"
        assert "".join(item.shape for item in scene.objects) == scene.text
        assert len({(item.color, item.y) for item in scene.objects}) == 1
        assert scene.objects[0].y % 4 == 0
        assert [item.x for item in scene.objects] == [
            4 * ((8 - len(scene.text)) // 2) + 4 * n for n in range(len(scene.text))
        ]
    assert min(lengths.values()) > 20, lengths
    assert {item.y for scene in SCENES for item in scene.objects} == {*range(0, 25, 4)}


def noisy(image, index):
    return np.clip(image + np.random.default_rng(index).normal(scale=12, size=image.shape), 0, 255).astype(np.uint8)


def blurred(image, index):
    return ndimage.gaussian_filter(image.astype(float), sigma=(0.4, 0.4, 0)).astype(np.uint8)


@pytest.mark.parametrize("spoil", [lambda image, index: image, noisy, blurred], ids=["clean", "noise", "blur"])
def test_what_was_written_is_read(spoil):
    right = [fulfils(scene, spoil(shapes.render(scene.objects), index)) for index, scene in enumerate(SCENES)]
    assert np.mean(right) >= 0.98


@pytest.mark.parametrize("shift", [(0, 1), (0, -1), (1, 0), (-1, 0), (3, 0), (1, 1)])
def test_a_row_may_drift(shift):
    image = np.roll(row_of("HLPS"), shift, axis=(0, 1))
    assert read(image) == "HLPS"


@pytest.mark.parametrize("letters", ["HLSP", "HLP", "HLPSS", "HLPT", "HL", "LPS", "HHLPS"])
def test_other_letters_are_not_what_was_asked_for(letters):
    scene = replace(SCENES[0], text="HLPS")
    assert fulfils(scene, row_of("HLPS"))
    assert not fulfils(scene, row_of(letters))


def test_a_gap_a_second_row_and_a_stray_object_are_no_text():
    image = row_of("HLPS")
    x = 4 * ((8 - 4) // 2)
    gap = image.copy()
    gap[:, x + 4 : x + 8] = shapes.BACKGROUND
    assert read(gap) == ""
    twice = image.copy()
    twice[16:24] = image[8:16]
    assert read(twice) == ""
    crossed = image.copy()
    crossed[20:28, 4:12] = shapes.render((shapes.SceneObject("cross", "red", 4, 20),))[20:28, 4:12]
    assert read(crossed) == ""
    assert read(shapes.render(())) == ""


def test_other_texts_score_nothing():
    pictures = [shapes.render(shapes.make_scene(777, index, "text").objects) for index in range(len(SCENES))]
    assert score(SCENES, pictures)["text"] < 0.01


def test_every_letter_is_one_token():
    tokenizer = build_tokenizer({"the", "text", *shapes.vocabulary(shapes.ALL_CATEGORIES)})
    for scene in SCENES[:40]:
        ids = tokenizer(scene.caption).input_ids
        assert len(ids) == 2 + len(scene.text)
        assert tokenizer.decode(ids) == scene.caption
    assert len(tokenizer(shapes.longest_caption()).input_ids) == 10


def test_coloured_relations_are_placed_and_checked_like_relations():
    for index in range(60):
        scene = shapes.make_scene(3, index, "color_position")
        (first, second), picture = scene.objects, shapes.render(scene.objects)
        assert scene.caption.startswith(f"a {first.color} {first.shape} ")
        assert first.color != second.color
        assert fulfils(scene, picture)
        assert not fulfils(
            scene, shapes.render((replace(first, x=second.x, y=second.y), replace(second, x=first.x, y=first.y)))
        )
        assert scene.caption in shapes.all_captions(["color_position"])


def test_a_models_own_categories_take_the_place_of_its_familys():
    family = get_family("qwen_image", categories=["colors", "text"])
    assert [scene.category for scene in evaluation_scenes(2, 2, family)] == ["colors", "colors", "text", "text"]
    assert get_family("qwen_image").categories == shapes.CATEGORIES
