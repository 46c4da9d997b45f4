import numpy as np
import pytest
import torch

from ppcl.data.worlds import shapes
from ppcl.families.qwen_image.tiny import build_tokenizer

SCENES = {category: [shapes.make_scene(11, index, category) for index in range(300)] for category in shapes.CATEGORIES}
EVERY_SCENE = [scene for scenes in SCENES.values() for scene in scenes]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_a_scene_depends_on_seed_and_index_alone():
    """Not on what was drawn before: asked for backwards, after others, the scenes are the same."""
    forwards = [shapes.make_scene(5, index) for index in range(40)]
    np.random.seed(99)
    torch.manual_seed(99)
    assert [shapes.make_scene(5, index) for index in reversed(range(40))] == forwards[::-1]
    other = [shapes.make_scene(6, index) for index in range(40)]
    assert sum(a == b for a, b in zip(forwards, other, strict=True)) < 4


def test_pictures_are_tensors_in_minus_one_to_one():
    images = shapes.pictures([shapes.make_scene(3, index) for index in range(12)])
    assert images.shape == (12, 3, 32, 32)
    assert images.dtype == torch.float32
    assert -1 <= images.min() < images.max() <= 1


def test_every_category_comes_up_about_equally_often():
    drawn = [shapes.make_scene(1, index).category for index in range(1200)]
    counts = {category: drawn.count(category) for category in shapes.CATEGORIES}
    assert all(150 < count < 250 for count in counts.values()), counts


@pytest.mark.parametrize("category", shapes.CATEGORIES)
def test_objects_lie_inside_and_never_touch(category):
    for scene in SCENES[category]:
        owner = np.zeros((32, 32), dtype=int)
        for number, item in enumerate(scene.objects, start=1):
            assert 0 <= item.x <= 24
            assert 0 <= item.y <= 24
            window = owner[item.y : item.y + 8, item.x : item.x + 8]
            assert window.shape == (8, 8)
            around = owner[max(0, item.y - 3) : item.y + 11, max(0, item.x - 3) : item.x + 11]
            assert not around.any()  # three pixels of background on every side at least
            window[:] = number


@pytest.mark.parametrize("category", shapes.CATEGORIES)
def test_the_picture_shows_what_the_scene_says(category):
    """Pixel by pixel against a plain loop over the objects' templates."""
    for scene in SCENES[category][:40]:
        expected = np.full((32, 32, 3), 235, dtype=np.uint8)
        for item in scene.objects:
            for row in range(8):
                for column in range(8):
                    if shapes.TEMPLATES[item.shape][row, column]:
                        expected[item.y + row, item.x + column] = shapes.COLORS[item.color]
        assert np.array_equal(shapes.render(scene.objects), expected)


def test_to_tensor_is_exactly_invertible():
    image = shapes.render(EVERY_SCENE[0].objects)
    tensor = shapes.to_tensor([image])
    assert np.array_equal(((tensor[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), image)


@pytest.mark.parametrize("category", shapes.CATEGORIES)
def test_captions_say_what_the_clauses_check(category):
    words = {1: "a", **shapes.NUMERALS}
    for scene in SCENES[category]:
        clauses = []
        for clause in scene.include:
            name = clause["class"] if clause["count"] == 1 else shapes.PLURALS[clause["class"]]
            clauses.append(" ".join([words[clause["count"]], *([clause["color"]] if "color" in clause else []), name]))
        joint = scene.include[0]["position"][0] if "position" in scene.include[0] else "and"
        assert scene.caption == f" {joint} ".join(clauses)
        assert sum(clause["count"] for clause in scene.include) == len(scene.objects)
        assert len(scene.include) == (2 if category in ("two_object", "position", "color_attr") else 1)
        for clause in scene.exclude:
            assert category == "counting"
            assert clause["count"] == scene.include[0]["count"] + 1


def test_all_captions_are_all_that_occur():
    """Complete, without repeats, and holding nothing that no scene says (checked where few enough exist)."""
    captions = shapes.all_captions()
    assert len(captions) == len(set(captions)) == 4 + 24 + 12 + 60 + 360
    assert {scene.caption for scene in EVERY_SCENE} <= set(captions)
    for category, count in {"single_object": 4, "colors": 24, "counting": 12, "two_object": 12, "position": 48}.items():
        drawn = {shapes.make_scene(0, index, category).caption for index in range(600)}
        assert len(drawn) == count
        assert drawn <= set(captions)


def test_vocabulary_is_the_words_of_the_captions():
    assert shapes.vocabulary() == sorted({word for caption in shapes.all_captions() for word in caption.split()})


def test_an_unknown_category_is_refused_by_name():
    with pytest.raises(ValueError, match="texture"):
        shapes.make_scene(0, 0, "texture")


def test_every_word_is_one_token(tokenizer):
    captions = shapes.all_captions()
    tokenized = tokenizer(captions).input_ids
    for caption, ids in zip(captions, tokenized, strict=True):
        assert len(ids) == len(caption.split())
        assert tokenizer.decode(ids) == caption
    assert len({tuple(ids) for ids in tokenized}) == len(captions)


def test_the_pipelines_template_is_as_long_as_the_pipeline_believes(pipeline):
    """Its first 34 tokens are dropped again: one more or less would cut the prompt or leave some template."""
    template = pipeline.prompt_template_encode
    prefix = template[: template.index("{}")]
    tokens = pipeline.tokenizer(prefix).input_ids
    assert len(tokens) == pipeline.prompt_template_encode_start_idx == 34
    whole = pipeline.tokenizer(template.format("two red circles")).input_ids
    assert whole[:34] == tokens
    assert pipeline.tokenizer.decode(whole[34:37]) == "two red circles"


def test_prompts_of_one_batch_do_not_depend_on_their_neighbours(family, pipeline):
    """The empty prompt included, which guidance needs."""
    prompts = ["a circle", "a red circle and a blue cross", ""]
    together = family.encode_prompts(pipeline, prompts)
    for prompt in prompts:
        embeddings, mask = (part[0] for part in family.encode_prompts(pipeline, [prompt])([prompt]).values())
        ours, ours_mask = (part[0] for part in together([prompt]).values())
        assert ours_mask.sum() == mask.sum() == len(prompt.split()) + 5
        torch.testing.assert_close(ours[ours_mask], embeddings[mask], rtol=0, atol=1e-5)


def test_captions_that_differ_are_embedded_differently(family, pipeline):
    """Order counts too: `a red circle and a blue cross` is not `a blue circle and a red cross`."""
    pairs = ["a red circle and a blue cross", "a blue circle and a red cross", "a cross left of a circle"]
    pairs.append("a circle left of a cross")
    embeddings, mask = family.encode_prompts(pipeline, pairs)(pairs).values()
    pooled = (embeddings * mask[..., None]).sum(dim=1)
    assert torch.pdist(pooled).min() > 0.1
