"""What must hold for any numbers, any text and any graph."""

from __future__ import annotations

import json
import string
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from builders import Net, batch_norm, clip, conv, depthwise, gemm, op, quantize, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ptqlit import Config, InputError, Plan
from ptqlit.arithmetic.affine import (
    INT8,
    INT32,
    UINT8,
    NumberFormat,
    choose_affine,
    dequantize,
    quantize as to_codes,
)
from ptqlit.arithmetic.measure import agreement, cosine, paired_top1, sqnr
from ptqlit.calibrators.max_min import CALIBRATORS, Options
from ptqlit.config.file import SECTIONS
from ptqlit.model.graph import layer_of, prepare
from ptqlit.model.plan import (
    EdgePlan,
    NodePlan,
    TensorPlan,
    decode,
    load_plan,
    plan_text,
    save_plan,
)
from ptqlit.model.runtime import open_session
from ptqlit.quantizers.bias_correction import error_of_mean
from ptqlit.statistics.histogram import SIDE, Histogram, count_numba, count_numpy, needed_k
from ptqlit.statistics.moments import (
    LIMBS,
    ChannelMeans,
    ExactSum,
    add_numpy,
    channel_sums,
    count_and_sum,
    sums_kernel,
    sums_numpy,
    unit,
)
from ptqlit.statistics.observe import TensorStatistics


def properties(examples: int = 60):
    """The same examples at every run, none remembered."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.filter_too_much,
        ],
    )


F32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
TAME = st.floats(-(2.0**40), 2.0**40, width=32, allow_subnormal=False)
FORMATS = st.sampled_from(
    [
        UINT8,
        INT8,
        NumberFormat(8, signed=True),
        NumberFormat(4),
        NumberFormat(4, True, True, True),
        NumberFormat(2),
        NumberFormat(16),
        NumberFormat(16, True),
    ]
)


def values(elements=F32, size: int = 300):
    """Flat float32 arrays."""
    return arrays.arrays(np.float32, st.integers(0, size), elements=elements)


# ---------------------------------------------------------------- the affine map


@properties()
@given(TAME, TAME, FORMATS)
def test_every_code_is_a_fixed_point(a, b, fmt):
    affine = choose_affine(min(a, b), max(a, b), fmt)
    codes = np.arange(fmt.qmin, fmt.qmax + 1, dtype=np.int64).astype(fmt.dtype)
    assert np.array_equal(to_codes(dequantize(codes, affine), affine, fmt), codes)


@properties()
@given(TAME, TAME, FORMATS, values(st.floats(0, 1, width=32)))
def test_errors_inside_the_range_are_half_a_step_at_most(a, b, fmt, places):
    lo, hi = min(a, b, 0), max(a, b, 0)
    affine = choose_affine(lo, hi, fmt)
    x = np.clip(lo + places.astype(np.float64) * (hi - lo), lo, hi).astype(np.float32)
    error = np.abs(dequantize(to_codes(x, affine, fmt), affine).astype(np.float64) - x)
    slack = 1.001 if fmt.bits <= 8 else 1.02
    ends = 1.0 if fmt.symmetric else 2.0  # a rounded zero point may move an end by half a step
    assert (error <= 0.5 * ends * slack * float(affine.scale)).all()


@properties()
@given(TAME, TAME, FORMATS)
def test_zero_is_exact_and_scales_are_sound(a, b, fmt):
    affine = choose_affine(min(a, b), max(a, b), fmt)
    assert dequantize(to_codes(np.zeros(1, np.float32), affine, fmt), affine)[0] == 0
    assert affine.scale.dtype == np.float32 and np.isfinite(affine.scale) and affine.scale > 0
    assert fmt.qmin <= affine.zero_point <= fmt.qmax and not (fmt.symmetric and affine.zero_point)


@properties()
@given(TAME, TAME, FORMATS, values())
def test_codes_keep_the_order(a, b, fmt, x):
    affine = choose_affine(min(a, b), max(a, b), fmt)
    codes = to_codes(np.sort(x), affine, fmt).astype(np.int64)
    assert (np.diff(codes) >= 0).all() and ((codes >= fmt.qmin) & (codes <= fmt.qmax)).all()


@properties(20)
@given(arrays.arrays(np.float32, (5, 3, 2), elements=TAME))
def test_channels_do_not_mix(weight):
    largest = np.abs(weight).max(axis=(0, 2))
    affine = choose_affine(-largest, largest, INT8)
    together = to_codes(weight, affine, INT8, axis=1)
    for c in range(3):
        alone = choose_affine(-largest[c], largest[c], INT8)
        assert np.array_equal(to_codes(weight[:, c], alone, INT8), together[:, c])


# ---------------------------------------------------------------- histograms


def same(a: Histogram, b: Histogram) -> bool:
    """Whether two histograms hold the same, whatever they are scaled to."""
    x, y = a.counts, b.counts
    return np.array_equal(x.bins, y.bins) and (x.k, x.lo, x.hi, x.zeros, x.nans, x.infinities) == (
        y.k,
        y.lo,
        y.hi,
        y.zeros,
        y.nans,
        y.infinities,
    )


def filled(*parts: np.ndarray) -> Histogram:
    """A histogram that saw some arrays."""
    histogram = Histogram()
    for part in parts:
        histogram.update(part)
    return histogram


ANY = st.floats(width=32)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@properties()
@given(values(ANY), st.lists(st.integers(0, 300), max_size=5), st.randoms(use_true_random=False))
def test_order_and_chunks_change_no_count(x, cuts, random):
    parts = np.split(x, sorted(min(cut, len(x)) for cut in cuts))
    random.shuffle(parts)
    mixed = x.copy()
    random.shuffle(mixed)
    merged = Histogram()
    for part in parts:
        merged.merge(filled(part))
    assert (
        same(filled(x), filled(*parts))
        and same(filled(x), merged)
        and same(filled(x), filled(mixed))
    )


@properties()
@given(values(ANY))
def test_numba_counts_as_numpy_does(x):
    slow, fast = count_numpy(x), count_numba(x)
    assert np.array_equal(slow.bins, fast.bins) and (
        slow.k,
        slow.zeros,
        slow.nans,
        slow.infinities,
    ) == (fast.k, fast.zeros, fast.nans, fast.infinities)
    assert (slow.lo, slow.hi) == (fast.lo, fast.hi)


@properties()
@given(values())
def test_counts_agree_with_numpy_histogram(x):
    counts = filled(x).counts
    assert counts.total == x.size
    edges = np.arange(-SIDE, SIDE + 1) * 2.0 ** (counts.k - 12)
    normal = x[(x >= 0) | (x * np.float32(2.0 ** (12 - counts.k)) != 0)]
    found = np.histogram(normal.astype(np.float64), edges)[0]
    found[SIDE - 1] += x.size - normal.size
    assert np.array_equal(found, counts.bins)
    assert x.size == 0 or (counts.lo, counts.hi) == (x.min(), x.max())


@properties()
@given(values(ANY), FORMATS, st.sampled_from(sorted(CALIBRATORS)))
def test_calibrators_give_ranges_inside_what_was_seen(x, fmt, word):
    statistics = TensorStatistics()
    statistics.update(x)
    counts, chosen = statistics.counts, CALIBRATORS[word](statistics, fmt, Options())
    assert np.isfinite([chosen.lo, chosen.hi]).all() and chosen.lo <= chosen.hi
    if counts.total:
        largest = max(-counts.lo, counts.hi, 0)  # symmetric formats get both sides
        lowest, highest = (-largest, largest) if fmt.symmetric else (counts.lo, counts.hi)
        assert min(lowest, 0) <= chosen.lo and chosen.hi <= max(highest, 0)


# ---------------------------------------------------------------- sums

F64 = st.floats(allow_nan=False, allow_infinity=False)


@properties()
@given(
    arrays.arrays(np.float64, st.tuples(st.integers(1, 20), st.just(2)), elements=F64),
    st.integers(1, 5),
)
def test_sums_are_exact_in_any_order(rows, parts):
    whole, merged = ExactSum(2), ExactSum(2)
    for row in rows:
        whole.update(row)
    for part in range(parts):
        piece = ExactSum(2)
        for row in rows[::-1][part::parts]:
            piece.update(row)
        merged.merge(piece)
    assert np.array_equal(whole.limbs, merged.limbs)
    for channel in range(2):
        exact = sum(map(Fraction, rows[:, channel].tolist()), Fraction(0)) / len(rows)
        assert whole.total(len(rows))[channel] == float(exact)


@properties()
@given(arrays.arrays(np.float64, st.integers(1, 30), elements=F64))
def test_the_compiled_exact_sum_equals_the_plain_one(x):
    plain, fast = np.zeros((LIMBS + 2, len(x)), np.int64), ExactSum(len(x))
    add_numpy(plain, x)
    fast.update(x)
    assert np.array_equal(plain, fast.limbs)


@properties()
@given(
    arrays.arrays(np.float32, st.tuples(*3 * [st.integers(1, 9)]), elements=FINITE),
    st.randoms(use_true_random=False),
)
def test_channel_sums_have_no_order(x, random):
    order = random.sample(range(x.shape[2]), x.shape[2])
    sums, other = sums_numpy(x), np.ascontiguousarray(x[::-1, :, order])
    assert np.array_equal(sums, sums_kernel(x, x.view(np.int32)))
    assert np.array_equal(sums, sums_kernel(other, other.view(np.int32)))
    values = x.shape[0] * x.shape[2]
    for channel, total in enumerate(sums):
        column = x[:, channel].ravel().tolist()
        step = Fraction(unit(needed_k(max(map(abs, column))), values))
        exact = sum(map(Fraction, column))
        rounded = Fraction(abs(total)) / 2**52  # once, to float64
        assert abs(Fraction(total) - exact) <= values * step / 2 + rounded


@properties(30)
@given(
    arrays.arrays(np.float32, (1, 7, 1500), elements=st.floats(width=32)),
    st.sampled_from([1, 2, -1, 0]),
)
def test_one_pass_counts_and_adds_like_two(x, axis):
    counts, sums = count_and_sum(x, axis)
    alone = count_numba(x)
    assert np.array_equal(counts.bins, alone.bins) and counts.window == alone.window
    assert (counts.k, counts.lo, counts.hi) == (alone.k, alone.lo, alone.hi)
    assert (counts.zeros, counts.nans, counts.infinities) == (
        alone.zeros,
        alone.nans,
        alone.infinities,
    )
    assert np.array_equal(sums, channel_sums(x, axis))


@properties()
@given(arrays.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32)))
def test_nothing_lies_outside_the_window(x):
    counts = count_numba(x)
    first, end = counts.window
    outside = np.r_[counts.bins[:first], counts.bins[end:]]
    assert not outside.any() and (first == end or (counts.bins[first] and counts.bins[end - 1]))


@properties(30)
@given(
    arrays.arrays(np.float32, (4, 3, 5), elements=st.floats(-1e6, 1e6, width=32)),
    st.integers(-3, 2),
)
def test_channel_means(x, axis):
    means = ChannelMeans(axis)
    for sample in x:
        means.update(sample[None])
    if axis in (0, -3):
        assert len(means.mean) == 1
        return
    others = tuple(a for a in range(3) if a != axis % 3)
    assert np.allclose(means.mean, x.astype(np.float64).mean(axis=others), rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- bias correction

SHAPES = {  # operator and options: shape of the weight, axis of its outputs, groups
    "Conv": ((6, 4, 3, 3), 0, 1),
    "Conv 1-D": ((6, 4, 3), 0, 1),
    "depthwise": ((4, 1, 3, 3), 0, 4),
    "groups": ((6, 2, 3, 3), 0, 2),
    "depthwise multiplier": ((8, 1, 3, 3), 0, 4),
    "Gemm": ((4, 6), 1, 1),
    "Gemm transB": ((6, 4), 0, 1),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_mean_error_is_what_a_layer_does_to_the_mean(name):
    shape, axis, group = SHAPES[name]
    net, mean = Net(), np.array([0.3, -1.0, 2.0, 0.5])
    weight = net.normal(*shape)
    if "Gemm" in name:
        x = np.tile(mean, (5, 1))
        out = net.op("Gemm", net.input("x", (5, 4)), net.const(weight), transB=1 - axis)
    else:
        x = np.broadcast_to(
            mean.reshape(1, 4, *[1] * (len(shape) - 2)), (1, 4, *[6] * (len(shape) - 2))
        )
        out = net.op("Conv", net.input("x", x.shape), net.const(weight), group=group)
    graph = prepare(net.model(out))
    layer = layer_of(graph.nodes[0])
    got = open_session(net.model(out).SerializeToString()).run(None, {"x": x.astype(np.float32)})[0]
    got = np.moveaxis(got, 1, 0).reshape(got.shape[1], -1).mean(1)
    assert np.allclose(error_of_mean(layer, weight, mean), got, atol=1e-4)


# ---------------------------------------------------------------- measures


@properties(40)
@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 9), st.integers(1, 5)),
        elements=st.floats(-1e3, 1e3, width=32),
    ),
    st.data(),
)
def test_measures(reference, data):
    other = data.draw(
        arrays.arrays(np.float32, reference.shape, elements=st.floats(-1e3, 1e3, width=32))
    )
    labels = np.zeros(len(reference), np.int64)
    assert agreement(reference, reference) == 1 and sqnr(reference, reference) == np.inf
    assert 0 <= agreement(reference, other) <= 1 and -1 <= cosine(reference, other) <= 1
    paired = paired_top1(reference, other, labels)
    assert round((paired.other - paired.reference) * paired.count) == paired.gained - paired.lost


# ---------------------------------------------------------------- the configuration

WORDS = (
    [name for section in SECTIONS.values() for name in section.model_fields]
    + [f"[{title}]" for title in SECTIONS]
    + ["FULL_QUANT", "IMAGE", "MAX_MIN", "[1, 2, 3]", "true", "x:y", "0.5", "-1", "8"]
)
LINES = st.lists(
    st.one_of(
        st.sampled_from(WORDS),
        st.text(string.printable, max_size=8),
        st.sampled_from(["=", "#", '"', "[", "]", ",", ":", "\t", "é", "\ufeff"]),
    ),
    max_size=6,
).map("".join)
TEXTS = st.one_of(
    st.lists(LINES, max_size=8).map("\n".join),
    st.text(max_size=60),
    st.lists(
        st.tuples(st.sampled_from(WORDS), st.sampled_from(WORDS)).map("=".join), max_size=6
    ).map(lambda pairs: "[common_quant_param]\nquant_type=FULL_QUANT\n" + "\n".join(pairs)),
)


@properties(300)
@given(TEXTS)
def test_any_text_is_read_or_refused_in_one_line(text):
    try:
        config = Config.from_text(text)
    except InputError as error:
        assert (
            "\n" not in str(error)
            and str(error).startswith("config")
            and error.status in (-600, -1)
        )
        return
    again = Config.from_text(str(config))
    assert (again.common, again.full, again.data) == (config.common, config.full, config.data)
    assert str(again) == str(config)


@properties(100)
@given(st.binary(max_size=80))
def test_any_bytes_are_read_or_refused(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.cfg"
        path.write_bytes(data)
        with pytest.raises(InputError) as caught:  # random bytes never name a quant_type
            Config.from_file(path)
    assert "c.cfg" in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------- Plans

NAMES = st.text(max_size=12)
FORMATS_OF_PLANS = st.sampled_from([UINT8, INT8, INT32])


@st.composite
def tensor_plans(draw) -> TensorPlan:
    """Any numbers of any tensor."""
    channels = draw(st.one_of(st.none(), st.integers(1, 5)))
    shape = () if channels is None else (channels,)
    scale = draw(arrays.arrays(np.float32, shape, elements=st.floats(2.0**-40, 2.0**40, width=32)))
    zero_point = draw(arrays.arrays(np.int64, shape, elements=st.integers(-128, 255)))
    codes = draw(
        st.one_of(
            st.none(),
            arrays.arrays(np.int32, st.integers(0, 5)),
            st.just(np.arange(5000, dtype=np.int8)),
        )
    )
    limits = draw(st.tuples(F64, F64))
    return TensorPlan(
        draw(NAMES),
        draw(st.sampled_from(["activation", "weight", "bias"])),
        draw(FORMATS_OF_PLANS),
        scale,
        zero_point,
        None if channels is None else 0,
        limits,
        draw(NAMES),
        draw(NAMES),
        draw(NAMES),
        codes,
    )


PLANS = st.builds(
    Plan,
    NAMES,
    NAMES,
    NAMES,
    NAMES,
    st.lists(st.builds(NodePlan, NAMES, NAMES, NAMES, NAMES, NAMES), max_size=3).map(tuple),
    st.lists(tensor_plans(), max_size=3).map(tuple),
    st.lists(st.builds(EdgePlan, NAMES, NAMES), max_size=3).map(tuple),
    st.lists(NAMES, max_size=2).map(tuple),
)


@properties(80)
@given(PLANS)
def test_plans_survive_their_file(plan):
    with tempfile.TemporaryDirectory() as folder:
        path = save_plan(plan, Path(folder) / "p.json")
        again = load_plan(path)
        assert (Path(folder) / "p.npz").exists() == any(
            t.values is not None and t.values.size > 4096 for t in plan.tensors
        )
    assert plan_text(again) == plan_text(plan)
    assert (again.nodes, again.edges, again.notes) == (plan.nodes, plan.edges, plan.notes)
    for a, b in zip(again.tensors, plan.tensors):
        assert (
            a.scale.dtype == np.float32
            and np.array_equal(a.scale, b.scale)
            and a.scale.shape == b.scale.shape
        )
        assert (a.values is None) == (b.values is None) and (
            b.values is None
            or (np.array_equal(a.values, b.values) and a.values.dtype == b.values.dtype)
        )


def test_words_that_the_format_uses_itself_are_names_too(tmp_path):
    plan = Plan("npz", "values", "dtype", "", (NodePlan("npz", "npz", "", "", ""),))
    assert load_plan(save_plan(plan, tmp_path / "p.json")) == plan
    assert decode(json.loads(plan_text(plan)), {}) == plan


# ---------------------------------------------------------------- random graphs

UNARY = {
    "conv": lambda d: conv(8, d(st.sampled_from([1, 3])), bias=d(st.booleans())),
    "depthwise": lambda d: depthwise(),
    "grouped": lambda d: conv(8, group=2),
    "Relu": lambda d: op("Relu"),
    "Clip": lambda d: clip(0, d(st.sampled_from([0.5, 6]))),
    "norm": lambda d: batch_norm(),
    "MaxPool": lambda d: op("MaxPool", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    "AveragePool": lambda d: op("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    "Sigmoid": lambda d: op("Sigmoid"),
    "LeakyRelu": lambda d: op("LeakyRelu"),
    "Tanh": lambda d: op("Tanh"),
    "Transpose": lambda d: op("Transpose", perm=[0, 1, 3, 2]),
}


@st.composite
def graphs(draw):
    """A random net of eight channels, and names of nodes to skip."""
    net = Net(draw(st.sampled_from([13, 17, 21])), draw(st.integers(0, 9)))
    tensors = [conv(8)(net, net.input("x", ("n", 3, 6, 6)))]
    for _ in range(draw(st.integers(1, 9))):
        kind = draw(st.sampled_from([*UNARY, "Add", "Add", "Concat", "Mul"]))
        first = draw(st.sampled_from(tensors[-3:]))
        if kind in UNARY:
            tensors.append(UNARY[kind](draw)(net, first))
        else:
            other = draw(st.sampled_from(tensors[-4:]))
            joined = net.op(kind, first, other, **({"axis": 1} if kind == "Concat" else {}))
            tensors.append(conv(8, 1)(net, joined) if kind == "Concat" else joined)
    outputs = list(
        dict.fromkeys([tensors[-1], *draw(st.lists(st.sampled_from(tensors), max_size=1))])
    )
    if draw(st.booleans()):
        outputs[0] = run(net, outputs[0], op("GlobalAveragePool"), op("Flatten"), gemm(4))
    model = net.model(*outputs)
    layers = [n.name for n in prepare(model).nodes if n.op_type == "Conv"]
    return model, draw(st.sampled_from(["", *layers]))


@properties(80)
@given(graphs())
def test_random_graphs(case):
    model, skip = case
    with tempfile.TemporaryDirectory() as folder:
        result = quantize(model, Path(folder), skip=skip)
    assert result.table.problems == [], str(result.table)
    assert all(
        n.decision == "integer"
        for n in result.plan.nodes
        if n.operator in ("Conv", "Gemm") and n.name not in skip.split(",")
    )
    assert result.quality >= 12
