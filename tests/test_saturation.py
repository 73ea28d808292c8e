"""Sums of processors that add products in pairs of 16 bits, for any codes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ptqlit.arithmetic.affine import INT8, choose_affine, quantize
from ptqlit.arithmetic.saturation import (
    INT7,
    can_saturate,
    exact_product,
    largest_pair,
    layer_sums,
    pair_sums,
    patches,
    portable_affine,
    saturating_product,
)

SAME = settings(max_examples=80, derandomize=True, database=None, deadline=None)
SIZES = st.integers(1, 9)


def codes(rows: int, columns: int, dtype, low: int, high: int):
    """A matrix of codes, with its ends drawn often."""
    one = st.integers(low, high) | st.sampled_from([low, high])
    return arrays.arrays(dtype, (rows, columns), elements=one)


@st.composite
def products(draw, low: int = -127, high: int = 127):
    """Activations (rows, K) and weights (K, columns)."""
    rows, shared, columns = draw(SIZES), draw(SIZES), draw(SIZES)
    x = draw(codes(rows, shared, np.uint8, 0, 255))
    return x, draw(codes(shared, columns, np.int8, low, high))


@SAME
@given(products(low=-128))
def test_saturating_product_is_the_plain_rule(matrices):
    x, w = matrices
    plain = np.clip(pair_sums(x, w), -32768, 32767).sum(axis=1)
    assert np.array_equal(saturating_product(x, w), plain)
    assert np.array_equal(exact_product(x, w), x.astype(int) @ w.astype(int))


@SAME
@given(products())
def test_channels_out_of_danger_are_exact(matrices):
    x, w = matrices
    safe = ~can_saturate(w, axis=1)
    assert np.array_equal(saturating_product(x, w)[:, safe], exact_product(x, w)[:, safe])


@SAME
@given(products())
def test_danger_is_real(matrices):
    """For every channel in danger there are activations with which it saturates."""
    w = matrices[1]
    positive, negative = np.where(w.T > 0, 255, 0), np.where(w.T < 0, 255, 0)
    worst = np.concatenate([positive, negative]).astype(np.uint8)
    reached = np.abs(pair_sums(worst, w)).max(axis=(0, 1))
    assert np.array_equal(largest_pair(w, axis=1) > 32767, reached > 32767)
    assert np.array_equal(can_saturate(w, axis=1), reached > 32767)


@SAME
@given(products(low=INT7.qmin, high=INT7.qmax))
def test_seven_bits_never_saturate(matrices):
    x, w = matrices
    assert not can_saturate(w, axis=1).any()
    assert np.array_equal(saturating_product(x, w), exact_product(x, w))


@SAME
@given(
    arrays.arrays(np.float32, (5, 6), elements=st.floats(-100, 100, width=32)),
    st.booleans(),
)
def test_portable_scales_end_all_danger_and_no_more(weight, per_channel):
    lo, hi = (weight.min(1), weight.max(1)) if per_channel else (weight.min(), weight.max())
    plain = choose_affine(lo, hi, INT8)
    portable = portable_affine(weight, plain, INT8)
    axis = 0 if per_channel else None
    assert portable.scale.shape == plain.scale.shape and portable.scale.dtype == np.float32
    assert not can_saturate(quantize(weight, portable, INT8, axis)).any()
    assert np.all(portable.scale >= plain.scale) and np.all(portable.scale <= 2.01 * plain.scale)
    danger = can_saturate(quantize(weight, plain, INT8, axis))
    if per_channel:
        assert np.array_equal(portable.scale > plain.scale, danger)


def test_convolutions_of_every_form():
    """Sums over patches equal a loop over pixels, with strides, dilations, pads and groups."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (2, 9, 8, 6)).astype(np.uint8)
    for group, kernel, strides, dilations in [
        (1, (3, 2), (1, 2), (2, 1)),
        (3, (2, 3), (2, 1), (1, 2)),
        (6, (3, 3), (2, 2), (1, 1)),
    ]:
        weight = rng.integers(-127, 128, (6, 6 // group, *kernel)).astype(np.int8)
        rows = patches(x, kernel, strides, dilations, (1, 0, 2, 1), 5)
        sums = layer_sums(rows, weight, 5, group, exact_product)
        assert np.array_equal(sums, by_hand(x, weight, strides, dilations, (1, 0, 2, 1), 5, group))


def by_hand(x, weight, strides, dilations, pads, zero_point, group):
    """The same sums, one output value after the other."""
    padded = np.pad(
        x.astype(int) - zero_point, [(0, 0), (pads[0], pads[2]), (pads[1], pads[3]), (0, 0)]
    )
    reach = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations)]
    tall, wide = ((n - r) // s + 1 for n, r, s in zip(padded.shape[1:3], reach, strides))
    outputs, inputs = weight.shape[:2]
    sums = np.zeros((len(x), tall, wide, outputs), int)
    for n, i, j, out in np.ndindex(sums.shape):
        top, left = i * strides[0], j * strides[1]
        window = padded[
            n, top : top + reach[0] : dilations[0], left : left + reach[1] : dilations[1]
        ]
        first = out // (outputs // group) * inputs
        part = window[..., first : first + inputs]
        sums[n, i, j, out] = (part * np.moveaxis(weight[out].astype(int), 0, -1)).sum()
    return sums


def test_a_tensor_of_zeros_needs_no_cure():
    zeros = np.zeros((3, 4), np.float32)
    plain = choose_affine(zeros.min(1), zeros.max(1), INT8)
    assert np.array_equal(portable_affine(zeros, plain, INT8).scale, plain.scale)
