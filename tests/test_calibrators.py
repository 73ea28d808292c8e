"""One battery for every method and every accumulator, and the methods against slow, plain oracles."""
from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import ptqlit.statistics
from ptqlit.arithmetic.affine import INT8, UINT8, NumberFormat, choose_affine, dequantize, quantize
from ptqlit.calibrators.kl import COMB_VALUES, FEW_VALUES, LEVELS, divergences, is_comb, kl, magnitudes, plain_divergences
from ptqlit.calibrators.max_min import CALIBRATORS, Options, find_calibrator
from ptqlit.calibrators.mse import best_ends, expected_error, sides
from ptqlit.config.file import Config
from ptqlit.config.full import FullQuantParam
from ptqlit.errors import InputError
from ptqlit.model.graph import prepare
from ptqlit.pipeline import METHODS
from ptqlit.samples.image import image_samples
from ptqlit.statistics.histogram import Counts, count_numba, count_numpy, value_at
from ptqlit.statistics.observe import TensorStatistics, observe

DIGITS = Path(__file__).resolve().parents[1] / "data" / "digits"
FORMATS = {"uint8": UINT8, "int8": INT8, "asymmetric int8": NumberFormat(8, True), "uint4": NumberFormat(4)}
RANDOM = np.random.default_rng(0)

CASES = {
    "nothing": [],
    "only NaN": [np.nan, np.nan],
    "only infinite": [np.inf, -np.inf],
    "one element": [3.5],
    "one negative element": [-3.5],
    "all zero": [0.0] * 20_000,
    "negative zeros": [-0.0] * 5,
    "constant": [7.25] * 20_000,
    "negative constant": [-1e-3] * 300,
    "two values": [0.0, 1.0] * 12_000,
    "denormal": [1e-45, -3e-42, 1e-40],
    "one denormal": [1e-45],
    "huge": [3.4e38, -3.4e38, 1.0],
    "huge and denormal": [3.4e38, 1e-45],
    "NaN among numbers": [1.0, np.nan, -2.0, np.inf, 0.5],
    "normal": RANDOM.normal(size=30_000),
    "Relu": np.maximum(RANDOM.normal(size=30_000), 0),
    "all positive": RANDOM.uniform(9, 10, 30_000),
    "all negative": -RANDOM.uniform(9, 10, 30_000),
    "long tails": RANDOM.standard_cauchy(30_000),
    "power of two": [0.5, -0.5, 0.25] * 10,
    "clipped at six": np.clip(RANDOM.normal(size=30_000) * 4, 0, 6),
}


def arrays(case: str) -> list[np.ndarray]:
    """The values of a case, as samples of one tensor."""
    return np.array_split(np.asarray(CASES[case], np.float32), 3)


def seen(*samples: np.ndarray) -> TensorStatistics:
    """Statistics of a few samples."""
    statistics = TensorStatistics()
    for sample in samples:
        statistics.update(np.asarray(sample, np.float32))
    return statistics


# ---------------------------------------------------------------- every registered method

def test_words_of_the_configuration_and_methods_are_the_same_set():
    assert set(FullQuantParam.kind("activation_quant_method").words) == set(CALIBRATORS)
    assert set(METHODS) == set(CALIBRATORS.values())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("word", sorted(CALIBRATORS))
def test_usable_range(word, case):
    statistics = seen(*arrays(case))
    for name, fmt in FORMATS.items():
        chosen = find_calibrator(word)(statistics, fmt, Options())
        assert math.isfinite(chosen.lo) and math.isfinite(chosen.hi) and chosen.lo <= chosen.hi, name
        affine = choose_affine(chosen.lo, chosen.hi, fmt)
        assert np.isfinite(affine.scale) and affine.scale > 0, name
        assert fmt.qmin <= affine.zero_point <= fmt.qmax
        assert dequantize(quantize(np.zeros(1, np.float32), affine, fmt), affine)[0] == 0


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("word", sorted(CALIBRATORS))
def test_never_beyond_what_was_seen(word, case):
    statistics = seen(*arrays(case))
    counts, chosen = statistics.counts, find_calibrator(word)(statistics, UINT8)
    if counts.total:
        assert min(counts.lo, 0) <= chosen.lo and chosen.hi <= max(counts.hi, 0)
    else:
        assert (chosen.lo, chosen.hi, chosen.reason) == (0, 0, "no finite value was seen")


@pytest.mark.parametrize("word", sorted(CALIBRATORS))
def test_pure_and_without_order(word):
    samples = [RANDOM.standard_t(3, size).astype(np.float32) * 3 for size in (11_000, 500, 40_000)]
    one, other = seen(*samples), seen(samples[2])
    other.merge(seen(samples[1], samples[0]))
    method = find_calibrator(word)
    bins = one.counts.bins.copy()
    first, again, shuffled = method(one, UINT8), method(one, UINT8), method(other, UINT8)
    assert (first.lo, first.hi) == (again.lo, again.hi) == (shuffled.lo, shuffled.hi)
    assert np.array_equal(one.counts.bins, bins)


@pytest.mark.parametrize("word", sorted(CALIBRATORS))
def test_scaling_the_values_by_a_power_of_two_scales_the_range(word):
    x = np.concatenate([RANDOM.normal(size=20_000), [9.0, -14.0]])
    small, large = find_calibrator(word)(seen(x), UINT8), find_calibrator(word)(seen(x * 1024), UINT8)
    assert np.allclose([small.lo * 1024, small.hi * 1024], [large.lo, large.hi], rtol=1e-6)


def test_unknown_word():
    with pytest.raises(InputError, match='Nearest: "PERCENTILE"'):
        find_calibrator("PERCENTIL")


# ---------------------------------------------------------------- every accumulator

def accumulators() -> dict[str, type]:
    """Classes of the statistics room with update and merge."""
    found = {}
    for info in pkgutil.iter_modules(ptqlit.statistics.__path__, "ptqlit.statistics."):
        module = importlib.import_module(info.name)
        for name, kind in inspect.getmembers(module, inspect.isclass):
            if kind.__module__ == info.name and hasattr(kind, "update") and hasattr(kind, "merge"):
                found[name] = kind
    return found


def state(value):
    """Everything an accumulator knows, as plain tuples and bytes."""
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, dict):
        return tuple((key, state(item)) for key, item in sorted(value.items()))
    return state(vars(value)) if hasattr(value, "__dict__") else value


def channels(x: np.ndarray) -> np.ndarray:
    """Two channels of the values."""
    return np.stack([x, x[::-1]])[None]


HOW_TO_MAKE = {
    "Histogram": (lambda kind: kind(), lambda x: x),
    "ChannelMeans": (lambda kind: kind(1), channels),
    "ExactSum": (lambda kind: kind(1), lambda x: np.nan_to_num(x.astype(np.float64)).sum(keepdims=True)),
    "TensorStatistics": (lambda kind: kind(), lambda x: x),
    "Statistics": (lambda kind: kind({"t": TensorStatistics()}), lambda x: {"t": x}),
}


def filled(name: str, samples: list[np.ndarray]):
    """An accumulator that has seen some samples."""
    make, shape = HOW_TO_MAKE[name]
    accumulator = make(accumulators()[name])
    for sample in samples:
        accumulator.update(shape(sample))
    return accumulator


def test_every_accumulator_is_in_the_battery():
    assert set(accumulators()) == set(HOW_TO_MAKE)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", sorted(HOW_TO_MAKE))
def test_order_and_merge_tree_do_not_matter(name, case):
    a, b, c = arrays(case)
    whole = state(filled(name, [a, b, c]))
    assert state(filled(name, [c, a, b])) == whole
    left, right = filled(name, [b]), filled(name, [c, a])
    left.merge(right)
    assert state(left) == whole


@pytest.mark.parametrize("case", CASES)
def test_kernel_and_plain_numpy_count_alike(case):
    for x in [*arrays(case), np.asarray(CASES[case], np.float32)]:
        ours, plain = count_numba(x), count_numpy(x)
        assert state(ours.bins) == state(plain.bins)
        assert [ours.k, ours.lo, ours.hi, ours.zeros, ours.nans] == [plain.k, plain.lo, plain.hi, plain.zeros, plain.nans]


@pytest.mark.parametrize("case", [case for case in CASES if np.isfinite(CASES[case]).any()])
def test_values_in_order(case):
    x = np.asarray(CASES[case], np.float32)
    ordered, counts = np.sort(x[np.isfinite(x)]), count_numba(x)
    for place in {0, len(ordered) // 3, len(ordered) // 2, len(ordered) - 1}:
        below, above = value_at(counts, place), value_at(counts, place, upper=True)
        assert below <= ordered[place] <= above and above - below <= 2.0 ** (counts.k - 12)
    assert (value_at(counts, 0), value_at(counts, len(ordered) - 1, True)) == (ordered[0], ordered[-1])


# ---------------------------------------------------------------- against oracles

@pytest.fixture(scope="module")
def digits() -> dict[str, TensorStatistics]:
    """Statistics of the shipped model."""
    graph, config = prepare(DIGITS / "model.onnx"), Config.from_file(DIGITS / "full_quant.cfg")
    return observe(graph, islice(image_samples(config, graph), 30)).tensors


def random_values(seed: int) -> np.ndarray:
    """Values of a random shape."""
    random = np.random.default_rng(seed)
    size = int(10 ** random.uniform(1, 5.3))
    kinds = [
        lambda: random.normal(random.normal() * 2, 1, size),
        lambda: random.standard_t(random.uniform(1, 8), size),
        lambda: np.maximum(random.laplace(size=size), 0),
        lambda: random.uniform(-1, random.uniform(0, 3), size),
        lambda: random.integers(-random.integers(1, 200), random.integers(2, 200), size) / 7,
        lambda: np.append(random.normal(size=size), random.normal(size=5) * 50),
        lambda: np.clip(random.normal(size=size) * 4, 0, 6),
        lambda: random.lognormal(0, random.uniform(0.2, 3), size),
    ]
    return kinds[seed % len(kinds)]().astype(np.float32)


def test_kl_against_the_plain_loop(digits):
    found = [t.counts for t in digits.values()] + [count_numba(random_values(s)) for s in range(200)]
    found = [c for c in found if c.lo < c.hi]
    assert len(found) >= 200
    for counts in found:
        content = magnitudes(counts)
        fast, plain = divergences(content), plain_divergences(content)
        assert np.abs(fast - plain).max() < 1e-9
        assert plain[fast.argmin()] <= plain.min() + 1e-9


def test_kl_on_exact_histograms():
    u = (np.arange(20_000) + 0.5) / 20_000
    laplace = np.where(u < 0.5, np.log(2 * u), -np.log(2 * (1 - u)))
    for x, kept, limit, divergence in ((laplace, 1649, 7.976466, 0.0207151), (2 * u - 1, 2047, 0.9997059, None)):
        interval = np.abs(x).max() / 2048
        content = np.bincount(np.minimum((np.abs(x) / interval).astype(int), 2047), minlength=2048)
        scores = divergences(content.astype(float))
        assert LEVELS + scores.argmin() == kept
        assert abs((kept + 0.5) * interval - limit) < 1e-6
        assert divergence is None or abs(scores.min() - divergence) < 1e-7


def test_kl_ranges():
    x = RANDOM.laplace(size=50_000)
    symmetric, clipped = kl(seen(x), INT8), kl(seen(x), UINT8)
    assert symmetric.lo == -symmetric.hi
    assert (clipped.lo, clipped.hi) == (-symmetric.hi, symmetric.hi)
    assert kl(seen(np.abs(x)), UINT8).lo >= 0
    assert kl(seen(np.maximum(x, -0.5)), UINT8).lo == -0.5


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_combs_keep_their_range(levels):
    x = (RANDOM.integers(0, levels, COMB_VALUES + 1) * (255 // (levels - 1)) - 127.5) / 127.5
    chosen = kl(seen(x), UINT8)
    assert is_comb(seen(x).counts) and "comb" in chosen.reason
    assert (chosen.lo, chosen.hi) == (np.float32(x.min()), np.float32(x.max()))
    assert not is_comb(seen(x[:COMB_VALUES]).counts)


@pytest.mark.parametrize("zeros", [0, 30_000])
def test_few_values_keep_their_range(zeros):
    x = np.append(np.random.default_rng(5).laplace(size=FEW_VALUES), np.zeros(zeros))
    few, enough = kl(seen(x[1:]), UINT8), kl(seen(x), UINT8)
    assert f"{FEW_VALUES - 1} values" in few.reason and enough.reason == ""
    assert (few.lo, few.hi) == (np.float32(x[1:].min()), np.float32(x[1:].max()))
    assert enough.hi < np.float32(x.max())


def test_no_combs_among_ordinary_tensors(digits):
    outliers = np.append(RANDOM.normal(size=20_000), [1000, -3000])
    assert not is_comb(seen(outliers).counts) and kl(seen(outliers), UINT8).hi < 1000
    assert not any(is_comb(t.counts) for t in digits.values())


def edge_pairs(counts: Counts, random, ends: tuple[float, float]) -> list[tuple[float, float]]:
    """10,000 pairs of bin edges, half of them close to `ends`."""
    negative, positive = sides(counts)
    near = np.searchsorted(negative.edges, -ends[0]), np.searchsorted(positive.edges, ends[1])
    places = np.concatenate([random.integers(0, 4097, (5000, 2)), near + random.integers(-30, 31, (5000, 2))])
    pairs = {(-negative.edges[a], positive.edges[b]) for a, b in np.clip(places, 0, 4096)}
    return [(lo, hi) for lo, hi in pairs if lo < hi]


@pytest.mark.parametrize("seed", [0, 1, 2, 5, 7])
def test_mse_against_ten_thousand_pairs(seed):
    counts, random = count_numba(random_values(seed)), np.random.default_rng(seed)
    ends = best_ends(counts, UINT8)
    ours = expected_error(counts, *ends, UINT8)
    best = min(expected_error(counts, lo, hi, UINT8) for lo, hi in edge_pairs(counts, random, ends))
    assert ours <= best * 1.001 + 1e-30


def test_mse_on_real_tensors(digits):
    for name, tensor in digits.items():
        ours = expected_error(tensor.counts, *best_ends(tensor.counts, UINT8), UINT8)
        pairs = edge_pairs(tensor.counts, RANDOM, best_ends(tensor.counts, UINT8))[::40]
        assert ours <= min(expected_error(tensor.counts, lo, hi, UINT8) for lo, hi in pairs) * 1.001, name


@pytest.mark.parametrize("seed", range(8))
def test_mse_symmetric(seed):
    counts = count_numba(random_values(seed))
    lo, hi = best_ends(counts, INT8)
    limits = np.linspace(0.01, 1, 300) * max(-counts.lo, counts.hi)
    edges = np.round(limits / 2.0 ** (counts.k - 12)) * 2.0 ** (counts.k - 12)
    best = min(expected_error(counts, -limit, limit, INT8) for limit in edges if limit > 0)
    assert lo == -hi and expected_error(counts, lo, hi, INT8) <= best * 1.001


def test_removal_outlier_against_sorting():
    for seed in range(20):
        samples = [random_values(8 * seed + shape) for shape in (0, 1, 2, 7)]
        statistics = seen(*samples)
        ends = []
        for x in map(np.sort, samples):
            places = (min(int(part * np.float32(x.size)), x.size - 1) for part in (np.float32(1e-4), np.float32(0.9999)))
            ends.append([x[place] for place in places])
        lo, hi = np.mean(ends, axis=0, dtype=np.float64)
        chosen, width = find_calibrator("REMOVAL_OUTLIER")(statistics, UINT8), 2.0 ** (statistics.counts.k - 12)
        assert lo - width <= chosen.lo <= lo + 1e-9 and hi - 1e-9 <= chosen.hi <= hi + width


@pytest.mark.parametrize("percent", [99.999, 99.9, 90, 50.5])
def test_percentile_against_sorting(percent):
    for seed in range(16):
        x = np.sort(random_values(seed))
        chosen = find_calibrator("PERCENTILE")(seen(x), UINT8, Options(percentile=percent))
        cut, width = int(round(x.size * (100 - percent) / 200, 6)), 2.0 ** (count_numba(x).k - 12)
        assert 0 <= x[cut] - chosen.lo <= width and 0 <= chosen.hi - x[-1 - cut] <= width
