"""Shards and tables: every sample that can be used comes once, and every other one with its reason."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from ppcl.config import DataConfig
from ppcl.data.sources import Sample, Skipped, find_units
from ppcl.errors import UsageError


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, format="PNG")
    return buffer.getvalue()


def shard(path: Path, files: dict[str | bytes, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8") as writer:
        for name, content in files.items():
            info = tarfile.TarInfo(name if isinstance(name, str) else name.decode(errors="surrogateescape"))
            info.size = len(content)
            writer.addfile(info, io.BytesIO(content))
    return path


def read(path: Path, kind: str = "webdataset", **settings: object) -> tuple[dict[str, str], dict[str, str]]:
    """Captions by key, and reasons by key."""
    config = DataConfig(name=kind, path=str(path), **{"captions": ["caption", "text"]} | settings)
    found = [item for unit in find_units(config) for item in unit.read(config)]
    samples = {item.key: item.caption for item in found if isinstance(item, Sample)}
    skipped = {item.key: item.why for item in found if isinstance(item, Skipped)}
    assert len(samples) + len(skipped) == len(found)
    return samples, skipped


def test_a_shard_has_captions_of_text_and_of_json(tmp_path: Path) -> None:
    files = {
        "a.png": png(), "a.txt": "\ufeffun café".encode(),
        "b.png": png(), "b.txt": "ein Hund".encode("utf-16"),
        "c.png": png(), "c.txt": "café".encode("cp1252"),
        "d.png": png(), "d.json": b'{"caption": ["a cat", "a pet"]}',
        "e.png": png(), "e.json": b"null", "e.txt": b"a cat",
        "f.png": png(), "f.json": b'{"caption": null}', "f.txt": b"a fox",
        "g.png": png(), "g.json": '{"caption": "café"}'.encode("cp1252"),
        "h.png": png(), "h.json": b"[" * 100_000,
        "i.png": png(), "i.json": b'{"caption": "a", "text_accuracy": "high"}',
        "j.png": png(), "j.json": b'{"caption": "a", "text_accuracy": NaN}',
        "k.png": png(), "k.json": b'{"caption": "a", "text_accuracy": 1' + b"0" * 400 + b"}",
        "l.TIFF": png(), "l.txt": b"a tiff",
        "m.5.png": png(), "m.txt": b"a dot",
        "n.png": png(), "n.jpg": png(),
    }  # fmt: skip
    samples, skipped = read(shard(tmp_path / "0.tar", files).parent, min_text_accuracy=0.5)
    assert samples == {"a": "un café", "b": "ein Hund", "d": "a cat", "f": "a fox", "l": "a tiff"}
    assert skipped == {
        "c": "its .txt is not UTF-8: save it with that encoding",
        "e": "its .json holds no object with named values",
        "g": "its .json is not UTF-8: save it with that encoding",
        "h": "its .json does not read as JSON",
        "i": "text_accuracy=high is not a number",
        "j": "text_accuracy=nan is not a number",
        "k": f"text_accuracy={10**400} is not a number",
        "m": "no picture: it has 5.png, txt",
        "n": "no caption in data.captions=[caption, text]; it has none",
    }


def test_names_that_are_not_utf8_and_names_that_occur_twice(tmp_path: Path) -> None:
    """A key is hashed and written, which half of a surrogate pair would end."""
    names = {b"caf\xe9.png": png(), b"caf\xe9.txt": b"coffee", "a.png": png(), "a.PNG": b"", "a.txt": b"a"}
    samples, skipped = read(shard(tmp_path / "0.tar", names).parent)
    assert samples == {"caf\\udce9": "coffee", "a": "a"}
    assert skipped == {"a.PNG": "its name occurs twice in the shard; the first file is taken"}


def test_a_damaged_shard_gives_the_samples_on_both_sides(tmp_path: Path) -> None:
    files = {f"{number}.{kind}": png() if kind == "png" else b"a" for number in range(4) for kind in ("png", "txt")}
    path = shard(tmp_path / "0.tar", files)
    with tarfile.open(path) as archive:
        at = archive.getmember("1.png").offset
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)
    samples, skipped = read(tmp_path)
    assert [*samples] == ["0", "2", "3"]
    assert skipped["1"] == "no picture: it has txt"
    assert "damaged at byte" in skipped["0.tar"]


def test_shards_of_one_name_are_units_of_their_own(tmp_path: Path) -> None:
    for number, folder in enumerate(("a", "b", "b%2F", "b/c")):
        shard(tmp_path / folder / "0.tar", {f"{number}.png": png(), f"{number}.txt": b"a"})
    shard(tmp_path / "b%2F0.tar", {"9.png": png(), "9.txt": b"a"})
    pattern = f"{tmp_path}/{{a,b,b%2F,b/c,a}}/0.tar::{tmp_path}/b%2F0.tar"
    names = [unit.name for unit in find_units(DataConfig(name="webdataset", path=pattern))]
    assert len(names) == len({*names}) == 5
    assert names[0] == "a%2F0.tar"
    samples, _ = read(Path(pattern))
    assert [*samples] == ["0", "1", "3", "2", "9"]
    (only,) = find_units(DataConfig(name="webdataset", path=str(tmp_path / "a")))
    assert only.name == "0.tar"


TABLES = {
    "excel": ("\ufefffile_name,text\n{0},a cat\n", "utf-8"),
    "utf-16 with tabs": ("file_name\ttext\r\n{0}\ta cat\r\n", "utf-16"),
    "semicolons": ('file_name;text\n{0};"a cat"\n', "utf-8"),
    "spaces": ('file_name, text\n{0}, "a cat"\n', "utf-8"),
    "old line ends": ("file_name,text\r{0},a cat\r", "utf-8"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables_as_spreadsheets_write_them(tmp_path: Path, kind: str) -> None:
    (tmp_path / "0.png").write_bytes(png())
    text, encoding = TABLES[kind]
    (tmp_path / "metadata.csv").write_bytes(text.format("0.png").encode(encoding))
    assert read(tmp_path, "folder") == ({"0.png": "a cat"}, {})


def test_a_row_that_cannot_be_used_is_listed(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png())
    lines = [b"image,caption", b"0.png,a cat, sitting", b"./0.png", b"1.png,a", b",a"]
    (tmp_path / "metadata.csv").write_bytes(b"\n".join([*lines, b'0.png,"a cat, sitting",']))
    samples, skipped = read(tmp_path, "folder")
    assert samples == {"0.png": "a cat, sitting"}
    assert skipped == {
        "line 2": "has more cells than there are columns: put text with ',' into double quotes",
        "./0.png": "no caption in data.captions=[caption, text]; it has image, caption",
        "1.png": "its file cannot be read: No such file or directory",
        "row 3": "no image, file_name or path: it has image, caption",
    }


def test_a_row_in_another_encoding_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png())
    (tmp_path / "metadata.csv").write_bytes(b"image,caption\n0.png,caf\xe9\ncaf\xe9.png,a\n")
    assert read(tmp_path, "folder") == (
        {},
        {
            "0.png": "its caption is not UTF-8: save it with that encoding",
            "caf\\udce9.png": "its file cannot be read: No such file or directory",
        },
    )


def test_a_quote_that_is_not_closed_takes_only_its_own_lines(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(png())
    lines = ['0.png,"a ""red"" circle"', '1.png,"Stop" sign', "2.png,a", '3.png,"a blue', "4.png,a", '5.png,"x"']
    (tmp_path / "metadata.csv").write_text("\n \nfile_name,text\n" + "\n".join([*lines, '0.png,"b']) + "\n")
    samples, skipped = read(tmp_path, "folder")
    assert samples == {"0.png": 'a "red" circle', "2.png": "a"}
    assert [*skipped] == ["line 5", "lines 7 to 9", "line 10"]
    assert all("a quote within quotes is written twice" in why for why in skipped.values())


def test_a_long_cell_is_a_caption(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png())
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n0.png,{'a' * 200_000}\n")
    (caption,) = read(tmp_path, "folder")[0].values()
    assert len(caption) == 200_000


@pytest.mark.parametrize("name", ["my[set]", "my*", "a?"])
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    for folder in (name, "myset", "ab", "my"):
        shard(tmp_path / folder / "0.tar", {f"{folder}.png": png(), f"{folder}.txt": b"a"})
    assert [*read(tmp_path / name)[0]] == [name]


def test_lines_of_json_that_do_not_read_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png())
    good = json.dumps({"image": "0.png", "caption": "line\u2028separator"}, ensure_ascii=False)
    lines = ["{", "null", "[1]", good, '{"image": "a\\u0000.png", "caption": "a"}']
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    samples, skipped = read(tmp_path, "folder")
    assert samples == {"0.png": "line\u2028separator"}
    assert {key: skipped[key] for key in skipped if key.startswith("line")} == dict.fromkeys(
        ["line 1", "line 3", "line 5"], "does not read as a JSON object"
    )
    assert skipped["a\0.png"] == "its file has a name that none has"


@pytest.mark.parametrize(
    ("name", "content"), [("metadata.jsonl", b"{\n["), ("metadata.csv", b""), ("metadata.csv", b"image,caption\n")]
)
def test_a_table_without_a_row_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match="holds no row with named columns that reads as"):
        read(tmp_path, "folder")


def class_folders(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "1.PNG").write_bytes(png())
    return root


def test_a_class_folder_gives_its_name_to_its_pictures(tmp_path: Path) -> None:
    class_folders(tmp_path, "cat", "sea lion", ".hidden")
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    (tmp_path / "cat" / "gone.jpg").symlink_to(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    samples, skipped = read(tmp_path, "folder")
    assert samples == {"cat/1.PNG": "cat", "sea lion/1.PNG": "sea lion"}
    assert skipped == {"cat/gone.jpg": "its file cannot be read: No such file or directory"}


def test_a_table_beside_class_folders_is_taken(tmp_path: Path) -> None:
    class_folders(tmp_path, "cat")
    (tmp_path / "metadata.csv").write_text("image,caption\ncat/1.PNG,a black cat\n")
    assert read(tmp_path, "folder")[0] == {"cat/1.PNG": "a black cat"}


def test_a_class_of_many_pictures_is_several_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppcl.data.sources.ROWS", 2)
    class_folders(tmp_path, "cat")
    for number in range(4):
        (tmp_path / "cat" / f"{number}.jpeg").write_bytes(png())
    units = find_units(DataConfig(name="folder", path=str(tmp_path)))
    assert [(unit.name, unit.size, unit.count()) for unit in units] == [
        ("cat-0", 5, 2),
        ("cat-2", 5, 2),
        ("cat-4", 5, 1),
    ]


@pytest.mark.parametrize("settings", [{}, {"given": ["before"]}])
def test_a_folder_without_table_and_classes_is_refused(tmp_path: Path, settings: dict) -> None:
    class_folders(tmp_path, *(["cat"] if settings else []))
    (tmp_path / "1.png").write_bytes(png())
    with pytest.raises(UsageError, match="or put the pictures of each class into a folder with its name"):
        read(tmp_path, "folder", **settings)
