import numpy as np
import pytest
from scipy import ndimage

from ppcl.benchmarks.shapes import Detected, detect, evaluation_scenes, relations, satisfies, score
from ppcl.data.worlds.shapes import CATEGORIES, COLORS, SHAPES, Scene, SceneObject, make_scene, render

SCENES = evaluation_scenes(2, 200)
PICTURES = [render(scene.objects) for scene in SCENES]


def noisy(image, index):
    """Gaussian noise of 12 grey levels, more than a finished sampler leaves."""
    noise = np.random.default_rng(index).normal(scale=12, size=image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def blurred(image, index):
    return ndimage.gaussian_filter(image.astype(float), sigma=(0.6, 0.6, 0)).astype(np.uint8)


@pytest.mark.parametrize("spoil", [lambda image, index: image, noisy, blurred], ids=["clean", "noise", "blur"])
def test_ground_truth_pictures_score_nearly_full_marks(spoil):
    """The benchmark's ceiling, in every category."""
    scores = score(SCENES, [spoil(image, index) for index, image in enumerate(PICTURES)])
    assert set(scores) == {*CATEGORIES, "overall"}
    assert min(scores.values()) >= 0.98, scores


def test_pictures_of_other_scenes_score_low():
    """Chance: each prompt judged on a picture drawn for another of its own category."""
    scores = score(SCENES, [render(make_scene(777, i, scene.category).objects) for i, scene in enumerate(SCENES)])
    assert scores["color_attr"] < 0.05
    assert scores["position"] < 0.1
    assert scores["overall"] < 0.25
    blank = np.full((32, 32, 3), 235, dtype=np.uint8)
    assert score(SCENES[::50], [blank] * len(SCENES[::50]))["overall"] == 0


def test_overall_is_the_mean_of_the_categories_present():
    """Three single objects of which one fails, one counting scene that passes."""
    singles = [scene for scene in SCENES if scene.category == "single_object"][:3]
    counting = next(scene for scene in SCENES if scene.category == "counting")
    pictures = [render(singles[0].objects), render(singles[1].objects), render(()), render(counting.objects)]
    scores = score([*singles, counting], pictures)
    assert scores["single_object"] == pytest.approx(2 / 3)
    assert scores["counting"] == 1
    assert scores["overall"] == pytest.approx(5 / 6)


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_and_colour_is_told_apart(shape, color):
    (found,) = detect(render((SceneObject(shape, color, 8, 12),)))
    assert (found.shape, found.color) == (shape, color)
    assert found.overlap == pytest.approx(1)
    assert found.centre == pytest.approx((12, 16), abs=0.5)


def clause(shape, count=1, **more):
    return {"class": shape, "count": count, **more}


RED_CIRCLE = Scene("colors", "a red circle", (), (clause("circle", color="red"),))
TWO_CIRCLES = Scene("counting", "two circles", (), (clause("circle", 2),), (clause("circle", 3),))
CIRCLE_LEFT = Scene("position", "", (), (clause("circle", position=("left of", 1)), clause("square")))
ATTRIBUTES = Scene("color_attr", "", (), (clause("circle", color="red"), clause("square", color="blue")))


def at(shape, x, y, color="red"):
    return SceneObject(shape, color, x, y)


@pytest.mark.parametrize(
    ("scene", "objects", "passes"),
    [
        pytest.param(RED_CIRCLE, [at("circle", 4, 4)], True, id="right colour"),
        pytest.param(RED_CIRCLE, [at("circle", 4, 4, "purple")], False, id="wrong colour"),
        pytest.param(RED_CIRCLE, [at("square", 4, 4)], False, id="wrong shape"),
        pytest.param(RED_CIRCLE, [at("square", 4, 4), at("circle", 20, 4, "blue")], False, id="colour on another"),
        pytest.param(TWO_CIRCLES, [at("circle", 0, 0), at("circle", 16, 0)], True, id="two"),
        pytest.param(TWO_CIRCLES, [at("circle", 0, 0)], False, id="one too few"),
        pytest.param(
            TWO_CIRCLES, [at("circle", 0, 0), at("circle", 16, 0), at("circle", 0, 16)], False, id="one too many"
        ),
        pytest.param(
            TWO_CIRCLES, [at("circle", 0, 0), at("circle", 16, 0), at("cross", 0, 16)], True, id="a bystander"
        ),
        pytest.param(CIRCLE_LEFT, [at("circle", 0, 8), at("square", 20, 8)], True, id="left"),
        pytest.param(CIRCLE_LEFT, [at("circle", 20, 8), at("square", 0, 8)], False, id="right instead"),
        pytest.param(CIRCLE_LEFT, [at("circle", 8, 0), at("square", 8, 20)], False, id="above instead"),
        pytest.param(ATTRIBUTES, [at("circle", 0, 0), at("square", 20, 0, "blue")], True, id="attributes"),
        pytest.param(ATTRIBUTES, [at("circle", 0, 0, "blue"), at("square", 20, 0)], False, id="attributes swapped"),
    ],
)
def test_rules_accept_and_refuse(scene, objects, passes):
    assert satisfies(scene, detect(render(tuple(objects)))) is passes


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        ((-12, 0), {"left of"}),
        ((12, 0), {"right of"}),
        ((0, -12), {"above"}),
        ((0, 12), {"below"}),
        ((-12, -12), {"left of", "above"}),
        ((1, -1), set()),  # within the margin of a tenth of both sizes
        ((-12, 5), {"left of"}),
    ],
)
def test_relations_follow_genevals_margin(offset, expected):
    """Two objects of size 8 have a margin of 1.6; beyond it a normalised offset above one half counts."""
    second = Detected("square", "red", 1.0, (16.0, 16.0), (8.0, 8.0))
    first = Detected("circle", "red", 1.0, (16.0 + offset[0], 16.0 + offset[1]), (8.0, 8.0))
    assert relations(first, second) == expected


def test_evaluation_scenes_are_fixed_and_balanced():
    again = evaluation_scenes(2, 200)
    assert again == SCENES
    assert [scene.category for scene in SCENES] == [category for category in CATEGORIES for _ in range(200)]
    fewer = evaluation_scenes(2, 3)
    assert fewer == [scene for start in range(0, 1200, 200) for scene in SCENES[start : start + 3]]
    assert evaluation_scenes(3, 200) != SCENES
