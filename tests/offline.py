"""Reads back the files of an offline W&B run, without W&B: `python -m tests.offline runs/demo` lists what they hold."""

from __future__ import annotations

import json
import struct
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK = 32768


@dataclass
class Offline:
    """What one or more `.wandb` files hold.

    `config`: the configuration, as nested keys. `logged`: the number of values of every logged key.
    `kinds`: the type of every key that is no number, such as `table-file`. `summary`: the last values by key.
    `artifacts`: name, and then digest to metadata, of every version; `versions` has the type and the files of each.
    """

    config: dict[str, Any] = field(default_factory=dict)
    logged: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    exits: list[int] = field(default_factory=list)


def _stored(path: Path) -> Iterator[bytes]:
    """Yield the records of a `.wandb` file, a LevelDB log: blocks of pieces with checksum, length and kind ahead."""
    data, position, whole = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield whole
            whole = b""


def read_offline(folder: Path) -> Offline:
    """Return what the offline W&B runs in a run's folder hold."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = Offline()
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in _stored(path):
            record = Record()
            record.ParseFromString(data)
            _take(found, record)
    return found


def _take(found: Offline, record: Any) -> None:
    kind = record.WhichOneof("record_type")
    if kind in ("config", "run"):
        for item in (record.config if kind == "config" else record.run.config).update:
            if item.key:
                found.config[item.key] = json.loads(item.value_json)
    if kind == "run":
        found.names.append(record.run.display_name)
        found.groups.append(record.run.run_group)
    elif kind == "history":
        values = {(item.key,) if item.key else tuple(item.nested_key): item for item in record.history.item}
        for path, item in values.items():
            if len(path) == 1:
                found.logged[path[0]] = found.logged.get(path[0], 0) + 1
            elif path[-1] == "_type":
                found.logged[path[0]] = found.logged.get(path[0], 0) + 1
                found.kinds[path[0]] = json.loads(item.value_json)
    elif kind == "summary":
        for item in record.summary.update:
            found.summary[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    elif kind == "artifact" and record.artifact.type != "run_table":
        metadata = json.loads(record.artifact.metadata)
        found.artifacts.setdefault(record.artifact.name, {})[metadata["digest"]] = metadata | {
            "type": record.artifact.type
        }
        found.files[record.artifact.name] = [item.ref or item.path for item in record.artifact.manifest.contents]
    elif kind == "exit":
        found.exits.append(record.exit.exit_code)


def main(folder: Path) -> None:
    """Print the keys, tables, pictures and artifacts with their lineage."""
    found = read_offline(folder)
    numbers = [key for key in found.logged if key not in found.kinds and not key.startswith("_")]
    files = list(folder.glob("wandb/offline-run-*/*.wandb"))
    print(f"{len(files)} files of the W&B runs {', '.join(sorted({path.stem for path in files}))}")
    print(f"{len(numbers)} numbers")
    for stage in dict.fromkeys(key.partition("/")[0] for key in numbers):
        keys = sorted(key.removeprefix(f"{stage}/") for key in numbers if key.partition("/")[0] == stage)
        parts = sorted({key.rpartition("/")[0] for key in keys if "/" in key})
        told = [key for key in keys if "/" not in key]
        told += [f"and of {len(parts)} parts: "] * bool(parts)
        told += sorted({key.rpartition("/")[2] for key in keys if "/" in key})
        text = f"{stage}: {', '.join(told)}".replace(": , ", ": ")
        print(textwrap.fill(text, 110, initial_indent="  ", subsequent_indent="      "))
    for kind in dict.fromkeys(found.kinds.values()):
        print(f"{kind}: {', '.join(key for key, value in found.kinds.items() if value == kind)}")
    for name, versions in found.artifacts.items():
        for digest, metadata in versions.items():
            inputs = ", ".join(f"{each['name']}:{each['digest']}" for each in metadata["made_from"]) or "no artifact"
            print(f"artifact {metadata['type']} {name}:{digest}, made from {inputs}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
