from __future__ import annotations

import numpy as np
import pytest

from ppcl.benchmarks.shapes import edited, evaluation_scenes, fulfils, score
from ppcl.data.worlds import edits
from ppcl.data.worlds.shapes import BACKGROUND, LATTICE, OBJECT_SIZE, SHAPES, render
from ppcl.families.registry import FAMILIES, get_family

EDITS = {category: [edits.make_scene(5, n, category) for n in range(60)] for category in edits.CATEGORIES}


def test_an_edit_depends_on_seed_and_index_alone():
    forwards = [edits.make_scene(3, index) for index in range(40)]
    np.random.seed(1)
    assert [edits.make_scene(3, index) for index in reversed(range(40))] == forwards[::-1]
    assert {edit.category for edit in forwards} == set(edits.ONE_PICTURE)
    assert sum(edits.make_scene(4, n) == edit for n, edit in enumerate(forwards)) < 4


@pytest.mark.parametrize("category", edits.CATEGORIES)
def test_an_edit_changes_one_object_and_says_which(category):
    for edit in EDITS[category]:
        gone, new = set(edit.before) - set(edit.objects), set(edit.objects) - set(edit.before)
        assert (len(gone), len(new)) == {"remove": (1, 0), "add": (0, 1), "insert": (0, 1)}.get(category, (1, 1))
        assert len({item.shape for item in edit.before}) == len(edit.before) in (2, 3)
        words = edit.caption.split()
        if category != "insert":
            assert words.count(next(iter(gone or new)).shape) == 1
            assert sum(word in SHAPES for word in words) == 1
        for objects in (edit.before, edit.objects):
            assert edits._clear(objects)
            assert all(0 <= v <= 32 - OBJECT_SIZE and v % LATTICE == 0 for item in objects for v in (item.x, item.y))


@pytest.mark.parametrize("family", ["qwen_image_edit", "qwen_image_edit_2509"])
def test_a_familys_world_gives_as_many_pictures_as_it_says(family):
    known = FAMILIES[family]
    for category in known.categories:
        for edit in EDITS[category]:
            assert len(edit.references) == known.num_references
            assert edit.caption in edits.all_captions(known.categories)
            assert np.array_equal(edit.references[0], render(edit.before))
    scenes = evaluation_scenes(9, 3, get_family(family))
    assert [scene.category for scene in scenes] == [name for name in known.categories for _ in range(3)]


def test_the_second_picture_shows_what_the_instruction_speaks_of():
    for edit in EDITS["insert"]:
        assert {*edit.objects} - {*edit.before} == {*edit.given}
    for edit in EDITS["match_color"]:
        (new,) = {*edit.objects} - {*edit.before}
        assert new.color == edit.given[0].color


@pytest.mark.parametrize("category", edits.CATEGORIES)
def test_the_right_picture_is_right_and_the_given_one_is_not(category):
    for edit in EDITS[category]:
        assert edited(edit, render(edit.objects))
        assert not edited(edit, edit.references[0])


def test_where_an_object_is_added_does_not_matter():
    for edit in EDITS["add"][:20]:
        *others, new = edit.objects
        places = [type(new)(new.shape, new.color, x, y) for x in range(0, 25, 4) for y in range(0, 25, 4)]
        free = [place for place in places if edits._clear([*others, place])]
        assert free
        assert all(edited(edit, render((*others, place))) for place in free)
        assert not edited(edit, render((*others, type(new)(new.shape, others[0].color, new.x, new.y)))) or (
            new.color == others[0].color
        )


@pytest.mark.parametrize("category", ["recolor", "remove", "add", "move"])
def test_whatever_else_changes_makes_an_edit_wrong(category):
    for edit in EDITS[category][:20]:
        kept = [item for item in edit.before if item in edit.objects]
        right = render(edit.objects)
        without = render(tuple(item for item in edit.objects if item != kept[0]))
        assert not edited(edit, without)
        moved = type(kept[0])(kept[0].shape, kept[0].color, (kept[0].x + 8) % 28 // 4 * 4, kept[0].y)
        assert not edited(edit, render((*(item for item in edit.objects if item != kept[0]), moved)))
        darker = np.where(right == BACKGROUND, BACKGROUND - 40, right).astype(np.uint8)
        assert not edited(edit, darker)
        noisy = np.clip(right + np.random.default_rng(0).normal(0, 4, right.shape), 0, 255).astype(np.uint8)
        assert edited(edit, noisy)


def test_scores_are_by_the_edits_own_categories():
    scenes = [edit for found in EDITS.values() for edit in found[:5]]
    pictures = [render(scene.objects) for scene in scenes]
    assert score(scenes, pictures) == dict.fromkeys((*edits.CATEGORIES, "overall"), 1.0)
    assert score(scenes, [scene.references[0] for scene in scenes])["overall"] == 0.0
    assert all(fulfils(scene, picture) for scene, picture in zip(scenes, pictures, strict=True))
