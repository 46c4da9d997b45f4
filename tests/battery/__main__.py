"""Run the battery and print its figures: python -m tests.battery [--only PART ..] [--folder FOLDER]"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.battery import chain, damage, hostile, keys, kills, pairs

Part = Callable[[chain.Chain, Path], tuple[Counter[str], list[str]]]
PARTS: dict[str, Part] = {
    "keys": keys.run,
    "hostile": hostile.run,
    "kills": kills.run,
    "pairs": pairs.run,
    "damage": damage.run,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--folder", type=Path, help="where the trials are made; by default a temporary folder")
    chosen = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory(prefix="ppcl-battery-") as temporary:
        folder = chosen.folder or Path(temporary)
        (folder / "chain").mkdir(parents=True)
        made = chain.build(folder / "chain")
        for name in chosen.only:
            start = time.perf_counter()
            figures, faults = PARTS[name](made, folder / name)
            said = ", ".join(f"{count} {what}" for what, count in figures.items())
            print(f"{name}: {said}; {time.perf_counter() - start:.0f} s", *faults, sep="\n  ", flush=True)
            failed = failed or bool(faults)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
