"""Mixed bits from the command line to the written file, and what the file's weights are really off by."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import Net
from onnx import numpy_helper

import ptqlit
from ptqlit import cli
from ptqlit.arithmetic.forms import decode, encode, entropy
from ptqlit.arithmetic.measure import cosine
from ptqlit.model.graph import prepare
from ptqlit.model.plan import load_plan
from ptqlit.model.runtime import open_session
from ptqlit.quantizers.mixed_bit import (
    codes_of,
    find_step,
    mean_error,
    mixed_weight,
    multiples,
    rounding,
    rows_of,
)
from ptqlit.quantizers.weight import WeightOptions, weights_of
from ptqlit.reports.inspect import inspect_model
from ptqlit.samples.image import read_image
from ptqlit.storage.write import serialize

DIGITS = Path(__file__).parents[1] / "data" / "digits"
MIXED = """[common_quant_param]
quant_type=WEIGHT_QUANT
bit_num={bits}
min_quant_weight_channel=0
{more}
[mixed_bit_weight_quant_param]
{keys}
"""
PICTURES = f"""
[data_preprocess_param]
calibrate_path=input:{DIGITS / "calib"}
calibrate_size=4
input_type=IMAGE
image_to_format=GRAY
normalize_mean=[127.5]
normalize_std=[127.5]
resize_width=32
resize_height=32
resize_method=LINEAR
"""


def flags(folder: Path, text: str, model: Path = DIGITS / "model.onnx") -> list[str]:
    """The arguments of a conversion of a configuration's text."""
    (folder / "c.cfg").write_text(text)
    target, config, plan = folder / "out" / "q", folder / "c.cfg", folder / "plan.json"
    return [
        "convert", "--fmk=ONNX", f"--modelFile={model}", f"--outputFile={target}",
        f"--configFile={config}", f"--plan={plan}",
    ]  # fmt: skip


def mixed(bits: int = 0, more: str = "", **keys: object) -> str:
    """A configuration of mixed bits."""
    lines = "\n".join(f"{name}={value}" for name, value in keys.items())
    return MIXED.format(bits=bits, more=more, keys=lines)


def converted(folder: Path, text: str, model: Path = DIGITS / "model.onnx") -> Path:
    """The file that the command line writes."""
    assert cli.run(flags(folder, text, model)) == 0
    return folder / "out" / "q.onnx"


def images(count: int) -> np.ndarray:
    """Test pictures of the shipped model."""
    graph = prepare(DIGITS / "model.onnx")
    data = ptqlit.Config.from_file(DIGITS / "full_quant.cfg").data
    files = sorted((DIGITS / "test").glob("*.png"))[:count]
    return np.concatenate([read_image(file, graph.inputs[0], data) for file in files])


def small_net() -> onnx.ModelProto:
    """Two convolutions, one of them depthwise, and a product: quick to tune."""
    net = Net()
    x = net.input("input", ("n", 1, 32, 32))
    a = net.op("Relu", net.op("Conv", x, net.const(net.normal(16, 1, 5, 5)), strides=[2, 2]))
    b = net.op("Relu", net.op("Conv", a, net.const(net.normal(16, 1, 3, 3)), group=16))
    flat = net.op("Flatten", net.op("GlobalAveragePool", b))
    return net.model(net.op("Gemm", flat, net.const(net.normal(16, 10)), name="fc"))


@pytest.fixture
def small(tmp_path) -> Path:
    """The file of the small net."""
    onnx.save(small_net(), str(tmp_path / "small.onnx"))
    return tmp_path / "small.onnx"


def weights_in(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    """The float weights that onnxruntime unpacks from a file: the tensors themselves as outputs."""
    model = onnx.load(path)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    for value in model.graph.output:
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    session = open_session(model.SerializeToString())
    return dict(zip(names, session.run(None, {"input": images(1)})))


def with_weights(floats: dict[str, np.ndarray]) -> bytes:
    """The float model, BatchNorm folded, with other weights."""
    model = onnx.load_from_string(serialize(prepare(DIGITS / "model.onnx").copy_model()))
    for tensor in model.graph.initializer:
        if tensor.name in floats:
            tensor.CopyFrom(numpy_helper.from_array(floats[tensor.name], tensor.name))
    return model.SerializeToString()


# ---------------------------------------------------------------- the step of a tensor


@pytest.mark.parametrize(
    "target, scale, tries, error, levels, bits, factor",
    [
        (0.02, 0.0262492, 4, 0.02018, 77, 5.833, 0.999580),
        (0.05, 0.0640606, 5, 0.04991, 33, 4.555, 0.999092),
        (0.1, 0.128121, 5, 0.09982, 17, 3.570, 0.995866),
    ],
)
def test_check_values(target, scale, tries, error, levels, bits, factor):
    """Specification sheet, A.4."""
    k = np.arange(4096)
    tensor = (np.sin(1.7 * k) * np.exp(-(k % 37) / 20)).astype(np.float32)
    step = find_step(tensor, target)
    codes = np.floor(tensor.astype(np.float64) / step.scale + 0.5).astype(np.int32)
    assert step.scale == pytest.approx(scale, rel=1e-5) and step.tries == tries
    assert step.error == pytest.approx(error, abs=1e-5)
    assert len(np.unique(codes)) == levels and entropy(codes) == pytest.approx(bits, abs=1e-3)
    assert step.var_corr == pytest.approx(factor, abs=1e-6)


@pytest.mark.parametrize("target", [0.003, 0.02, 0.1, 0.3])
@pytest.mark.parametrize("kind", ["normal", "laplace", "even", "shifted", "sparse"])
def test_every_distribution_gets_its_error(kind, target):
    rng = np.random.default_rng(3)
    made = {
        "normal": rng.normal(size=5000),
        "laplace": rng.laplace(size=5000),
        "even": rng.uniform(-1, 1, 5000),
        "shifted": rng.normal(size=5000) + 2,
        "sparse": rng.normal(size=5000) * (rng.random(5000) < 0.2),
    }[kind].astype(np.float32)
    step = find_step(made, target)
    assert step is not None and abs(rounding(made, step.scale).error / target - 1) < 0.01


@pytest.mark.parametrize("value", [-0.25, 0.0, 3e-7])
def test_one_value_is_its_own_step(value):
    array = np.full((10, 10), value, np.float32)
    step = find_step(array, 0.02, 0)
    assert (step.error, step.var_corr, step.mean_corr) == (0, 1, 0)
    assert np.array_equal(np.float32(step.scale) * codes_of(array, step.scale, 0), array)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_size_of_the_weights_does_not_matter(factor):
    array = np.random.default_rng(1).normal(size=(16, 40))
    step, other = find_step(array, 0.02, 0), find_step(factor * array, 0.02, 0)
    assert other.scale == pytest.approx(factor * step.scale) and other.tries == step.tries
    assert other.error == pytest.approx(step.error)


def test_a_quiet_channel_counts_as_much_as_a_loud_one():
    rng = np.random.default_rng(2)
    array = rng.normal(size=(8, 200)) * np.array([[1.0]] * 6 + [[0.03]] * 2)
    whole, each = find_step(array, 0.05), find_step(array, 0.05, 0)
    error = lambda step, row: mean_error(
        array[row:][:1], step.scale * multiples(array[row:][:1], step.scale)
    )
    assert error(whole, 7) > 0.5 and each.scale < whole.scale / 2
    errors = [error(each, row) for row in range(8)]
    assert np.mean(errors) == pytest.approx(0.05, rel=0.05)
    assert find_step(np.ascontiguousarray(array.T), 0.05, 1).scale == each.scale
    dead = np.vstack([array, np.zeros((1, 200)), np.full((1, 200), 1e-9)])  # no error to speak of
    assert find_step(dead, 0.05, 0).scale == pytest.approx(each.scale)


@pytest.mark.parametrize("shape", [(64, 9), (5, 1), (3, 500), (1, 7)])
@pytest.mark.parametrize("scale", [0.05, 0.4])
def test_a_channel_keeps_its_sum(shape, scale):
    """And no weight moves that is not near the middle between two codes."""
    w = np.random.default_rng(4).normal(size=shape) + 0.3
    codes, plain = multiples(w, scale), np.rint(w / scale)
    off, moved = np.abs((codes - w / scale).sum(1)), codes != plain
    assert (off <= 0.5 + 1e-9).mean() > 0.95  # else too few were near the middle
    assert np.abs(codes - plain).max() <= 1 and np.abs(codes - w / scale).max() <= 0.75
    assert (moved.sum(1) <= np.ceil(np.abs((plain - w / scale).sum(1)))).all()
    for row, place in zip(*np.nonzero(moved)):  # none that stayed was nearer to the other code
        lost = (w[row] / scale - plain[row]) * (codes[row, place] - plain[row, place])
        assert lost[~moved[row]].max(initial=-1) <= lost[place] + 1e-12
    assert np.array_equal(codes, np.concatenate([multiples(row[None], scale) for row in w]))


def net_with(weight: np.ndarray) -> onnx.ModelProto:
    """A model of one product."""
    net = Net()
    x = net.input("input", ("n", weight.shape[0]))
    return net.model(net.op("MatMul", x, net.const(weight, "w")))


def wild() -> np.ndarray:
    """Many numbers of which one is so large that no code of 16 bits reaches the error."""
    weight = np.random.default_rng(0).normal(size=(128, 128)).astype(np.float32)
    weight[3, 4] = 4e3
    return weight


def test_a_tensor_without_a_step_gets_8_bits(tmp_path):
    model = prepare(net_with(wild()))
    assert find_step(wild(), 1e-5) is None
    plan = mixed_weight(weights_of(model)[0], 1e-5, WeightOptions(min_channels=0))
    assert plan.format.bits == 8 and "no step has the relative error 1e-05" in plan.reason
    onnx.save(net_with(wild()), str(tmp_path / "m.onnx"))
    path = converted(tmp_path, mixed(init_scale=1e-5), tmp_path / "m.onnx")
    stored = load_plan(tmp_path / "plan.json").tensors[0]
    assert (stored.format.bits, stored.form) == (8, plan.form) and "8 bits" in stored.reason
    x = np.eye(128, dtype=np.float32)
    found = open_session(path).run(None, {"input": x})[0]
    scale = float(stored.scale)
    assert scale == pytest.approx((wild().max() - wild().min()) / 255, rel=1e-6)
    small = np.abs(wild()) < 100
    assert np.abs(found - wild())[small].max() <= scale / 2


# ---------------------------------------------------------------- the written file


@pytest.mark.parametrize("target", [0.02, 0.1])
def test_the_weights_in_the_file(target, tmp_path):
    """Each has the error asked for, and the file computes with them and nothing else."""
    path = converted(tmp_path, mixed(init_scale=target))
    weights = weights_of(prepare(DIGITS / "model.onnx"))
    found = weights_in(path, [weight.name for weight in weights])
    for weight in weights:
        axis = min(weight.axes)
        lost = mean_error(rows_of(weight.array, axis), rows_of(found[weight.name], axis))
        assert abs(lost / target - 1) < 0.011, weight.name
    x = {"input": images(8)}
    ours, wanted = (open_session(m).run(None, x)[0] for m in (path, with_weights(found)))
    assert np.abs(ours - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_stored_bits_are_told_truly(tmp_path):
    path = converted(tmp_path, mixed(init_scale=0.02))
    plan = load_plan(tmp_path / "plan.json")
    table = csv.DictReader(inspect_model(path).csv().splitlines())
    rows = {row["tensor"]: row for row in table}
    for tensor in plan.tensors:
        row = rows[tensor.name]
        stored, bound = float(row["bits each"]), float(row["entropy"])
        told, entropy_told = (float(word) for word in tensor.reason.split() if word[0].isdigit())
        assert row["form"] == tensor.form and bound < stored
        assert abs(entropy_told - bound) < 0.006
        assert 0 <= stored - told < 8 * 64 / int(row["numbers"]) + 0.01


@pytest.mark.parametrize(
    "keys, data",
    [
        (dict(init_scale=0.05), ""),
        (dict(auto_tune="true"), PICTURES),
        (dict(auto_tune="true", use_cv_data="true"), ""),
        (dict(auto_tune="true"), ""),
    ],
    ids=["fixed error", "tuned on data", "tuned on pictures", "tuned on random numbers"],
)
def test_apply_reproduces_the_file(keys, data, tmp_path, small):
    path = converted(tmp_path, mixed(**keys) + data, small)
    plan = tmp_path / "plan.json"
    again = ["apply", str(plan), f"--modelFile={small}"]
    assert cli.run([*again, f"--outputFile={tmp_path / 'again'}"]) == 0
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()
    notes = load_plan(plan).notes
    assert len(notes) == ("auto_tune" in keys)
    if notes:
        assert "8 fixed bits" in notes[0]


def test_tuning_is_told_on_the_screen(tmp_path, small):
    """Without any flag: what was found, its size beside that of 8 fixed bits, and which is better."""
    arguments = flags(tmp_path, mixed(auto_tune="true"), small)
    quiet = {name: value for name, value in os.environ.items() if name != "GLOG_v"}
    code = "import sys; from ptqlit.cli import run; sys.exit(run(sys.argv[1:]))"
    made = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=quiet
    )
    lines = [line for line in (made.stdout + made.stderr).splitlines() if "auto_tune" in line]
    assert made.returncode == 0 and len(lines) == 1, made.stderr
    note = load_plan(tmp_path / "plan.json").notes[0]
    words = note.replace(",", "").replace(":", "").split()
    sizes = [int(words[words.index("bytes") - 1]), int(words[words.index("bits") + 1])]
    better = "mixed bits are smaller" if sizes[0] < sizes[1] else "8 fixed bits are better"
    assert lines[0].endswith(note) and note.endswith(better)


def test_tuning_keeps_the_promise(tmp_path, small):
    """The cosine of the written file on the tuning samples, and that ten percent more is too much."""
    config = ptqlit.Config.from_text(mixed(auto_tune="true"), "c.cfg")
    x = {"input": images(6)}
    path, plan, _ = ptqlit.convert(small, config, tmp_path / "t", samples=[x], progress=False)
    wanted = open_session(small).run(None, x)[0]
    found = float(plan.notes[0].split("init_scale=")[1].split()[0])
    larger = ptqlit.Config.from_text(mixed(init_scale=1.1 * found), "c.cfg")
    worse = ptqlit.convert(small, larger, tmp_path / "l", progress=False).path
    alike, less = (cosine(wanted, open_session(m).run(None, x)[0]) for m in (path, worse))
    assert alike >= 0.995 > less


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "text, words",
    [
        (mixed(init_scale=0), ["c.cfg:7", "init_scale", "0"]),
        (mixed(init_scale=1), ["c.cfg:7", "init_scale", "1"]),
        (mixed(init_scale="nan"), ["c.cfg:7", "init_scale", "nan"]),
        (mixed(bits=17), ["c.cfg:3", "bit_num", "17"]),
        (mixed(bits=5, more="enable_encode=false"), ["c.cfg", "enable_encode", "5"]),
        (mixed(auto_tune="true", max_iterations=3), ["c.cfg:8", "max_iterations", "40"]),
    ],
    ids=["error 0", "error 1", "error nan", "17 bits", "5 bits without forms", "3 tries"],
)
def test_what_is_refused(text, words, tmp_path, capfd):
    assert cli.run(flags(tmp_path, text)) != 0
    refused(capfd, tmp_path, words)


def refused(capfd, folder: Path, words: list[str]) -> None:
    """One line of explanation that holds the words, and no file."""
    out, err = capfd.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("ERROR ")]
    assert len(errors) == 1 and "Traceback" not in out + err
    assert not [word for word in words if word not in errors[0]], errors[0]
    assert not list(folder.glob("out/*")) and not (folder / "plan.json").exists()


@pytest.mark.parametrize("keys", [dict(init_scale=0.02), dict(auto_tune="true")])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_no_number(keys, value, tmp_path, capfd):
    weight = np.ones((64, 64), np.float32)
    weight[1, 2] = value
    onnx.save(net_with(weight), str(tmp_path / "m.onnx"))
    assert cli.run(flags(tmp_path, mixed(**keys), tmp_path / "m.onnx")) != 0
    refused(capfd, tmp_path, ["MatMul0", "w"])


def test_pictures_for_an_input_that_takes_none(tmp_path, capfd):
    onnx.save(net_with(np.eye(32, dtype=np.float32)), str(tmp_path / "m.onnx"))
    text = mixed(auto_tune="true", use_cv_data="true")
    assert cli.run(flags(tmp_path, text, tmp_path / "m.onnx")) != 0
    refused(capfd, tmp_path, ["use_cv_data", "input", "expected float32 pictures"])


def test_the_largest_codes_survive_every_form():
    """Rare codes of 16 bits among small ones: what is decoded is what was encoded."""
    codes = np.random.default_rng(1).integers(-3, 4, 4096)
    codes[::500] = np.array([-32767, 32767, -9000, 12345, 700, -700, 90, -90, 8])
    for form in ("packed16", "escape3+packed16", "escape3+escape8+packed16"):
        assert np.array_equal(decode(encode(codes, form)), codes)
