"""Figure 5: the CKA of every two blocks' outputs, by stream, with and without the channels of most variance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from experiments.common import SEEDS, make_run, write_csv
from ppcl.methods.similarity import similarity_maps
from ppcl.report import plots

HERE = Path(__file__).parent

TOP_CHANNELS = 2  # of 64; very large activations would be in these


def main() -> None:
    rows = []
    maps: dict[str, list[np.ndarray]] = {}
    for seed in SEEDS:
        run = make_run(
            f"figure5/{seed}", "trainer=cpu", f"data.calibration_seed={seed}", "model.path=embedded:tiny_qwen_image"
        )
        stream = run.data.stream(seed, 16)
        for top in (0, TOP_CHANNELS):
            tables: dict[str, list[torch.Tensor]] = {}
            for batch in stream.calibration(16, 8):
                found = similarity_maps(run.family, run.teacher.pipeline.transformer, batch, top_channels=top)
                for name, table in found.items():
                    tables.setdefault(name, []).append(torch.tensor(table))
            for name, parts in tables.items():
                label = f"{name} stream" + (f" without {top} channels" if top else "")
                mean = torch.stack(parts).mean(dim=0).numpy()
                maps.setdefault(label, []).append(mean)
                for (a, b), value in np.ndenumerate(mean):
                    rows.append(
                        {"seed": seed, "stream": name, "top_channels_removed": top, "a": a, "b": b, "cka": float(value)}
                    )
    write_csv(HERE / "results.csv", rows)
    plots.similarity_maps(HERE / "figure5.png", {name: np.mean(parts, axis=0).tolist() for name, parts in maps.items()})
    for name, parts in maps.items():
        neighbours = [np.diagonal(part, 1).mean() for part in parts]
        print(f"{name}: neighbouring blocks' CKA {np.mean(neighbours):.4f} +- {np.std(neighbours, ddof=1):.4f}")


if __name__ == "__main__":
    main()
