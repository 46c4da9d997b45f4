import itertools
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ppcl.artifacts.probes import Probes
from ppcl.config import MethodConfig
from ppcl.efficiency import LiveBytes
from ppcl.methods import lp
from ppcl.methods.base import Teacher
from ppcl.methods.lp import first_inflection
from ppcl.methods.lp_a import last_above
from ppcl.methods.lp_b import extend_ends
from ppcl.methods.probes import fit_probes
from ppcl.methods.registry import load_method
from ppcl.methods.surrogates import SurrogateCurves, blocks_with, delta
from ppcl.ops.cka import centre, cka
from ppcl.taps import observe


def find_intervals(curve, num_layers, config):
    return load_method(config).find_intervals(curve, num_layers)


def curve_of(rows):
    """A curve from `{u: [cka(u, u), cka(u, u + 1), ...]}`."""
    return lambda u, k: rows[u][k - u]


def random_curve(num_layers, seed):
    """Similarities that fall from 1 by random steps."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.rand(num_layers, num_layers, generator=generator) * 0.1
    return curve_of(
        {u: [1 - steps[u, 1 : n + 1].sum().item() for n in range(num_layers - u)] for u in range(num_layers)}
    )


# From block 3 the loss of similarity first grows at k = 5; from block 5 it first grows at k = 8.
PAPER_EXAMPLE = {
    3: [1.0, 0.98, 0.94, 0.93, 0.92, 0.91, 0.90],
    5: [1.0, 0.97, 0.95, 0.90, 0.89],
    8: [1.0, 0.99],
}


def test_delta_is_the_similarity_that_one_more_replacement_costs():
    curve = curve_of(PAPER_EXAMPLE)
    assert delta(curve, 3, 4) == pytest.approx(0.02)
    assert delta(curve, 3, 5) == pytest.approx(0.04)


def test_the_papers_walk_from_block_three():
    """k = 5 triggers for u = 3, so [3, 4]; the walk goes on at 5 and finds [5, 7]."""
    curve = curve_of(PAPER_EXAMPLE)
    assert first_inflection(curve, 3, 9) == 4
    assert first_inflection(curve, 5, 9) == 7
    assert find_intervals(curve, 10, MethodConfig(start=3)) == [(3, 4), (5, 7), (8, 9)]


def test_without_an_inflection_the_interval_ends_at_the_last_block():
    """Shrinking and equal losses both do not trigger: the rule is a strict inequality."""
    shrinking = [1.0, 0.9, 0.82, 0.76, 0.72]
    equal = [1.0, 0.75, 0.5, 0.25, 0.0]  # exact in binary, so the differences are equal
    for row in (shrinking, equal):
        assert first_inflection(curve_of({0: row}), 0, 4) == 4
        assert find_intervals(curve_of({0: row}), 5, MethodConfig()) == [(0, 4)]
        assert find_intervals(curve_of({0: row}), 5, MethodConfig(end=3)) == [(0, 3)]


@pytest.mark.parametrize("rule", ["lp", "lp_a", "lp_b"])
@pytest.mark.parametrize("seed", range(10))
def test_intervals_are_ordered_disjoint_in_range_and_never_a_single_block(rule, seed):
    method = MethodConfig(rule=rule, start=2, end=15, threshold=0.85)
    intervals = find_intervals(random_curve(18, seed), 18, method)
    assert intervals
    assert all(2 <= u < v <= 15 for u, v in intervals)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(intervals))


@pytest.mark.parametrize("seed", range(5))
def test_lp_leaves_no_gap_before_the_last_block(seed):
    """Eq. 5 alone ends an interval just before the next: only a final single block can stay over."""
    intervals = find_intervals(random_curve(18, seed), 18, MethodConfig(start=3))
    assert intervals[0][0] == 3
    assert all(before[1] + 1 == after[0] for before, after in itertools.pairwise(intervals))
    assert intervals[-1][1] >= 16


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("min_length", [3, 5])
def test_min_length_is_a_lower_bound(seed, min_length):
    intervals = find_intervals(random_curve(30, seed), 30, MethodConfig(min_length=min_length))
    assert intervals
    assert all(v - u + 1 >= min_length for u, v in intervals)


def test_min_length_looks_for_the_inflection_later():
    curve = curve_of({0: [1.0, 0.99, 0.95, 0.94, 0.90, 0.89]})
    assert first_inflection(curve, 0, 5, min_length=2) == 1
    assert first_inflection(curve, 0, 5, min_length=3) == 3


def test_min_cka_leaves_gaps_and_goes_on_one_block_later():
    """[0, 1] is refused at 0.5, the walk looks again from 1 and takes [1, 2]; [3, 4] is refused and leaves a gap."""
    curve = curve_of(
        {
            0: [1.0, 0.5, -0.5, -0.6, -0.7, -0.8, -0.9],
            1: [1.0, 0.95, 0.8, 0.7, 0.6, 0.5],
            2: [1.0, 0.4, -0.5, -0.6, -0.7],
            3: [1.0, 0.3, -0.6, -0.7],
            4: [1.0, 0.2, -0.7],
            5: [1.0, 0.93],
        }
    )
    assert find_intervals(curve, 7, MethodConfig(min_cka=0.9)) == [(1, 2), (5, 6)]
    assert find_intervals(curve, 7, MethodConfig(min_cka=0.94)) == [(1, 2)]
    assert find_intervals(curve, 7, MethodConfig(min_cka=0.96)) == []


def test_lp_a_ends_where_similarity_falls_below_the_threshold():
    curve = curve_of({0: [1.0, 0.99, 0.98, 0.97], 1: [1.0, 0.9, 0.8], 2: [1.0, 0.5], 3: [1.0]})
    assert last_above(curve, 0, 3, 0.98) == 2  # the threshold itself still passes
    assert last_above(curve, 0, 3, 0.5) == 3
    assert last_above(curve, 1, 3, 0.98) == 1
    assert find_intervals(curve, 4, MethodConfig(rule="lp_a", threshold=0.98)) == [(0, 2)]
    assert find_intervals(curve, 4, MethodConfig(rule="lp_a", threshold=0.995)) == []


@pytest.mark.parametrize(
    ("intervals", "last", "which", "expected"),
    [
        ([(0, 1), (4, 6)], 9, None, [(0, 2), (4, 7)]),  # room outside all intervals
        ([(0, 1), (4, 6)], 9, [1], [(0, 1), (4, 7)]),  # only those named
        ([(0, 1), (2, 4)], 9, [0], [(0, 2), (3, 4)]),  # the successor starts one later
        ([(0, 1), (2, 3)], 9, [0], [(0, 1), (2, 3)]),  # a successor of two blocks cannot shrink
        ([(0, 1), (2, 4)], 4, None, [(0, 2), (3, 4)]),  # nothing after the last block
        ([(0, 1), (2, 4), (5, 7)], 9, None, [(0, 2), (3, 5), (6, 8)]),  # each gives and takes
        ([(0, 3)], 3, None, [(0, 3)]),
    ],
)
def test_lp_b_extends_where_there_is_room(intervals, last, which, expected):
    assert extend_ends(intervals, last, which) == expected


def test_lp_b_is_lp_with_its_ends_moved():
    curve = curve_of(PAPER_EXAMPLE)
    assert find_intervals(curve, 10, MethodConfig(rule="lp_b", start=3)) == [(3, 5), (6, 7), (8, 9)]


def planted(runs):
    """Update sizes that are large where a run begins and shrink inside it."""
    return [size for length in runs for size in (0.8, *(0.4 * 0.7**step for step in range(length - 1)))]


def fitted_probes(family, transformer, batches, ridge):
    fits = list(fit_probes(family, transformer, batches, ridge=ridge, bias=True))
    weights, biases = {fit.key: fit.weight for fit in fits}, {fit.key: fit.bias for fit in fits}
    return Probes(Probes.header_for({}), weights, biases, {})


@pytest.mark.parametrize("tokens", [48, 200])  # by tokens, and by covariances
@pytest.mark.parametrize("size", [1.0, 3000.0])  # of single channels, in the others'
def test_float32_is_precise_enough(tokens, size):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dim, layers = 96, 12
    features = random(3, tokens, dim) @ random(dim, dim) / dim**0.5
    features[..., 5] *= size
    features[..., 60] *= size / 3
    weights = {f"blocks.{index}.image": 0.3 * random(dim, dim) / dim**0.5 for index in range(layers)}
    probes = Probes(Probes.header_for({}), weights, {}, {})
    rows = []
    for precision in (torch.float32, torch.float64):
        curves = SurrogateCurves(probes, {"blocks": layers}, debiased=False)
        curves.precision = precision
        curves.add("blocks", 0, [{"image": features}], [{"image": None}])
        rows.append(curves.mean("blocks", "image")[0])
    assert rows[1].min() < 0.999
    torch.testing.assert_close(*rows, rtol=0, atol=2e-6)


PLANTED_RUNS = [[4, 2, 3, 5, 3], [2, 2, 2, 6], [3, 7, 4], [5, 5, 2, 4]]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("runs", PLANTED_RUNS)
@pytest.mark.parametrize("debiased", [False, True])
def test_detection_recovers_the_runs_of_a_planted_teacher(make_linear_teacher, runs, seed, debiased):
    """Fit, simulation and walk together find the runs a linear teacher was built from, each block of them."""
    family, transformer, batches = make_linear_teacher(planted(runs), seed)
    probes = fitted_probes(family, transformer, batches, ridge=1e-9)
    teacher = Teacher(family, transformer, lambda: batches, lambda: probes)
    found = load_method(MethodConfig(debiased=debiased)).detect(teacher)
    starts = [sum(runs[:number]) for number in range(len(runs))]
    expected = [(start, start + length - 1) for start, length in zip(starts, runs, strict=True)]
    assert found.intervals == {"blocks": expected}
    table = found.curves["blocks"]["mean"]
    assert found.scores["cka"]["blocks"] == {f"{u}-{v}": table[u][v] for u, v in expected}
    assert table[2][1] is None
    assert table[2][2] == pytest.approx(1)


class ProbeBlock(nn.Module):
    """A transformer block replaced by its two probes."""

    def __init__(self, image, text):
        super().__init__()
        self.image, self.text = image, text

    def forward(self, *, hidden_states, encoder_hidden_states, **_):
        return tuple(x + x @ w.T + b for x, (w, b) in ((encoder_hidden_states, self.text), (hidden_states, self.image)))


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("size", [(4, 4), (9, 8)])  # fewer and more image tokens than the 64 features
@torch.no_grad()
def test_algebraic_similarity_equals_a_surrogate_forward(family, make_transformer, make_batch, size, debiased):
    """cka(u, k) without running any surrogate is what running blocks u + 1..k as probes gives."""
    count, lengths = 4, (70, 50, 66)
    transformer = make_transformer(count)
    batches = [make_batch(seed, lengths, size, padded_to=72) for seed in (0, 1)]
    probes = fitted_probes(family, transformer, batches, ridge=1e-2)

    def outputs(batch):
        found = {}
        observe(family, transformer, batch.inputs, lambda call: found.update({call.key: call.outputs}))
        return found

    curves = SurrogateCurves(probes, {"transformer_blocks": count}, debiased=debiased)
    real = [outputs(batch) for batch in batches]
    for key in real[0]:
        curves.add(*key, [found[key] for found in real], [family.masks(batch.inputs) for batch in batches])
    tables = {stream: curves.mean("transformer_blocks", stream) for stream in ("image", "text", "mean")}

    blocks = list(transformer.transformer_blocks)
    maps = {key: (weight, probes.biases[key]) for key, weight in probes.weights.items()}
    for u in range(count):
        for k in range(u, count):
            stand_ins = {
                i: ProbeBlock(*(maps[f"transformer_blocks.{i}.{stream}"] for stream in ("image", "text")))
                for i in range(u + 1, k + 1)
            }
            transformer.transformer_blocks = nn.ModuleList([stand_ins.get(i, blocks[i]) for i in range(count)])
            means = {}
            for stream in ("image", "text"):
                values = []
                for batch, found in zip(batches, real, strict=True):
                    surrogate = outputs(batch)["transformer_blocks", k][stream]
                    mask = family.masks(batch.inputs)[stream]
                    for sample in range(len(lengths)):
                        keep = slice(None) if mask is None else mask[sample]
                        x = centre(found["transformer_blocks", u][stream][sample][keep].double())
                        y = centre(surrogate[sample][keep].double())
                        values.append(cka(x, y, debiased=debiased).item())
                means[stream] = sum(values) / len(values)
                assert tables[stream][u, k].item() == pytest.approx(means[stream], abs=1e-6)
            assert tables["mean"][u, k].item() == pytest.approx((means["image"] + means["text"]) / 2, abs=1e-6)
    assert tables["image"].tril(-1).isnan().sum().item() == count * (count - 1) // 2
    assert tables["text"][0, count - 1].item() < 1 - 1e-4  # the surrogate does change something


@pytest.fixture
def calibrated(family, make_transformer, make_batch):
    """`calibrated(count)`: detect on `count` lazily made batches of two samples; returns the result and peak bytes."""
    transformer = make_transformer(4)
    probes = fitted_probes(family, transformer, [make_batch(seed, size=(9, 8)) for seed in range(3)], ridge=1e-2)

    def detect(count, **settings):
        made = []

        def calibration():
            for seed in range(count):
                made.append(weakref.ref(batch := make_batch(seed, (70, 50), (9, 8) if seed % 2 else (4, 8))))
                yield batch
                del batch
                assert sum(ref() is not None for ref in made) <= lp._MOST_SAMPLES / 2

        teacher = Teacher(family, transformer, calibration, lambda: probes)
        with LiveBytes() as recorder:
            found = load_method(MethodConfig(**settings)).detect(teacher)
        assert len(made) == count
        return found, recorder.peak

    return detect


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("limit", ["samples", "memory"])
def test_parts_of_the_calibration_give_what_it_gives_in_one_piece(calibrated, limit, debiased, monkeypatch):
    whole, _ = calibrated(7, debiased=debiased)
    if limit == "samples":
        monkeypatch.setattr(lp, "_MOST_SAMPLES", 4)
    else:
        monkeypatch.setattr(lp, "free_bytes", lambda device: 1)
    parts, _ = calibrated(7, debiased=debiased)
    assert parts.intervals == whole.intervals
    for stream, table in whole.curves["transformer_blocks"].items():
        found = np.array(parts.curves["transformer_blocks"][stream], dtype=float)
        np.testing.assert_allclose(found, np.array(table, dtype=float), rtol=0, atol=1e-7)


def test_more_calibration_needs_no_more_memory(calibrated, monkeypatch):
    monkeypatch.setattr(lp, "_MOST_SAMPLES", 8)
    (_, few), (_, many) = calibrated(4), calibrated(16)
    assert many < 1.2 * few
    monkeypatch.setattr(lp, "_MOST_SAMPLES", 32)
    assert calibrated(16)[1] > 2 * few


def test_a_chain_stops_where_its_stream_does_and_the_mean_goes_on():
    """Blocks 0 to 2 give text and image, block 3 image alone; another stack has text alone."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    keys = [*(f"blocks.{k}.image" for k in range(4)), *(f"blocks.{k}.text" for k in range(3)), "refiner.0.text"]
    weights = {key: 0.3 * normal(4, 4) for key in keys}
    curves = SurrogateCurves(Probes(Probes.header_for({}), weights, weights, {}), {"blocks": 4, "refiner": 1},
                             debiased=False)  # fmt: skip
    for k in range(4):
        streams = ("image", "text") if k < 3 else ("image",)
        curves.add("blocks", k, [{s: normal(2, 9, 4) for s in streams}], [{"image": None, "text": None}])
    curves.add("refiner", 0, [{"text": normal(2, 9, 4)}], [{"text": None}])
    text, image, mean = (curves.mean("blocks", stream) for stream in ("text", "image", "mean"))
    assert text[:, 3].isnan().all()
    assert text[3].isnan().all()
    assert not text[:3, :3].triu().isnan().any()
    assert torch.equal(mean[:, 3], image[:, 3])
    torch.testing.assert_close(mean[0, 1:3], (image[0, 1:3] + text[0, 1:3]) / 2)
    assert [blocks_with(table) for table in (text, image, mean)] == [range(3), range(4), range(4)]
    assert curves.streams("refiner") == ["text"]
    assert torch.equal(curves.mean("refiner", "image"), curves.mean("refiner", "text"))  # by what it has


@pytest.mark.parametrize("rule", ["lp", "lp_b"])
def test_the_last_blocks_that_stay_the_teachers_are_as_if_detection_ended_before(make_linear_teacher, rule):
    family, transformer, batches = make_linear_teacher([0.1] * 6)
    probes = fitted_probes(family, transformer, batches, ridge=1e-6)
    teacher = Teacher(family, transformer, lambda: batches, lambda: probes)

    def detected(**settings):
        return load_method(MethodConfig(rule=rule, min_cka=0, **settings)).detect(teacher).intervals

    assert detected()["blocks"][-1][1] == 5
    expected = detected(end=3)
    family.facts = replace(family.facts, last_blocks=2)
    assert detected() == expected
    assert expected["blocks"][-1][1] == 3
