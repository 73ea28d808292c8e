"""Whatever a caller can mend gives one clear line, the documented exit code, no traceback and no file."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from builders import batch_norm, chain, conv, gemm, op
from onnx import helper, numpy_helper

from ptqlit import InputError, cli
from ptqlit.model import plan as plan_module
from ptqlit.model.plan import load_plan, write_whole

GIVEN, FILE, FOLDER, MODEL, OPERATOR = -600, -1, -3, -200, -300  # the statuses of the reference

CONFIG = """[common_quant_param]
quant_type=FULL_QUANT
bit_num=8
skip_quant_node=
[data_preprocess_param]
calibrate_path=x:images
calibrate_size=2
input_type=IMAGE
image_to_format=RGB
normalize_mean=[127.5, 127.5, 127.5]
normalize_std=[127.5, 127.5, 127.5]
resize_width=12
resize_height=12
resize_method=LINEAR
[full_quant_param]
activation_quant_method=MAX_MIN
"""


def model(**options) -> onnx.ModelProto:
    """The float model of these tests."""
    return chain(
        conv(),
        batch_norm(),
        op("Relu"),
        conv(4),
        op("GlobalAveragePool"),
        op("Flatten"),
        gemm(4),
        **options,
    )


@pytest.fixture
def place(tmp_path):
    """A folder with a model, a configuration and three pictures, in which a conversion works."""
    onnx.save(model(), str(tmp_path / "m.onnx"))
    (tmp_path / "c.cfg").write_text(CONFIG)
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0)
    for name in ("a.jpg", "b.png", "c.jpg"):
        cv2.imwrite(str(tmp_path / "images" / name), pixels.integers(0, 255, (16, 16, 3), np.uint8))
    return tmp_path


def flags(place: Path, **changes: str) -> list[str]:
    """The flags of a conversion; None leaves one out."""
    given = {
        "fmk": "ONNX",
        "modelFile": place / "m.onnx",
        "outputFile": place / "out" / "q",
        "configFile": place / "c.cfg",
    } | changes
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


def fails(capfd, place: Path, arguments: list[str], status: int, *words: str) -> str:
    """Run a command line that must fail; returns its line on stderr."""
    before = {p: p.stat().st_mtime_ns for p in place.rglob("*") if p.is_file()}
    code = cli.run(arguments)
    out, err = capfd.readouterr()
    return judge(code, out, err, status, words, place, before)


def judge(
    code: int, out: str, err: str, status: int, words: tuple, place: Path, before: dict
) -> str:
    """Exit code, result line, one line of explanation, nothing written."""
    assert "Traceback" not in out + err
    errors = [line for line in err.splitlines() if line.startswith("ERROR ")]
    assert len(errors) == 1, err
    assert [line for line in err.splitlines() if not line.startswith(("ERROR ", "WARNING "))] == []
    assert out.splitlines()[-1] == f"CONVERT RESULT FAILED:{status}", errors
    assert code == status & 0xFF != 0
    missing = [word for word in words if word not in errors[0]]
    assert not missing, (missing, errors[0])
    assert {p: p.stat().st_mtime_ns for p in place.rglob("*") if p.is_file()} == before
    return errors[0]


def test_the_unchanged_place_converts(place, capfd):
    assert cli.run(["convert", *flags(place)]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "CONVERT RESULT SUCCESS:0"
    assert (place / "out" / "q.onnx").exists()


# ---------------------------------------------------------------- the configuration


def edit(old: str, new: str):
    """A change of the configuration's text."""

    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return change


def without_data(text: str) -> str:
    """A configuration without the section of the data."""
    return text[: text.index("[data_preprocess_param]")] + text[text.index("[full_quant_param]") :]


CONFIGS = {  # name: change, status, words of the message
    "no quant_type": (
        edit("quant_type=FULL_QUANT\n", ""),
        GIVEN,
        ["c.cfg", "quant_type", "FULL_QUANT"],
    ),
    "empty quant_type": (
        edit("quant_type=FULL_QUANT\n", "quant_type=\n"),
        GIVEN,
        ["c.cfg", "quant_type"],
    ),
    "empty file": (lambda text: "", GIVEN, ["c.cfg", "quant_type"]),
    "unknown key": (edit("bit_num=8", "bit_numm=8"), GIVEN, ["c.cfg:3", "bit_numm", '"bit_num"']),
    "unknown key, nothing near": (
        edit("bit_num=8", "zzz=8"),
        GIVEN,
        ["c.cfg:3", "zzz", "bit_num", "skip_quant_node"],
    ),
    "key of another section": (
        edit("bit_num=8", "calibrate_size=8"),
        GIVEN,
        ["c.cfg:3", "calibrate_size"],
    ),
    "unknown word": (
        edit("MAX_MIN", "MAXMIN"),
        GIVEN,
        ["c.cfg:16", "activation_quant_method", "MAXMIN", '"MAX_MIN"'],
    ),
    "word in small letters": (
        edit("FULL_QUANT", "full_quant"),
        GIVEN,
        ["c.cfg:2", "full_quant", '"FULL_QUANT"'],
    ),
    "unknown input_type": (edit("=IMAGE", "=PICTURE"), GIVEN, ["c.cfg:8", "PICTURE", "IMAGE"]),
    "unknown image_to_format": (edit("=RGB", "=RGBA"), GIVEN, ["c.cfg:9", "RGBA", '"RGB"']),
    "unknown resize_method": (edit("=LINEAR", "=AREA"), GIVEN, ["c.cfg:14", "AREA", "LINEAR"]),
    "bit_num=7": (edit("bit_num=8", "bit_num=7"), GIVEN, ["c.cfg:3", "bit_num=7", "8"]),
    "bit_num=17": (edit("bit_num=8", "bit_num=17"), GIVEN, ["c.cfg:3", "17", "16"]),
    "bit_num=8.0": (edit("bit_num=8", "bit_num=8.0"), GIVEN, ["c.cfg:3", "8.0", "integer"]),
    "per_channel=1": (
        edit("[full_quant_param]", "[full_quant_param]\nper_channel=1"),
        GIVEN,
        ["c.cfg:16", "per_channel", "true"],
    ),
    "calibrate_size=0": (
        edit("size=2", "size=0"),
        GIVEN,
        ["c.cfg:7", "calibrate_size", "=0", "65535"],
    ),
    "calibrate_size=-1": (edit("size=2", "size=-1"), GIVEN, ["c.cfg:7", "calibrate_size", "-1"]),
    "calibrate_size beyond": (
        edit("size=2", "size=65536"),
        GIVEN,
        ["c.cfg:7", "calibrate_size", "65536"],
    ),
    "calibrate_size beyond any": (
        edit("size=2", "size=" + "9" * 40),
        GIVEN,
        ["c.cfg:7", "calibrate_size", "999"],
    ),
    "calibrate_size endless": (
        edit("size=2", "size=" + "9" * 10000),
        GIVEN,
        ["c.cfg:7", "calibrate_size", "999..."],
    ),
    "no data section": (without_data, GIVEN, ["c.cfg", "data_preprocess_param"]),
    "no calibrate_path": (
        edit("calibrate_path=x:images\n", ""),
        GIVEN,
        ["c.cfg", "calibrate_path"],
    ),
    "no calibrate_size": (edit("calibrate_size=2\n", ""), GIVEN, ["c.cfg", "calibrate_size"]),
    "no input_type": (edit("input_type=IMAGE\n", ""), GIVEN, ["c.cfg", "input_type"]),
    "mean without std": (
        edit("normalize_std=[127.5, 127.5, 127.5]\n", ""),
        GIVEN,
        ["c.cfg:10", "normalize_mean", "normalize_std"],
    ),
    "std without mean": (
        edit("normalize_mean=[127.5, 127.5, 127.5]\n", ""),
        GIVEN,
        ["c.cfg:10", "normalize_mean", "normalize_std"],
    ),
    "zero in std": (
        edit("std=[127.5", "std=[0"),
        GIVEN,
        ["c.cfg:11", "normalize_std", "greater than 0"],
    ),
    "NaN in std": (edit("std=[127.5", "std=[nan"), GIVEN, ["c.cfg:11", "normalize_std", "nan"]),
    "infinity in std": (
        edit("std=[127.5", "std=[1e999"),
        GIVEN,
        ["c.cfg:11", "normalize_std", "inf"],
    ),
    "NaN in mean": (edit("mean=[127.5", "mean=[nan"), GIVEN, ["c.cfg:10", "normalize_mean", "nan"]),
    "next to zero in std": (
        edit("std=[127.5", "std=[1e-300"),
        GIVEN,
        ["c.cfg:11", "normalize_std"],
    ),
    "two means": (edit("mean=[127.5, ", "mean=["), GIVEN, ["c.cfg:10", "normalize_mean", "2", "3"]),
    "no vector": (
        edit("mean=[127.5, 127.5, 127.5]", "mean=127.5"),
        GIVEN,
        ["c.cfg:10", "normalize_mean", "brackets"],
    ),
    "no such input": (
        edit("x:images", "y:images"),
        GIVEN,
        ["c.cfg:6", "calibrate_path", '"y"', "x"],
    ),
    "no folder for the path": (
        edit("x:images", "images"),
        GIVEN,
        ["c.cfg:6", "calibrate_path", "input_name:folder"],
    ),
    "no such folder": (edit("x:images", "x:pictures"), FOLDER, ["pictures", "x"]),
    "folder is a file": (edit("x:images", "x:c.cfg"), FOLDER, ["c.cfg", "x"]),
    "fewer images": (edit("size=2", "size=4"), FILE, ["images", "3 files", "calibrate_size=4"]),
    "crop larger than resize": (
        lambda text: text.replace(
            "LINEAR\n", "LINEAR\ncenter_crop_width=13\ncenter_crop_height=12\n"
        ),
        GIVEN,
        ["c.cfg:15", "center_crop_width=13", "resize_width=12"],
    ),
    "crop larger than the image": (
        edit("resize_method=LINEAR\n", "center_crop_width=17\ncenter_crop_height=12\n"),
        GIVEN,
        ["images/a.jpg", "17x12", "16x16"],
    ),
    "half a crop": (
        edit("resize_method=LINEAR\n", "resize_method=LINEAR\ncenter_crop_width=10\n"),
        GIVEN,
        ["c.cfg:15", "center_crop_height"],
    ),
    "resize without height": (edit("resize_height=12\n", ""), GIVEN, ["c.cfg", "resize_height"]),
    "zero width": (
        edit("resize_width=12", "resize_width=0"),
        GIVEN,
        ["c.cfg:12", "resize_width", "65535"],
    ),
    "image of another size": (
        edit("resize_width=12", "resize_width=11"),
        GIVEN,
        ["images/a.jpg", '"x"', "11", "12"],
    ),
    "gray into three channels": (
        lambda text: text.replace("RGB", "GRAY").replace("[127.5, 127.5, 127.5]", "[127.5]"),
        GIVEN,
        ["images/a.jpg", '"x"'],
    ),
    "unknown skip name": (
        edit("skip_quant_node=", "skip_quant_node=Conf0"),
        GIVEN,
        ["c.cfg:4", "skip_quant_node", '"Conf0"', '"Conv0"', "ptqlit nodes"],
    ),
    "skip name with nothing near": (
        edit("skip_quant_node=", "skip_quant_node=zzzzz"),
        GIVEN,
        ["c.cfg:4", '"zzzzz"', "ptqlit nodes"],
    ),
    "skip name after good ones": (
        edit("skip_quant_node=", "skip_quant_node=Conv0,BatchNormalization1,Gem6"),
        GIVEN,
        ['"Gem6"', '"Gemm6"'],
    ),
    "no equals sign": (edit("bit_num=8", "bit_num 8"), FILE, ["c.cfg:3", "bit_num 8"]),
    "two equals signs": (edit("bit_num=8", "bit_num=8=8"), FILE, ["c.cfg:3", "bit_num=8=8"]),
    "open section": (
        edit("[full_quant_param]", "[full_quant_param"),
        FILE,
        ["c.cfg:15", "full_quant_param", "]"],
    ),
    "too many lines": (lambda text: text + "per_channel=true\n" * 10_000, FILE, ["c.cfg", "10000"]),
    "weights that are all too small": (
        edit("FULL_QUANT", "WEIGHT_QUANT"),
        GIVEN,
        ["expected a weight to store in few bits", "min_quant_weight_channel=16"],
    ),
    "pictures read as raw buffers": (edit("=IMAGE", "=BIN"), FILE, ["bytes for x", "1728"]),
    "open sizes for DSP": (
        edit("[full_quant_param]", "[full_quant_param]\ntarget_device=DSP"),
        OPERATOR,
        ["DSP needs fixed sizes", 'input "x"', "expected --inputShape=x:"],
    ),
    "an Ascend shape for an input that is not there": (
        edit(
            "[full_quant_param]",
            "[ascend_context]\ninput_shape=y:[1,3,12,12]\n[full_quant_param]\ntarget_device=ASCEND",
        ),
        GIVEN,
        ["c.cfg:16", "input_shape", 'no input "y"'],
    ),
    "a section that is not there yet": (
        lambda text: text + "[transform_quant_param]\nexport_precision_mode=FLOAT32\n",
        GIVEN,
        ["c.cfg", "export_precision_mode", "not supported yet"],
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(name, place, capfd):
    change, status, words = CONFIGS[name]
    (place / "c.cfg").write_text(change(CONFIG))
    fails(capfd, place, ["convert", *flags(place)], status, *words)


@pytest.mark.parametrize(
    "content, words",
    [
        (bytes(range(256)) * 40, ["c.cfg", "not a text file"]),
        (b"\x7fELF\x02\x01\x01\0\0\0" * 50, ["c.cfg", "not a text file"]),
        (b"quant_type=FULL_QUANT\n\0", ["c.cfg", "not a text file"]),
        (
            "[common_quant_param]\nquant_type=FULL_QUANT\n".encode("utf-16"),
            ["c.cfg", "not a text file"],
        ),
    ],
)
def test_binary_configurations(content, words, place, capfd):
    (place / "c.cfg").write_bytes(content)
    fails(capfd, place, ["convert", *flags(place)], FILE, *words)


def test_a_model_as_configuration(place, capfd):
    fails(capfd, place, ["convert", *flags(place, configFile=place / "m.onnx")], FILE, "m.onnx")


@pytest.mark.parametrize("name", ["gone.cfg", "images", "gone/c.cfg", "c.cfg/c.cfg"])
def test_configurations_that_cannot_be_read(name, place, capfd):
    fails(capfd, place, ["convert", *flags(place, configFile=place / name)], FILE, name)


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"modelFile": None}, ["--modelFile"]),
        ({"outputFile": None}, ["--outputFile"]),
        ({"configFile": None}, ["--configFile"]),
        ({"fmk": "TFLITE"}, ["TFLITE", "ONNX", "tf2onnx"]),
        ({"fmk": "onnx"}, ["onnx", "ONNX"]),
        ({"fmk": ""}, ["ONNX"]),
        ({"modelFil": "m.onnx"}, ["--modelFil", "--modelFile"]),
        ({"bitNum": "8"}, ["--bitNum"]),
    ],
)
def test_flags(changes, words, place, capfd):
    fails(capfd, place, ["convert", *flags(place, **changes)], GIVEN, *words)


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["konvert"], "konvert"),
        (["convert", "extra"], "extra"),
        (["apply"], "PLAN"),
        (["nodes"], "MODEL"),
        (["--bad"], "--bad"),
    ],
)
def test_commands(arguments, word, place, capfd):
    more = flags(place) if arguments[0] == "convert" else []
    fails(capfd, place, [*arguments, *more], GIVEN, word)


# ---------------------------------------------------------------- the model


def truncated(part: float):
    """The first part of a model's bytes."""
    return lambda data: data[: int(len(data) * part)]


MODELS = {
    "empty": lambda data: b"",
    "text": lambda data: b"this is not a model\n" * 20,
    "one byte": lambda data: b"\x08",
    "zeros": lambda data: bytes(1000),
    "a picture": lambda data: b"\x89PNG\r\n\x1a\n" + data,
    **{
        f"first {part:.2%}": truncated(part)
        for part in (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999)
    },
    "all but a byte": lambda data: data[:-1],
    "half, filled with zeros": lambda data: data[: len(data) // 2] + bytes(len(data) // 2),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("command", ["convert", "nodes"])
def test_models_that_are_none(command, name, place, capfd):
    path = place / "m.onnx"
    path.write_bytes(MODELS[name](path.read_bytes()))
    fails(
        capfd,
        place,
        ["convert", *flags(place)] if command == "convert" else ["nodes", str(path)],
        MODEL,
        "m.onnx",
    )


def test_models_cut_anywhere(place, capfd):
    path = place / "m.onnx"
    data = path.read_bytes()
    for size in range(len(data) - 1, 0, -37):
        path.write_bytes(data[:size])
        fails(capfd, place, ["nodes", str(path)], MODEL, "m.onnx")


@pytest.mark.parametrize("name", ["gone.onnx", "images", "gone/m.onnx", "m.onnx/m.onnx", ""])
def test_models_that_are_not_there(name, place, capfd):
    fails(
        capfd, place, ["convert", *flags(place, modelFile=place / name)], MODEL, str(place / name)
    )


def broken(change) -> bytes:
    """The bytes of a model that was changed."""
    proto = model()
    change(proto)
    return proto.SerializeToString()


def put(index: int, array: np.ndarray):
    """Replace one constant of a model."""

    def change(proto: onnx.ModelProto) -> None:
        proto.graph.initializer[index].CopyFrom(
            numpy_helper.from_array(array, proto.graph.initializer[index].name)
        )

    return change


def spoil(index: int, value: float):
    """Put a value into one constant of a model."""

    def change(proto: onnx.ModelProto) -> None:
        array = numpy_helper.to_array(proto.graph.initializer[index]).copy()
        array.flat[1] = value
        put(index, array)(proto)

    return change


BROKEN = {  # name: change, words of the message
    "no graph": (lambda m: m.ClearField("graph"), []),
    "no outputs": (lambda m: m.graph.ClearField("output"), []),
    "no opset": (lambda m: m.ClearField("opset_import"), []),
    "input without type": (lambda m: m.graph.input[0].ClearField("type"), []),
    "input without shape": (lambda m: m.graph.input[0].type.tensor_type.ClearField("shape"), []),
    "unknown operator": (lambda m: setattr(m.graph.node[2], "op_type", "Rellu"), ["Rellu"]),
    "unknown domain": (lambda m: setattr(m.graph.node[2], "domain", "odd"), ["odd"]),
    "unknown attribute": (
        lambda m: m.graph.node[2].attribute.append(helper.make_attribute("odd", 1)),
        ["odd"],
    ),
    "wrong order": (lambda m: m.graph.node.insert(0, m.graph.node[3]), []),
    "missing tensor": (lambda m: m.graph.node[2].input.__setitem__(0, "gone"), ["gone"]),
    "two of a name": (lambda m: m.graph.initializer.append(m.graph.initializer[0]), []),
    "wrong weight": (put(0, np.ones((8, 5, 3, 3), np.float32)), []),
    "NaN in a weight": (spoil(0, np.nan), ["Conv0"]),
    "infinity in a weight": (spoil(0, np.inf), ["Conv0"]),
    "NaN in a bias": (spoil(1, np.nan), ["Conv0"]),
    "NaN in a mean": (spoil(4, np.nan), ["Conv0"]),
    "NaN in a matrix": (spoil(8, np.nan), ["Gemm6"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_models_that_are_broken(name, place, capfd):
    change, words = BROKEN[name]
    (place / "m.onnx").write_bytes(broken(change))
    fails(capfd, place, ["convert", *flags(place)], MODEL, *words)


# ---------------------------------------------------------------- pictures


def jpeg_with_thumbnail(data: bytes) -> bytes:
    """A JPEG that holds a whole small JPEG in its header, cut off inside its own pixels."""
    small = cv2.imencode(".jpg", np.zeros((4, 4, 3), np.uint8))[1].tobytes()
    header = b"\xff\xe1" + (len(small) + 8).to_bytes(2, "big") + b"Exif\0\0" + small
    return (data[:2] + header + data[2:])[: -len(data) // 4]


PICTURES = {
    "empty": ("a.jpg", lambda data: b""),
    "text": ("a.jpg", lambda data: b"no picture\n"),
    "random": ("a.jpg", lambda data: np.random.default_rng(3).bytes(500)),
    **{f"JPEG, first {part:.0%}": ("a.jpg", truncated(part)) for part in (0.1, 0.5, 0.9)},
    **{f"PNG, first {part:.0%}": ("b.png", truncated(part)) for part in (0.1, 0.5, 0.9)},
    "JPEG with a thumbnail, cut": ("a.jpg", jpeg_with_thumbnail),
}


@pytest.mark.parametrize("name", PICTURES)
def test_corrupt_pictures(name, place, capfd):
    file, change = PICTURES[name]
    path = place / "images" / file
    path.write_bytes(change(path.read_bytes()))
    fails(capfd, place, ["convert", *flags(place)], FILE, file)


def test_an_empty_folder(place, capfd):
    shutil.rmtree(place / "images")
    (place / "images").mkdir()
    fails(capfd, place, ["convert", *flags(place)], FILE, "images", "0 files", "calibrate_size=2")


def test_a_broken_link_among_the_pictures(place, capfd):
    (place / "images" / "0.jpg").symlink_to("gone.jpg")
    assert cli.run(["convert", *flags(place)]) == 0


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("name", ["m.onnx/q", "c.cfg/deep/q", "images", "images/", ""])
def test_outputs_that_cannot_be_written(name, place, capfd):
    target = f"{place}/{name}" if name else ""
    status = FILE if name.endswith("q") else GIVEN
    fails(capfd, place, ["convert", *flags(place, outputFile=target)], status, target)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_a_folder_that_takes_no_files(place, capfd):
    fails(capfd, place, ["convert", *flags(place, outputFile="/proc/q")], FILE, "/proc/q.onnx")


def test_an_output_that_is_a_folder_with_its_full_name(place, capfd):
    (place / "out" / "q.onnx").mkdir(parents=True)
    fails(capfd, place, ["convert", *flags(place)], GIVEN, "q.onnx", "folder")


def test_a_plan_that_cannot_be_saved_leaves_no_model(place, capfd):
    fails(
        capfd,
        place,
        ["convert", *flags(place, plan=place / "m.onnx" / "plan.json")],
        FILE,
        "plan.json",
    )


def test_the_model_is_not_overwritten_by_its_result(place, capfd):
    fails(capfd, place, ["convert", *flags(place, outputFile=place / "m")], GIVEN, "m.onnx")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("killed")]
)
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_write_that_fails_leaves_the_old_file_or_none(error, old, tmp_path, monkeypatch):
    def refuse(*_):
        raise error

    target = tmp_path / "q.onnx"
    if old:
        target.write_bytes(old)
    monkeypatch.setattr(plan_module.os, "replace", refuse)
    with pytest.raises(InputError if isinstance(error, OSError) else type(error)):
        write_whole(target, b"new")
    assert [p.name for p in tmp_path.iterdir()] == (["q.onnx"] if old else [])
    assert not old or target.read_bytes() == old


KILLED = """
import os, signal, sys
from ptqlit.model import plan
plan.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
plan.write_whole(sys.argv[1], b"new" * 1000)
"""


def test_a_killed_process_leaves_the_old_file(tmp_path):
    target = tmp_path / "q.onnx"
    target.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(target)])
    assert done.returncode == -signal.SIGKILL and target.read_bytes() == b"old"
    assert not [p for p in tmp_path.glob("*.onnx") if p != target]


# ---------------------------------------------------------------- Plans


def saved(place: Path) -> Path:
    """The Plan of a conversion."""
    assert cli.run(["convert", *flags(place, plan=place / "p.json")]) == 0
    shutil.rmtree(place / "out")
    return place / "p.json"


PLANS = {  # name: change of the text, status, words
    "empty": (lambda text: "", FILE, ["p.json"]),
    "cut": (lambda text: text[: len(text) // 2], FILE, ["p.json"]),
    "a list": (lambda text: "[1, 2]", FILE, ["p.json"]),
    "another version": (
        lambda text: text.replace('"version": 2', '"version": 99'),
        FILE,
        ["p.json", "version"],
    ),
    "no tensors": (lambda text: text.replace('"tensors"', '"tensorz"'), FILE, ["p.json"]),
    "tensors that are none": (
        lambda text: '{"version": 2, "tensors": [1], "nodes": [], "edges": [], "notes": []}',
        FILE,
        ["p.json"],
    ),
    "tensors that are words": (
        lambda text: '{"version": 2, "tensors": ["a"], "nodes": [], "edges": [], "notes": []}',
        FILE,
        ["p.json"],
    ),
    "another model": (lambda text: text.replace('"model": "', '"model": "0'), GIVEN, ["m.onnx"]),
    "an unknown node": (
        lambda text: text.replace('"node": "Conv0"', '"node": "Conv99"'),
        GIVEN,
        ["Conv99"],
    ),
    "an unknown tensor": (
        lambda text: text.replace('"tensor": "x"', '"tensor": "xx"'),
        GIVEN,
        ["xx"],
    ),
    "a zero point beyond the codes": (
        lambda text: text.replace(
            '"zero_point": {"dtype": "int64", "shape": [], "values": [',
            '"zero_point": {"dtype": "int64", "shape": [], "values": [3',
        ),
        None,
        [],
    ),
    "a scale below zero": (
        lambda text: text.replace(
            '"scale": {"dtype": "float32", "shape": [], "values": [',
            '"scale": {"dtype": "float32", "shape": [], "values": [-',
        ),
        None,
        [],
    ),
    "a type that holds no such value": (
        lambda text: text.replace(
            '"dtype": "int32", "shape": [8], "values": [',
            '"dtype": "int8", "shape": [8], "values": [9',
        ),
        None,
        [],
    ),
    "an unknown type": (
        lambda text: text.replace('"dtype": "int64"', '"dtype": "int65"'),
        FILE,
        ["p.json"],
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_plans(name, place, capfd):
    path = saved(place)
    change, status, words = PLANS[name]
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))
    capfd.readouterr()
    before = {p: p.stat().st_mtime_ns for p in place.rglob("*") if p.is_file()}
    code = cli.run(
        ["apply", str(path), f"--modelFile={place / 'm.onnx'}", f"--outputFile={place / 'again'}"]
    )
    out, err = capfd.readouterr()
    judge(code, out, err, status or (FILE if code == 255 else GIVEN), tuple(words), place, before)


def test_a_plan_that_is_not_there(place, capfd):
    arguments = [
        "apply",
        str(place / "gone.json"),
        f"--modelFile={place / 'm.onnx'}",
        f"--outputFile={place / 'q'}",
    ]
    fails(capfd, place, arguments, FILE, "gone.json")


@pytest.mark.parametrize("content", [None, b"", b"no archive", b"PK\x03\x04 cut off"])
def test_large_arrays_of_a_plan(content, tmp_path):
    (tmp_path / "p.json").write_text(
        '{"version": 2, "tensors": [{"scale": {"npz": "a"}}], "nodes": [], "edges": [], "notes": []}'
    )
    if content is not None:
        (tmp_path / "p.npz").write_bytes(content)
    with pytest.raises(InputError, match="p\\.(npz|json)"):
        load_plan(tmp_path / "p.json")


# ---------------------------------------------------------------- the same in a process of its own

PROCESSES = {
    "missing model": ({"modelFile": "gone.onnx"}, MODEL, ["gone.onnx"]),
    "missing configuration": ({"configFile": "gone.cfg"}, FILE, ["gone.cfg"]),
    "wrong framework": ({"fmk": "CAFFE"}, GIVEN, ["CAFFE", "ONNX"]),
}


SCRIPTS = Path(sys.executable).parent
COMMANDS = {
    "ptqlit": [str(SCRIPTS / "ptqlit"), "convert"],
    "converter_lite": [str(SCRIPTS / "converter_lite")],
    "python": [sys.executable, "-c", "from ptqlit.cli import main; main()", "convert"],
}


@pytest.mark.parametrize("name, command", zip(PROCESSES, COMMANDS))
def test_as_a_process(name, command, place):
    changes, status, words = PROCESSES[name]
    before = {p: p.stat().st_mtime_ns for p in place.rglob("*") if p.is_file()}
    done = subprocess.run(
        [*COMMANDS[command], *flags(place, **changes)], capture_output=True, text=True, cwd=place
    )
    judge(done.returncode, done.stdout, done.stderr, status, tuple(words), place, before)


def test_an_interrupt_leaves_nothing(place):
    started = subprocess.Popen(
        [*COMMANDS["converter_lite"], *flags(place)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(0.7)
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=30)
    finished = (place / "out" / "q.onnx").exists()
    assert finished == (started.returncode == 0)
    assert not [p for p in place.rglob(".*") if p.is_file()]
    assert os.path.exists(place / "m.onnx")
