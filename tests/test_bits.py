"""Codes of any width in every form of storage: what goes in comes out, in NumPy and in onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ptqlit import InputError
from ptqlit.arithmetic.bits import (
    from_reference_stream,
    pack,
    packed_bytes,
    plane_layout,
    reference_stream,
    unpack,
)
from ptqlit.arithmetic.forms import (
    PLAIN_OPSETS,
    candidates,
    choose_form,
    decode,
    encode,
    entropy,
    stored_arrays,
    unpack_nodes,
)
from ptqlit.model.runtime import kernels_of, open_session

BITS = st.integers(1, 16)
SHAPES = st.lists(st.integers(1, 9), max_size=4).map(tuple)
SEEDS = st.integers(0, 2**32 - 1)


def properties(examples: int):
    """The same examples at every run, none remembered."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@st.composite
def tensors(draw):
    """Integers of any shape: spread evenly, bell-shaped, few values far apart, mostly one value."""
    bits, shape, rng = draw(BITS), draw(SHAPES), np.random.default_rng(draw(SEEDS))
    half, kind = 1 << bits - 1, draw(st.sampled_from(["even", "bell", "few", "sparse"]))
    even = rng.integers(-half, half, shape)
    if kind == "bell":
        even = np.clip(np.rint(rng.normal(size=shape) * half / 4), -half, half - 1).astype(np.int64)
    if kind == "few":
        even = rng.choice(rng.integers(-half, half, 3), shape)
    if kind == "sparse":
        even = np.where(rng.random(shape) < 0.1, even, 0)
    return np.asarray(even) + draw(st.integers(-3, 3)) * draw(st.sampled_from([0, 1, 1000]))


def file_of(pieces: list, opset: int = 18, ir_version: int = 8) -> bytes:
    """A model whose outputs y0, y1, .. are the unpacked tensors plus an input x."""
    kind = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=ir.Shape([]), type=kind)
    nodes, constants, outputs = [], [], []
    for place, piece in enumerate(pieces):
        add = ir.node("Add", [piece.output, x], name=f"add{place}")
        y = add.outputs[0]
        y.name, y.type, y.shape = f"y{place}", kind, ir.Shape([None] * len(piece.output.shape))
        nodes, constants = nodes + piece.nodes + [add], constants + piece.constants
        outputs.append(y)
    opsets = {"": opset}
    graph = ir.Graph(
        [x], outputs, nodes=nodes, initializers=constants, opset_imports=opsets, name="g"
    )
    return ir.to_proto(ir.Model(graph, ir_version=ir_version)).SerializeToString()


def runtime_integers(encoded: list, opset: int = 18, ir_version: int = 8) -> list[np.ndarray]:
    """What onnxruntime unpacks; fails where it does not fold all of it at load."""
    taken, shared = {"x"} | {f"y{place}" for place in range(len(encoded))}, {}
    pieces = [unpack_nodes("w", one, taken, shared=shared) for one in encoded]
    data = file_of(pieces, opset, ir_version)
    assert {kernel.op_type for kernel in kernels_of(data)} == {"Add"}
    return open_session(data).run(None, {"x": np.zeros((), np.float32)})


@properties(300)
@given(BITS, SHAPES, SEEDS)
def test_planes_and_stream_round_trip(bits, shape, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, shape)
    planes = pack(codes, bits)
    assert np.array_equal(unpack(planes, bits, shape), codes)
    assert sum(plane.nbytes for plane in planes) == packed_bytes(codes.size, bits)
    assert packed_bytes(codes.size, bits) * 8 <= codes.size * bits + 7 * bits
    signed = codes - (1 << bits >> 1)
    stream = reference_stream(signed, bits)
    unit = 8 if bits <= 8 else 16
    assert stream.nbytes == -(-codes.size * bits // unit) * unit // 8
    assert np.array_equal(from_reference_stream(stream, bits, codes.size), signed.ravel())


@pytest.mark.parametrize("bits", range(1, 17))
def test_a_stream_bit_by_bit(bits):
    codes = np.random.default_rng(bits).integers(-(1 << bits >> 1), 1 << bits - 1, 37)
    by_hand = sum(
        (int(code) + (1 << bits >> 1)) << bits * place for place, code in enumerate(codes)
    )
    stream = reference_stream(codes, bits)
    assert int.from_bytes(stream.astype(f"<u{stream.itemsize}").tobytes(), "little") == by_hand


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 1001])
def test_every_width_in_the_runtime(bits, count):
    codes = np.random.default_rng(count).integers(-(1 << bits >> 1), 1 << bits - 1, count)
    codes[0], codes[-1] = -(1 << bits >> 1), (1 << bits - 1) - 1
    forms = [f"packed{bits}", f"palette{min(bits, 10)}+packed{bits}"]
    if count > 1:  # a single code leaves nothing outside a window
        levels = sorted({1, max(1, bits // 2), max(1, bits - 1)})
        forms += [f"escape{level}+packed{bits}" for level in levels]
    encoded = [encode(codes, form) for form in forms]
    for one, back in zip(encoded, runtime_integers(encoded)):
        assert np.array_equal(decode(one), codes) and np.array_equal(back, codes), one.form
    assert encoded[0].stored_bytes * 8 <= count * bits + 7 * bits
    assert len(encoded[0].planes) == len(plane_layout(bits))


@properties(80)
@given(tensors(), st.sampled_from([0, 100]), st.sampled_from([18, 21, 25]))
def test_every_candidate_is_what_it_says(codes, node_bytes, opset):
    found = candidates(codes, opset, node_bytes)
    encoded = [encode(codes, candidate.form) for candidate in found]
    for candidate, one in zip(found, encoded):
        assert np.array_equal(decode(one), codes) and one.form == candidate.form
        assert one.stored_bytes == candidate.stored
        assert len(unpack_nodes("w", one, set()).nodes) == candidate.nodes
        assert len(stored_arrays(one)) == len({id(a) for a in stored_arrays(one).values()})
        assert candidate.stored * 8 >= codes.size * entropy(codes) - 1e-6
    best = choose_form(codes, opset, node_bytes)
    assert best.cost(node_bytes) == min(c.cost(node_bytes) for c in found)
    for back in runtime_integers(encoded, opset, {18: 8, 21: 10, 25: 13}[opset]):
        assert back.shape == codes.shape and np.array_equal(back, codes)


@properties(40)
@given(tensors(), st.sampled_from([ir.DataType.INT16, ir.DataType.INT32]))
def test_integers_and_offsets(codes, dtype):
    for candidate in candidates(codes):
        encoded = encode(codes, candidate.form)
        fits = dtype == ir.DataType.INT32 or -(1 << 15) <= codes.min() <= codes.max() < 1 << 15
        if fits:
            piece = unpack_nodes("w", encoded, {"x", "y0"}, dtype)
            assert piece.output.dtype == dtype
            cast = ir.node("Cast", [piece.output], {"to": ir.DataType.FLOAT}, name="back")
            cast.outputs[0].shape, piece.nodes[len(piece.nodes) :] = piece.output.shape, [cast]
            piece = type(piece)(piece.nodes, piece.constants, cast.outputs[0])
            back = open_session(file_of([piece])).run(None, {"x": np.zeros((), np.float32)})[0]
            assert np.array_equal(back, codes)
        piece = unpack_nodes("w", encoded, {"x", "y0"}, add_offset=False)
        back = open_session(file_of([piece])).run(None, {"x": np.zeros((), np.float32)})[0]
        assert np.array_equal(back, codes - encoded.offset)


def test_the_same_tensor_gives_the_same_file():
    codes = np.rint(np.random.default_rng(0).normal(size=(31, 33)) * 14.5).astype(np.int16)
    for form in ("plain8", "packed7", "palette7+plain8", "escape6+escape4+packed7"):
        names = {"x", "y0", "w_bits_0_3", "w_codes", "unpack_uint8_15", "unpack_9"}
        files = {file_of([unpack_nodes("w", encode(codes, form), set(names))]) for _ in range(2)}
        assert len(files) == 1
        piece = unpack_nodes("w", encode(codes, form), set(names))
        new = [v.name for v in piece.constants] + [n.outputs[0].name for n in piece.nodes]
        assert len(new) == len(set(new)) and not set(new) & names


@pytest.mark.parametrize("bits, opset", PLAIN_OPSETS.items())
def test_plain_types_begin_at_their_opset(bits, opset):
    codes = np.tile(np.array([-(1 << bits - 1), (1 << bits - 1) - 1]), 40)
    assert candidates(codes, opset)[0].form == f"plain{bits}"
    if opset > 1:
        assert candidates(codes, opset - 1)[0].form != f"plain{bits}"


@pytest.mark.parametrize(
    "codes, form, text",
    [
        (np.zeros(0, np.int8), "packed3", "expected at least one integer code"),
        (np.zeros(3, np.float32), "packed3", "expected at least one integer code"),
        (np.array([0, 1 << 16]), "packed16", "at most 16 bits apart"),
        (np.array([1 << 25]), "packed16", "none beyond 2^24"),
        (np.array([0, 8]), "packed3", "codes 0..8 for 3 bits"),
        (np.array([0, 200]), "plain4", "do not fit in an integer type of 4 bits"),
        (np.array([0, 1, 2]), "palette1+plain8", "a palette of 1 bits has 2"),
        (np.array([5, 6]), "escape2+plain8", "all codes lie in one window of 2 bits"),
        (np.array([0, 1]), "huffman3", '"huffman3" is no form of storage'),
    ],
)
def test_what_cannot_be_stored(codes, form, text):
    with pytest.raises(InputError, match=text.replace("^", r"\^")):
        encode(codes, form)
