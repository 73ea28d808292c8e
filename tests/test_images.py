"""Pictures against OpenCV called directly: every station, layout and format, and raw buffers of the same numbers."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from builders import Net, chain, conv, op, run

from ptqlit import Config, InputError
from ptqlit.errors import FILE_FAILED, INPUT_INVALID
from ptqlit.model.graph import Graph, prepare
from ptqlit.samples.bin import bin_samples, looks_turned
from ptqlit.samples.image import decode, image_samples
from ptqlit.statistics.observe import Statistics, observe

MEAN, STD = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)
FORMATS = ("RGB", "BGR", "GRAY", "")  # the last: the key is not given
METHODS = ("LINEAR", "NEAREST", "CUBIC", "")
CROPS = ((), (13, 10))  # width, height; 17 x 11 pixels leave an odd rest on both sides
LAYOUTS = ("NCHW", "NHWC")


def picture(rows: int = 23, columns: int = 40, seed: int = 0) -> np.ndarray:
    """A smooth picture with some noise, BGR."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (4, 6, 3), np.uint8)
    smooth = cv2.resize(coarse, (columns, rows), interpolation=cv2.INTER_CUBIC)
    return cv2.add(smooth, random.integers(0, 20, (rows, columns, 3), np.uint8))


def model_for(
    layout: str, channels: int, rows: int | str = "h", columns: int | str = "w"
) -> onnx.ModelProto:
    """A small model for pictures in a layout."""
    if layout == "NCHW":
        return chain(conv(), op("Relu"), conv(4), shape=("n", channels, rows, columns))
    turn = op("Transpose", perm=[0, 3, 1, 2])
    return chain(turn, conv(), op("Relu"), conv(4), shape=("n", rows, columns, channels))


def config_for(folder: Path, count: int, *lines: str, kind: str = "IMAGE") -> Config:
    """A configuration that reads a folder."""
    data = [f"calibrate_path=x:{folder}", f"calibrate_size={count}", f"input_type={kind}", *lines]
    head = ["[common_quant_param]", "quant_type=FULL_QUANT", "[data_preprocess_param]"]
    return Config.from_text("\n".join(head + data))


def keys(colour: str, normalized: bool, method: str, crop: tuple) -> list[str]:
    """The preprocessing keys of a case, in an order that is not the order of the stations."""
    lines = [f"center_crop_width={crop[0]}", f"center_crop_height={crop[1]}"] if crop else []
    if method:
        lines += [f"resize_method={method}", "resize_height=11", "resize_width=17"]
    if normalized:
        channels = 1 if colour == "GRAY" else 3
        lines += [
            f"normalize_std={list(STD[:channels])}",
            f"normalize_mean={list(MEAN[:channels])}",
        ]
    return lines + ([f"image_to_format={colour}"] if colour else [])


def by_opencv(path: Path, colour: str, normalized: bool, method: str, crop: tuple) -> np.ndarray:
    """The array (height, width, channels) that the reference's own calls give."""
    image = cv2.imread(str(path))
    if colour == "RGB":
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    if colour == "GRAY":
        image = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    planes = []
    for plane, mean, std in zip(cv2.split(image), MEAN, STD):
        factor, shift = (1 / std, -mean / std) if normalized else (1, 0)
        plane = cv2.multiply(plane, (float(np.float32(factor)),) * 4, dtype=cv2.CV_32F)
        planes.append(cv2.add(plane, (float(np.float32(shift)),) * 4, dtype=cv2.CV_32F))
    image = cv2.merge(planes)
    if method:
        image = cv2.resize(image, (17, 11), interpolation=getattr(cv2, f"INTER_{method}"))
    if crop:
        top, left = (image.shape[0] - crop[1]) // 2, (image.shape[1] - crop[0]) // 2
        image = image[top : top + crop[1], left : left + crop[0]]
    return image.reshape(*image.shape[:2], -1)


def in_layout(image: np.ndarray, layout: str) -> np.ndarray:
    """A batch of one, one element at a time."""
    rows, columns, channels = image.shape
    shape = (1, channels, rows, columns) if layout == "NCHW" else (1, rows, columns, channels)
    batch = np.empty(shape, np.float32)
    for row, column, channel in np.ndindex(image.shape):
        place = (channel, row, column) if layout == "NCHW" else (row, column, channel)
        batch[(0, *place)] = image[row, column, channel]
    return batch


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("colour", FORMATS)
def test_every_station_is_the_direct_call(colour, method, layout, tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), picture())
    channels = 1 if colour == "GRAY" else 3
    for normalized, crop in itertools.product((True, False), CROPS):
        case = colour, normalized, method, crop
        expected = by_opencv(tmp_path / "a.png", *case)
        rows, columns = (crop[1], crop[0]) if crop else (11, 17) if method else (23, 40)
        assert expected.shape == (rows, columns, channels)
        for size in ((rows, columns), ("h", "w")):
            graph = prepare(model_for(layout, channels, *size))
            (sample,) = image_samples(config_for(tmp_path, 1, *keys(*case)), graph)
            assert sample["x"].dtype == np.float32 and sample["x"].flags.c_contiguous
            assert np.array_equal(sample["x"], in_layout(expected, layout)), case


def test_the_cases_are_told_apart(tmp_path):
    """If two of the cases gave the same numbers, the test above would say less than it seems to."""
    cv2.imwrite(str(tmp_path / "a.png"), picture())
    cases = itertools.product(("RGB", "BGR", "GRAY"), (True, False), METHODS, CROPS)
    found = [by_opencv(tmp_path / "a.png", *case).tobytes() for case in cases]
    assert len(set(found)) == len(found) == 48


def test_normalize_stands_before_resize(tmp_path):
    """Resizing the 8-bit picture first rounds every pixel: close, and not the same."""
    cv2.imwrite(str(tmp_path / "a.png"), picture())
    graph = prepare(model_for("NHWC", 3))
    lines = keys("BGR", True, "LINEAR", ())
    (sample,) = image_samples(config_for(tmp_path, 1, *lines), graph)
    small = cv2.resize(cv2.imread(str(tmp_path / "a.png")), (17, 11)).astype(np.float32)
    other = (small - np.float32(MEAN)) / np.float32(STD)
    assert 1e-4 < np.abs(sample["x"][0] - other).max() < 1.5 / min(STD)  # in levels of a pixel


# ---------------------------------------------------------------- formats


def with_orientation(jpeg: bytes, orientation: int) -> bytes:
    """A JPEG whose header says how the camera was held (Exif, tag 0x0112)."""
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


def write_formats(folder: Path, image: np.ndarray) -> dict[str, int]:
    """One file of each format; name -> largest difference of a pixel that its coding may make."""
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    alpha = np.dstack([image, 1 + np.arange(grey.size).reshape(grey.shape) % 255]).astype(np.uint8)
    deep = image.astype(np.uint16) * 257
    exact = {
        "plain.png": image, "plain.bmp": image, "plain.tiff": image, "plain.ppm": image,
        "grey.png": grey, "grey.bmp": grey, "grey16.png": grey.astype(np.uint16) * 257,
        "alpha.png": alpha, "deep.png": deep,
        "deep_alpha.png": np.dstack([deep, deep[..., :1]]),
    }  # fmt: skip
    lossy = {"lossy.jpg": image, "lossy.JPEG": image, "lossy.webp": image, "grey.jpg": grey}
    for name, pixels in {**exact, **lossy}.items():
        assert cv2.imwrite(str(folder / name), pixels)
    lossless = [cv2.IMWRITE_WEBP_QUALITY, 101]
    assert cv2.imwrite(str(folder / "alpha.webp"), alpha, lossless)
    return {**dict.fromkeys([*exact, "alpha.webp"], 0), **dict.fromkeys(lossy, 60)}


def test_every_format_loads(tmp_path):
    image = picture()
    files = write_formats(tmp_path, image)
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    config = config_for(tmp_path, len(files), *keys("RGB", True, "LINEAR", (13, 10)))
    graph = prepare(model_for("NCHW", 3, 10, 13))
    samples = list(image_samples(config, graph))
    assert len(samples) == len(files)
    for name, sample in zip(sorted(files), samples):
        pixels = decode(tmp_path / name)
        assert (pixels.shape, pixels.dtype) == (image.shape, np.uint8)
        wanted = grey if name.startswith("grey") else image
        assert np.abs(pixels.astype(int) - wanted).max() <= files[name], name
        expected = by_opencv(tmp_path / name, "RGB", True, "LINEAR", (13, 10))
        assert np.array_equal(sample["x"], in_layout(expected, "NCHW")), name
    assert observe(graph, samples).samples == len(files)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_camera_may_be_held_in_any_way(orientation, tmp_path):
    straight = cv2.imencode(".jpg", picture())[1].tobytes()
    (tmp_path / "a.jpg").write_bytes(with_orientation(straight, orientation))
    image = cv2.imdecode(np.frombuffer(straight, np.uint8), cv2.IMREAD_COLOR)
    turned = image.transpose(1, 0, 2) if orientation > 4 else image
    flips = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}.get(orientation, ())
    assert np.array_equal(decode(tmp_path / "a.jpg"), np.flip(turned, flips))


@pytest.mark.parametrize("colour, channels", [("GRAY", 3), ("RGB", 1)])
def test_channels_that_the_model_does_not_have(colour, channels, tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), picture())
    graph = prepare(model_for("NCHW", channels))
    with pytest.raises(InputError, match="a.png") as caught:
        list(image_samples(config_for(tmp_path, 1, f"image_to_format={colour}"), graph))
    assert caught.value.status == INPUT_INVALID
    assert f"image_to_format={colour}" in str(caught.value)
    assert f"expects {channels}, float32 (n, {channels}, h, w)" in str(caught.value)


def test_a_picture_of_another_size(tmp_path):
    for name, size in (("a.png", (23, 40)), ("b.png", (23, 41))):
        cv2.imwrite(str(tmp_path / name), picture(*size))
    samples = image_samples(config_for(tmp_path, 2), prepare(model_for("NCHW", 3, 23, 40)))
    with pytest.raises(InputError, match=r"b\.png: .* \(1, 3, 23, 41\): expected .*23, 40\)"):
        list(samples)
    both = list(image_samples(config_for(tmp_path, 2), prepare(model_for("NCHW", 3))))
    assert [s["x"].shape for s in both] == [(1, 3, 23, 40), (1, 3, 23, 41)]


def test_a_picture_in_a_folder_that_is_none(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), picture())
    (tmp_path / "b.txt").write_text("notes about the pictures")
    samples = image_samples(config_for(tmp_path, 2), prepare(model_for("NCHW", 3)))
    with pytest.raises(InputError, match="b.txt: cannot decode") as caught:
        list(samples)
    assert caught.value.status == FILE_FAILED


# ---------------------------------------------------------------- the same numbers as raw buffers


def assert_same(one: Statistics, two: Statistics) -> None:
    """Every count, extreme and mean, to the last bit."""
    assert (one.samples, list(one.tensors)) == (two.samples, list(two.tensors))
    for name, a in one.tensors.items():
        b = two.tensors[name]
        for attribute in ("k", "lo", "hi", "zeros", "nans", "infinities", "total"):
            assert getattr(a.counts, attribute) == getattr(b.counts, attribute), name
        assert np.array_equal(a.counts.bins, b.counts.bins), name
        assert (a.outer_means, a.rounds) == (b.outer_means, b.rounds), name
        assert a.means.keys() == b.means.keys()
        for axis, means in a.means.items():
            assert means.mean.tobytes() == b.means[axis].mean.tobytes(), name


def folder_of_buffers(folder: Path, graph: Graph, config: Config, axes: tuple = ()) -> Path:
    """The arrays of a folder of pictures as raw buffers; `axes` transpose them."""
    folder.mkdir()
    for place, sample in enumerate(image_samples(config, graph)):
        array = sample["x"].transpose(axes) if axes else sample["x"]
        (folder / f"{place:03d}.bin").write_bytes(array.tobytes())
    return folder


@pytest.mark.parametrize("colour", ["RGB", "GRAY"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_buffers_give_the_histograms_of_pictures(layout, colour, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for seed in range(6):
        cv2.imwrite(str(pictures / f"{seed}.png"), picture(seed=seed))
    graph = prepare(model_for(layout, 1 if colour == "GRAY" else 3, 10, 13))
    config = config_for(pictures, 6, *keys(colour, True, "CUBIC", (13, 10)))
    whole = observe(graph, image_samples(config, graph))
    assert whole.samples == 6 and any(t.means for t in whole.tensors.values())
    plain = config_for(folder_of_buffers(tmp_path / "plain", graph, config), 6, kind="BIN")
    assert_same(whole, observe(graph, bin_samples(plain, graph)))
    other = next(word for word in LAYOUTS if word != layout)
    axes = (0, 2, 3, 1) if layout == "NCHW" else (0, 3, 1, 2)
    turned = folder_of_buffers(tmp_path / "turned", graph, config, axes)
    turned = config_for(turned, 6, kind="BIN")
    assert_same(whole, observe(graph, bin_samples(turned, graph, data_format=other)))
    if colour == "RGB":  # with one channel both layouts are the same bytes
        with pytest.raises(AssertionError):
            assert_same(whole, observe(graph, bin_samples(turned, graph)))


def test_a_model_of_two_pictures(tmp_path):
    """One preprocessing serves every input; each has its own layout."""
    net = Net()
    x, y = net.input("x", (1, 3, 10, 13)), net.input("y", (1, 10, 13, 3))
    both = net.op(
        "Add", run(net, x, conv()), run(net, y, op("Transpose", perm=[0, 3, 1, 2]), conv())
    )
    graph = prepare(net.model(both))
    for name, seed in (("x", 1), ("y", 2)):
        (tmp_path / name).mkdir()
        cv2.imwrite(str(tmp_path / name / "a.png"), picture(seed=seed))
    lines = keys("BGR", True, "LINEAR", (13, 10))
    config = config_for(f"{tmp_path}/x,y:{tmp_path}/y", 1, *lines)
    (sample,) = image_samples(config, graph)
    for name, layout in (("x", "NCHW"), ("y", "NHWC")):
        expected = by_opencv(tmp_path / name / "a.png", "BGR", True, "LINEAR", (13, 10))
        assert np.array_equal(sample[name], in_layout(expected, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["colour", "grey", "grey, normalized", "noise", "one channel"])
def test_a_wrong_layout_is_noticed(kind, layout):
    """Pictures in the wrong layout are, those in the right one and what is no picture are not."""
    for seed in range(5):
        image = picture(64, 48, seed).astype(np.float32)
        if kind.startswith("grey"):
            image = np.repeat(image[..., :1], 3, axis=2)
        if kind == "grey, normalized":
            image = (image - np.float32(MEAN)) / np.float32(STD)
        if kind == "noise":
            image = np.random.default_rng(seed).normal(size=(64, 48, 3)).astype(np.float32)
        if kind == "one channel":
            image = image[..., :1]
        right = in_layout(image, layout)
        other = in_layout(image, LAYOUTS[layout == "NCHW"])
        assert not looks_turned(right, layout)
        assert looks_turned(other.reshape(right.shape), layout) == (
            kind not in ("noise", "one channel")
        )


@pytest.mark.parametrize("kind", ["uint8", "int8", "int32", "float16"])
def test_models_that_take_other_numbers(kind, tmp_path):
    """Integers are rounded, and what a cubic resize puts beyond their range stays at its end."""
    sharp = np.zeros((8, 8, 3), np.uint8)
    sharp[:, 4:] = 255
    cv2.imwrite(str(tmp_path / "a.png"), sharp)
    net = Net()
    x = net.input("x", (1, 3, 11, 17), onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind)))
    graph = prepare(net.model(run(net, net.op("Cast", x, to=onnx.TensorProto.FLOAT), conv())))
    lines = keys("BGR", False, "CUBIC", ())
    (sample,) = image_samples(config_for(tmp_path, 1, *lines), graph)
    expected = in_layout(by_opencv(tmp_path / "a.png", "BGR", False, "CUBIC", ()), "NCHW")
    assert expected.min() < -5 and expected.max() > 260
    if kind != "float16":
        limits = np.iinfo(kind)
        expected = np.clip(np.rint(expected), limits.min, limits.max)
    assert sample["x"].dtype == kind and np.array_equal(sample["x"], expected.astype(kind))
