"""Calls are stored as they are nested, joined along the dimension that two samples show, and spread over all steps."""

import inspect
import json

import pytest
import torch
from safetensors.torch import save_file

from ppcl.data.recording.nested import NoAxesError, axes_of, copied, digest, joined, packed, signature, unpacked
from ppcl.data.recording.recorder import spread
from ppcl.data.recording.table import check_rows, loaded, read_rows
from ppcl.errors import UsageError

NESTED = {
    "x": [torch.ones(2, 3), torch.zeros(1, 3)],
    "shapes": [[(1, 8, 8)]],
    "scale": 0.5,
    "flag": True,
    "nothing": None,
    "kwargs": {"mode": "plain", "ids": torch.arange(4)},
}


def call_of(rows: int, seed: int = 0) -> dict:
    """A call for so many samples, with a tensor and a list of rows, a tensor that all share, and one along axis 1."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden": torch.randn(rows, 4, 3, generator=generator),
        "frames": torch.randn(4, rows, 2, generator=generator),
        "shapes": [[(1, 2, 2)]] * rows,
        "parts": [torch.randn(2, 3, generator=generator) for _ in range(rows)],
        "ids": torch.arange(4),
        "scale": 1.5,
    }


def test_nested_values_are_stored_and_read_alike():
    tensors = {}

    def keep(tensor):
        name = digest(tensor)
        tensors[name] = tensor
        return name

    stored = json.loads(json.dumps(packed(NESTED, keep, "arguments")))
    found = unpacked(stored, tensors.__getitem__)
    assert len(tensors) == 3
    assert found["shapes"] == [[(1, 8, 8)]]
    assert [found[key] for key in ("scale", "flag", "nothing")] == [0.5, True, None]
    assert all(torch.equal(a, b) for a, b in zip(found["x"], NESTED["x"], strict=True))
    assert torch.equal(found["kwargs"]["ids"], torch.arange(4))


def test_equal_tensors_have_one_name_and_others_another():
    one = torch.ones(2, 3)
    assert digest(one) == digest(one.clone())
    assert len({digest(each) for each in (one, one.reshape(3, 2), one.bfloat16(), one * 2)}) == 4


def test_what_cannot_be_stored_is_named():
    with pytest.raises(UsageError, match=r"arguments\.mode is a slice"):
        packed({"mode": slice(1)}, digest, "arguments")


def test_copies_do_not_change_with_what_they_are_copies_of():
    value = {"x": torch.zeros(2)}
    kept = copied(value)
    value["x"] += 1
    assert kept["x"].tolist() == [0, 0]


def test_two_samples_show_the_axes_of_a_call():
    axes = axes_of(call_of(1), call_of(2), "a")
    assert axes == {"a.hidden": 0, "a.frames": 1, "a.shapes": 0, "a.parts": 0, "a.ids": None, "a.scale": None}


def test_joined_calls_are_those_of_all_rows():
    calls = [call_of(1, seed) for seed in range(3)]
    found = joined(calls, axes_of(call_of(1), call_of(2), "a"), "a")
    assert torch.equal(found["hidden"], torch.cat([call["hidden"] for call in calls]))
    assert torch.equal(found["frames"], torch.cat([call["frames"] for call in calls], dim=1))
    assert len(found["parts"]) == len(found["shapes"]) == 3
    assert torch.equal(found["ids"], torch.arange(4))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"lengths": torch.arange(2)}, {"lengths": torch.arange(3)}),
        ({"longest": 7}, {"longest": 14}),
        ({"x": torch.ones(1, 1)}, {"x": torch.ones(2, 2)}),
        ({"x": None}, {"x": torch.ones(1)}),
    ],
)
def test_what_changes_otherwise_is_not_joined(one, two):
    with pytest.raises(NoAxesError, match=r"a\.(lengths|longest|x)"):
        axes_of(one, two, "a")


def test_only_calls_of_one_shape_with_equal_shared_values_are_alike():
    axes = axes_of(call_of(1), call_of(2), "a")

    def alike(call):
        shapes = {}

        def keep(tensor):
            shapes[digest(tensor)] = list(tensor.shape)
            return digest(tensor)

        return signature(packed(call, keep, "a"), axes, shapes, "a")

    first = call_of(1)
    assert alike(first) == alike(call_of(1, 1))
    for other in ({"ids": torch.arange(4) + 1}, {"scale": 2.0}, {"hidden": torch.ones(1, 5, 3)}):
        assert alike(first) != alike(first | other)


@pytest.mark.parametrize(("count", "steps"), [(1, 10), (3, 10), (4, 4), (8, 5), (7, 50)])
def test_recorded_steps_are_spread_and_cover_all(count, steps):
    each = [spread(count, steps, number) for number in range(60)]
    assert all(len(found) == min(count, steps) for found in each)
    assert set().union(*each) == set(range(steps))
    gaps = [b - a for found in each for a, b in zip(sorted(found), sorted(found)[1:], strict=False)]
    assert all(abs(gap - steps / min(count, steps)) < 1 for gap in gaps)


# Tables


def draws(self, prompt: str, scale: float = 1.0, image: "PIL.Image.Image" = None, prompt_embeds: "Tensor" = None):
    """The call of a pipeline."""


def test_blank_lines_are_left_out_and_lines_keep_their_numbers(tmp_path):
    (tmp_path / "p.txt").write_text("a circle\n\n  \na square\n")
    rows = read_rows(tmp_path / "p.txt")
    assert [(row.line, row.caption) for row in rows] == [(1, "a circle"), (4, "a square")]
    check_rows(rows, draws, given=False)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("not json", "line 2 is no JSON object"),
        ("[1]", "line 2 is no JSON object"),
        ('{"prompt": "a", "sclae": 2}', "line 2: sclae is no argument of the pipeline"),
        ('{"prompt": "a", "generator": 2}', "line 2: generator is set by the recording"),
        ('{"prompt": "a", "image": "none.png"}', "line 2: image=none.png cannot be read"),
        ('{"prompt": "a", "image": "bad.png"}', r"line 2: the picture image=bad.png"),
        ('{"prompt_embeds": "none.safetensors"}', "line 2: prompt_embeds=.*none.safetensors does not exist"),
        ('{"prompt_embeds": "cut.safetensors"}', "line 2: prompt_embeds=.*does not read as safetensors"),
        ('{"prompt": ["a", "b"]}', "line 2: prompt is a list of 2: write a row for each"),
        ('{"prompt": 3}', "line 2: prompt is 3: write a text, in quotes"),
        ('{"prompt": null}', "line 2: prompt is null: give a value, or leave it out"),
        ('{"prompt": "a", "scale": null}', "line 2: scale is null: give a value, or leave it out"),
        ('{"prompt": "a", "image": 7}', "line 2: image is 7: write the name of a picture"),
        ('{"prompt": "a", "image": [{"a": 1}]}', "line 2: image is .*write the name of a picture"),
        ('{"prompt_embeds": "two.safetensors"}', "line 2: prompt_embeds=.*several tensors"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, line, said):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "cut.safetensors").write_bytes(b"no tensors")
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "two.safetensors")
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "a circle"}}\n{line}\n')
    with pytest.raises(UsageError, match=said):
        check_rows(read_rows(path), draws, given=False)


def test_null_and_a_list_of_one_are_taken_where_the_pipeline_takes_them(tmp_path):
    save_file({"any": torch.ones(2)}, tmp_path / "e.safetensors")
    rows = [{"prompt": ["a"]}, {"prompt": "a", "image": None}, {"prompt": None, "prompt_embeds": "e.safetensors"}]
    (tmp_path / "p.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    check_rows(read_rows(tmp_path / "p.jsonl"), draws, given=False)


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("p.txt", "a circle", "line 2 has no image, which the pipeline needs: name a .jsonl as data.path"),
        ("p.jsonl", '{"prompt": "a circle"}', 'line 2 has no image, which the pipeline needs: add "image"'),
        ("p.JSONL", '{"prompt": "a circle"}', 'line 2 has no image, which the pipeline needs: add "image"'),
    ],
)
def test_a_row_without_a_picture_that_the_pipeline_needs_is_named(tmp_path, name, line, said):
    def needs_image(self, image: "PIL.Image.Image", prompt: str = "") -> None:
        """The call of a pipeline that makes a video of a picture."""

    (tmp_path / name).write_text(f"\n{line}\n")
    with pytest.raises(UsageError, match=said):
        check_rows(read_rows(tmp_path / name), needs_image, given=False)


def test_files_beside_a_table_are_opened_and_count_for_its_identity(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt_embeds": "e.safetensors", "scale": 2.0}\n')
    save_file({"any": torch.ones(2)}, tmp_path / "e.safetensors")
    (row,) = read_rows(path)
    parameters = inspect.signature(draws).parameters
    assert torch.equal(loaded(row, parameters)["prompt_embeds"], torch.ones(2))
    before = row.identity
    save_file({"any": torch.zeros(2)}, tmp_path / "e.safetensors")
    assert row.identity != before


def test_a_file_without_prompts_or_that_is_missing_is_refused(tmp_path):
    (tmp_path / "p.txt").write_text("\n \n")
    with pytest.raises(UsageError, match="holds no prompt"):
        read_rows(tmp_path / "p.txt")
    with pytest.raises(UsageError, match=r"data\.path=.*does not exist"):
        read_rows(tmp_path / "none.txt")
