"""The files of debug_info_save_path: the reference's headers, NumPy's numbers, and no broken file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pandas
import pytest
from builders import Net, batch_norm, both, chain, conv, op, samples_for
from damage import lift
from ptqlit import Config, InputError, convert
from ptqlit.backends.cpu import CPU
from ptqlit.calibrators.max_min import max_min
from ptqlit.model.graph import prepare
from ptqlit.model.runtime import open_session
from ptqlit.reports.distribution import Codes, SideBySide, comparison, summarize
from ptqlit.quantizers.equalization import equalize
from ptqlit.quantizers.full import full_plan
from ptqlit.reports.folder import first_costs, write_reports
from ptqlit.reports.sensitivity import sensitivity
from ptqlit.samples.image import image_samples
from ptqlit.statistics.observe import observe
from ptqlit.storage.apply import apply_plan, scale_channels

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ROOT / "data" / "digits"
HEADERS = {  # specification sheet, section 9.2
    "round_0.csv": ",NodeName,NodeType,TensorName,InOutFlag,DataTypeFlag,TensorTypeFlag,"
    "Min,Q1,Median,Q3,Max,Mean,Var,Sparsity,Clip,CosineSimilarity,",
    "output_summary.csv": "Round,TensorName,CosineSimilarity,",
    "quant_param.csv": "NodeName,NodeType,TensorName,ElementsNum,Dims,Scale,ZeroPoint,Bits,"
    "CorrectionVar,CorrectionMean,",
}


def digits(folder: Path, size: int = 4, extra: str = "") -> Config:
    """The shipped configuration with reports."""
    text = (
        (DIGITS / "full_quant.cfg")
        .read_text()
        .replace("calibrate_size=100", f"calibrate_size={size}")
    )
    keys = f"quant_type=FULL_QUANT\ndebug_info_save_path={folder}\n{extra}"
    return Config.from_text(text.replace("quant_type=FULL_QUANT", keys), "f.cfg", DIGITS)


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A conversion with reports: the folder, the conversion."""
    folder = tmp_path_factory.mktemp("reports")
    made = convert(DIGITS / "model.onnx", digits(folder / "debug"), folder / "q", progress=False)
    return folder / "debug", made


# ---------------------------------------------------------------- form


@pytest.mark.parametrize("name", HEADERS)
def test_headers_are_the_references(reported, name):
    lines = (reported[0] / name).read_text().splitlines()
    assert lines[0] == HEADERS[name]
    assert all(line.endswith(",") and line.count(",") == lines[0].count(",") for line in lines)


def test_numbers_have_six_digits(reported):
    for name in HEADERS:
        for line in (reported[0] / name).read_text().splitlines()[1:]:
            for cell in filter(
                lambda c: re.fullmatch(r"-?\d.*", c) and " " not in c, line.split(",")
            ):
                assert (
                    cell == str(int(cell))
                    if cell.lstrip("-").isdigit()
                    else cell == f"{float(cell):g}"
                )


def test_a_round_for_each_sample(reported):
    assert len(list(reported[0].glob("round_*.csv"))) == 4
    summary = pandas.read_csv(reported[0] / "output_summary.csv")
    assert list(summary.Round) == [0, 1, 2, 3] and set(summary.TensorName) == {"logits"}
    assert summary.CosineSimilarity.between(0.99, 1).all()


def test_rows_are_those_of_the_models_nodes(reported):
    graph = prepare(DIGITS / "model.onnx")
    original = {n.name: n.op_type for n in onnx.load(DIGITS / "model.onnx").graph.node}
    frame = pandas.read_csv(reported[0] / "round_0.csv", index_col=0)
    assert list(frame.index) == list(range(len(frame)))
    assert list(dict.fromkeys(frame.NodeName)) == [node.name for node in graph.nodes]
    assert all(original[row.NodeName] == row.NodeType for row in frame.itertuples())
    assert not frame.NodeType.isin(
        ["QuantizeLinear", "DequantizeLinear", "BatchNormalization"]
    ).any()
    for _, rows in frame.groupby("NodeName"):  # inputs, then outputs; Origin, then Dequant
        assert list(rows.InOutFlag) == sorted(rows.InOutFlag)
        assert list(rows.DataTypeFlag) == ["Origin", "Dequant"] * (len(rows) // 2)
    constant = set(graph.model.graph.initializers)
    assert all(
        (row.TensorName in constant) == (row.TensorTypeFlag == "Weight")
        for row in frame.itertuples()
    )
    origin = frame[frame.DataTypeFlag == "Origin"]
    assert (origin.Clip == 0).all() and (origin.CosineSimilarity == 1).all()


def test_parameters_are_those_of_the_plan(reported):
    folder, made = reported
    frame = pandas.read_csv(folder / "quant_param.csv")
    scales = {t.name: np.ravel(t.scale) for t in made.plan.tensors}
    for (_, name), rows in frame.groupby(["NodeName", "TensorName"]):
        count = len(scales[name])
        np.testing.assert_allclose(rows.Scale[:count], scales[name], rtol=1e-5)
    assert set(frame.TensorName) == set(scales)
    assert (frame[frame.TensorName.str.endswith("_bias")].Bits == 32).all()


# ---------------------------------------------------------------- numbers


def own_numbers(x: np.ndarray) -> list[float]:
    """The columns from Min to Sparsity, in NumPy."""
    x = x.astype(np.float64)
    parts = np.quantile(x, [0.25, 0.5, 0.75])
    return [x.min(), *parts, x.max(), x.mean(), x.std(), (x == 0).mean()]


def cosine(f: np.ndarray, q: np.ndarray) -> float:
    f, q = f.astype(np.float64).ravel(), q.astype(np.float64).ravel()
    return float(f @ q / (np.linalg.norm(f) * np.linalg.norm(q)))


def test_rows_equal_numpy_on_tensors_seen_by_plain_sessions(reported):
    """Both models run here without the code of the reports; only the names of tensors are used."""
    folder, made = reported
    graph, frame = (
        prepare(DIGITS / "model.onnx"),
        pandas.read_csv(folder / "round_0.csv", index_col=0),
    )
    from ptqlit.samples.image import image_samples

    sample = next(iter(image_samples(digits(folder), graph)))
    proto = onnx.load(made.path)
    there = {name for node in proto.graph.node for name in node.output}
    rows = frame[(frame.InOutFlag == "Output") & (frame.TensorTypeFlag == "Activation")]
    names = [n for n in dict.fromkeys(rows.TensorName) if f"{n}_DequantizeLinear_Output" in there]
    assert len(names) > 15
    proto.graph.output.extend(
        onnx.ValueInfoProto(name=f"{n}_DequantizeLinear_Output") for n in names
    )
    after = dict(zip(names, open_session(proto.SerializeToString()).run(None, sample)[1:]))
    floats = ir.to_proto(graph.copy_model())
    floats.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
    before = dict(zip(names, open_session(floats.SerializeToString()).run(None, sample)[1:]))
    for row in rows[rows.TensorName.isin(names)].itertuples():
        f, q = before[row.TensorName], after[row.TensorName]
        shown = [row.Min, row.Q1, row.Median, row.Q3, row.Max, row.Mean, row.Var, row.Sparsity]
        own = own_numbers(q if row.DataTypeFlag == "Dequant" else f)
        np.testing.assert_allclose(shown, own, rtol=2e-5, atol=2e-6)
        if row.DataTypeFlag == "Dequant":
            np.testing.assert_allclose(row.CosineSimilarity, cosine(f, q), atol=2e-6)
            np.testing.assert_allclose(row.Clip, ((f < q.min()) | (f > q.max())).mean(), rtol=1e-5)


def test_check_values_of_the_specification():
    x = np.float32([5, 1, 4, 2, 8, 7, 3, 6])
    found = summarize(x)
    assert (found.q1, found.median, found.q3) == (2.75, 4.5, 6.25)
    assert f"{found.deviation:.6f}" == "2.291288"
    origin, other = np.float32([-2, -1, 0, 1, 2, 3]), np.float32([-1, -1, 0, 1, 2, 2])
    alike = comparison((origin, other))[2]
    assert (f"{alike.clip:.6f}", f"{alike.cosine:.6f}") == ("0.333333", "0.968400")


@pytest.mark.parametrize("size", [1, 2, 3, 5, 4095, 4096, 4097, 20_000, 200_001])
@pytest.mark.parametrize(
    "kind", ["normal", "relu", "relu6", "few", "tail", "sorted", "outlier", "huge", "tiny"]
)
def test_quartiles_are_exact(size, kind):
    rng = np.random.default_rng(size)
    x = rng.normal(size=size).astype(np.float32)
    x = {
        "normal": x,
        "relu": np.maximum(x, 0),
        "relu6": np.clip(x * 4, 0, 6),
        "few": np.rint(x * 2) / np.float32(3),
        "tail": x**7,
        "sorted": np.sort(x),
        "outlier": np.append(x[1:], np.float32(1e30)),  # all others share a bin
        "huge": x * np.float32(1e37),
        "tiny": x * np.float32(1e-38),
    }[kind].astype(np.float32)
    s, exact = summarize(x), np.quantile(x.astype(np.float64), [0.25, 0.5, 0.75])
    assert [s.q1, s.median, s.q3] == exact.tolist()
    shown = [s.low, s.q1, s.median, s.q3, s.high, s.mean, s.deviation, s.sparsity]
    np.testing.assert_allclose(shown, own_numbers(x), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_codes_are_summarized_as_their_floats(dtype):
    info, rng = np.iinfo(dtype), np.random.default_rng(0)
    for size in (1, 3, 1000):
        codes = Codes(rng.integers(info.min, info.max + 1, size).astype(dtype), np.float32(0.37), 3)
        s = codes.summary()
        shown = [s.low, s.q1, s.median, s.q3, s.high, s.mean, s.deviation, s.sparsity]
        np.testing.assert_allclose(shown, own_numbers(codes.floats), rtol=1e-12, atol=1e-12)


def test_tensors_that_are_not_finite_are_shown():
    for odd in (np.nan, np.inf, -np.inf):
        x = np.float32([1, 2, odd, 0])
        found = summarize(x)
        assert not found.finite and found.sparsity == 0.25
        assert comparison((x, x))[2].cosine == 0


# ---------------------------------------------------------------- modes and folders


def test_stored_weights_have_one_random_round(tmp_path):
    text = f"[common_quant_param]\nquant_type=WEIGHT_QUANT\nbit_num=4\ndebug_info_save_path={tmp_path}/d\n"
    convert(DIGITS / "model.onnx", Config.from_text(text), tmp_path / "q", progress=False)
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == [
        "output_summary.csv", "quant_param.csv", "report.html", "round_0.csv",
    ]  # fmt: skip
    frame = pandas.read_csv(tmp_path / "d" / "round_0.csv", index_col=0)
    image = frame[(frame.TensorName == "input") & (frame.DataTypeFlag == "Origin")].iloc[0]
    assert 0.1 <= image.Min < 0.2 and 0.9 < image.Max <= 1
    weights = frame[(frame.TensorTypeFlag == "Weight") & (frame.DataTypeFlag == "Dequant")]
    params = pandas.read_csv(tmp_path / "d" / "quant_param.csv")
    changed = set(weights[weights.CosineSimilarity < 1].TensorName)
    assert changed == set(params.TensorName) and len(changed) >= 5
    assert set(params.Bits) == {4} and (params.CorrectionVar != 1).any()


def test_own_samples_are_used_once_and_again(tmp_path):
    text = f"[common_quant_param]\nquant_type=FULL_QUANT\ndebug_info_save_path={tmp_path}/d\n"
    rng = np.random.default_rng(0)
    stream = ({"input": rng.normal(size=(1, 1, 32, 32)).astype(np.float32)} for _ in range(3))
    convert(
        DIGITS / "model.onnx",
        Config.from_text(text),
        tmp_path / "q",
        samples=stream,
        progress=False,
    )
    assert len(list((tmp_path / "d").glob("round_*.csv"))) == 3


def test_same_bytes_again_and_old_rounds_vanish(reported, tmp_path):
    folder = tmp_path / "debug"
    for size in (6, 4):
        convert(DIGITS / "model.onnx", digits(folder, size), tmp_path / "q", progress=False)
    for path in reported[0].glob("round_*.csv"):
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert len(list(folder.glob("round_*.csv"))) == 4


def test_other_types_are_left_out_and_named(tmp_path, caplog):
    net = Net()
    x = net.input("x", ("n", 3, 12, 12))
    y = op("Relu")(net, conv()(net, x))
    shape = net.const(np.int64([0, -1]), "shape")
    flat = net.op("Reshape", y, shape)
    place = net.op("ArgMax", flat, axis=1, keepdims=0)
    text = f"[common_quant_param]\nquant_type=FULL_QUANT\ndebug_info_save_path={tmp_path}/d\n"
    samples = [{"x": net.normal(1, 3, 12, 12)} for _ in range(2)]
    convert(
        net.model(flat, place),
        Config.from_text(text),
        tmp_path / "q",
        samples=samples,
        progress=False,
    )
    assert (
        "shape" in caplog.text
        and place in caplog.text
        and "int64"
        not in "".join(pandas.read_csv(tmp_path / "d" / "round_0.csv", index_col=0).TensorName)
    )
    summary = pandas.read_csv(tmp_path / "d" / "output_summary.csv")
    assert set(summary.TensorName) == {flat}


def test_a_file_in_the_place_of_the_folder_is_refused_before_the_work(tmp_path):
    (tmp_path / "d").touch()
    with pytest.raises(InputError, match="d"):
        convert(DIGITS / "model.onnx", digits(tmp_path / "d"), tmp_path / "q", progress=False)
    assert not (tmp_path / "q.onnx").exists()


def test_killed_half_way_no_broken_file_remains(tmp_path):
    config = tmp_path / "f.cfg"
    config.write_text(
        str(digits(tmp_path / "d", 100)).replace("input:calib", f"input:{DIGITS}/calib")
    )
    code = "import sys, ptqlit; ptqlit.convert(*sys.argv[1:4], progress=False)"
    command = [sys.executable, "-c", code, DIGITS / "model.onnx", config, tmp_path / "q"]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    end = time.time() + 120
    while len(list((tmp_path / "d").glob("round_*.csv"))) < 3 and time.time() < end:
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    found = list((tmp_path / "d").glob("*.csv"))
    assert 4 <= len(found) < 102 and not (tmp_path / "d" / "output_summary.csv").exists()
    for path in found:
        text = path.read_text()
        commas = text.splitlines()[0].count(",")
        assert text.endswith(",\n") and all(line.count(",") == commas for line in text.splitlines())
    rounds = {len(p.read_text().splitlines()) for p in found if p.name.startswith("round_")}
    assert len(rounds) == 1


def test_residuals_and_a_folded_norm():
    """A graph of another form: each row's twin exists, and a BatchNorm has none."""
    from ptqlit.backends.cpu import CPU
    from ptqlit.calibrators.max_min import max_min
    from ptqlit.quantizers.full import full_plan
    from ptqlit.statistics.observe import observe

    proto = chain(conv(), batch_norm(), op("Relu"), both("Add", [conv()], [conv()]))
    graph = prepare(proto)
    data = samples_for(proto, 3)
    plan = full_plan(graph, observe(graph, data), CPU, "MAX_MIN", max_min)
    pair = SideBySide(graph, plan, apply_plan(graph, plan))
    frame = next(iter(pair.rounds(data))).frame()
    assert "BatchNormalization" not in set(frame.NodeType)
    assert (frame[frame.DataTypeFlag == "Dequant"].CosineSimilarity > 0.99).all()


def test_the_page_needs_no_network(reported):
    text = (reported[0] / "report.html").read_text()
    assert (
        "viewport" in text and "<svg" in text and "skip_quant_node" in text or "--portable" in text
    )
    for outside in ("http:", "https:", "src=", "<link", "<script", "@import", "url("):
        assert outside not in text


def test_reports_without_samples_are_refused(tmp_path, reported):
    graph, plan = prepare(DIGITS / "model.onnx"), reported[1].plan
    with pytest.raises(InputError, match="expected at least one"):
        write_reports(tmp_path, graph, plan, apply_plan(graph, plan), [])


# ---------------------------------------------------------------- the page


def test_the_pages_costs_are_those_of_the_plan_with_equalized_channels():
    """The graph of the reports has its factors already; they must not be applied twice."""
    model, behind = lift(prepare(DIGITS / "model.onnx"), "block1_depthwise", 40, 21)
    keys = "per_channel=false\n"
    config = Config.from_text(
        (DIGITS / "full_quant.cfg").read_text().replace("per_channel=true\n", keys), "f.cfg", DIGITS
    )
    graph = prepare(model)
    sample = next(iter(image_samples(config, graph)))
    factors, _ = equalize(graph)
    assert {"block1_depthwise", behind} <= {plan.node for plan in factors}
    scaled = scale_channels(graph, factors)
    plan = full_plan(scaled, observe(scaled, [sample]), CPU, "MAX_MIN", max_min, per_channel=False)
    wanted = sensitivity(scaled, plan, observe(scaled, [sample]), [sample], CPU)
    plan = replace(plan, factors=factors)
    both = SideBySide(graph, plan, apply_plan(graph, plan))
    names = {tensor.name for tensor in plan.tensors if tensor.role == "activation"}
    found = first_costs(both, sample, both.tensors(sample, names), CPU, 1000)
    alone = {row.node: row for row in wanted.rows}
    assert len(found.rows) == len(alone)
    for row in found.rows:
        assert abs(row.sqnr - alone[row.node].sqnr) < 0.01
        assert [c.name for c in row.causes] == [c.name for c in alone[row.node].causes]
