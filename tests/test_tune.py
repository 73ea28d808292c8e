"""Real models with one fault each: sensitivity ranks the fault first and names it, and the command mends it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from damage import lift, uneven_add
from ptqlit import Config, InputError, convert
from ptqlit.arithmetic.measure import agreement, cosine
from ptqlit.backends.cpu import CPU
from ptqlit.cli import run
from ptqlit.model.graph import prepare
from ptqlit.model.runtime import open_session
from ptqlit.pipeline import make_plan
from ptqlit.reports.sensitivity import sensitivity
from ptqlit.tune import Goal, bench_of, set_key, text_of, tune, with_choice

DIGITS = Path(__file__).resolve().parents[1] / "data" / "digits"
ZOO = Path(os.environ.get("PTQLIT_ZOO", ""))
zoo = pytest.mark.skipif(
    "PTQLIT_ZOO" not in os.environ, reason="set PTQLIT_ZOO to a folder of models"
)
CUT, APART, CHANNEL = "KL cut too deep", "inputs far apart", "one channel dominates"


def digits_text(**keys: str) -> str:
    """The shipped configuration with other values in [full_quant_param]."""
    text = (DIGITS / "full_quant.cfg").read_text().replace("input:calib", f"input:{DIGITS}/calib")
    for key, value in keys.items():
        text = set_key(text, "full_quant_param", key, value)
    return text


def ranked(model, text: str):
    """What each node costs with a configuration."""
    bench = bench_of(model, Config.from_text(text, "start.cfg", ZOO))
    plan = make_plan(bench.graph, bench.config, bench.statistics, CPU)
    return sensitivity(bench.graph, plan, bench.statistics, bench.samples, CPU)


def likeness(first, second, samples) -> tuple[float, float]:
    """Cosine and agreement of two models."""
    pairs = [[session.run(None, s)[0] for session in (first, second)] for s in samples]
    return np.mean([cosine(*p) for p in pairs]), np.mean([agreement(*p) for p in pairs])


def command(folder: Path, model: onnx.ModelProto, text: str, target: str) -> Config:
    """The configuration that the command writes for a model."""
    onnx.save(model, folder / "m.onnx")
    (folder / "c.cfg").write_text(text)
    assert run(["tune", str(folder / "m.onnx"), str(folder / "c.cfg"), target]) == 0
    assert (folder / "c_tuned_trade.png").read_bytes()[1:4] == b"PNG"
    return Config.from_file(folder / "c_tuned.cfg")


def damaged(graph, kind: str):
    """A model with a fault, the node that has it, the nodes that may be skipped, the method."""
    if kind == "Add":
        model = uneven_add(graph, "block2_pointwise", 100)
        return model, "uneven_add", {"uneven_add", "block2_pointwise"}, "MAX_MIN"
    if kind == "cut":
        model, behind = lift(graph, "block1_depthwise", 8, 21)
        return model, "block1_depthwise", {"block1_depthwise", behind}, "KL"
    model, behind = lift(graph, kind, 40, 21 if kind == "stem_conv" else 125)
    return model, kind, {kind, behind}, "MAX_MIN"


KINDS = {  # cause that must be named, target
    "stem_conv": (CHANNEL, 0.9999),
    "block4_depthwise": (CHANNEL, 0.9999),
    "Add": (APART, 0.99994),
    "cut": (CUT, 0.9999),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_is_found_and_mended(kind, tmp_path, capsys):
    cause, target = KINDS[kind]
    graph = prepare(DIGITS / "model.onnx")
    model, node, allowed, method = damaged(graph, kind)
    text = digits_text(activation_quant_method=method)
    first = ranked(model, text).rows[0]
    assert first.node == node and first.share > 0.9
    assert first.causes[0].name == cause

    tuned = command(tmp_path, model, text, f"--target-cosine={target}")
    skipped = tuned.common.skip_quant_node
    assert len(skipped) <= 2 and set(skipped) <= allowed
    assert f"skip_quant_node={','.join(skipped)}" in capsys.readouterr().out
    path = convert(tmp_path / "m.onnx", tuned, tmp_path / "q", progress=False).path
    bench = bench_of(DIGITS / "model.onnx", tuned_for_the_healthy(tuned))
    sessions = [open_session(bench.graph.model), open_session(path)]
    found = likeness(*sessions, bench.samples)
    assert found[0] >= target - 2e-5 and found[1] == 1  # the healthy float model is the judge


def tuned_for_the_healthy(config: Config) -> Config:
    """The samples of a configuration, for a model without the added nodes."""
    return with_choice(
        Config.from_text(digits_text(), "c.cfg"), config.full.activation_quant_method, ()
    )


@pytest.mark.parametrize("kind", ["stem_conv", "cut"])
def test_the_line_alone_mends_most(kind, tmp_path):
    model, *_, method = damaged(prepare(DIGITS / "model.onnx"), kind)
    text = digits_text(activation_quant_method=method)
    before = ranked(model, text).rows[0]
    key, value = before.causes[0].line.split("=")
    after = ranked(model, set_key(text, before.causes[0].section, key, value))
    assert all(row.sqnr > before.sqnr + 10 for row in after.rows)


def test_a_line_keeps_what_was_skipped_already():
    model, node, allowed, _ = damaged(prepare(DIGITS / "model.onnx"), "stem_conv")
    text = set_key(digits_text(), "common_quant_param", "skip_quant_node", "fc,concat")
    line = ranked(model, text).rows[0].causes[0].line
    assert line.startswith("skip_quant_node=fc,concat,") and set(line[16:].split(",")) > allowed


# ---------------------------------------------------------------- the text of a configuration


def test_set_key_changes_one_line():
    text = (
        "[common_quant_param] # all\n# why\nbit_num = 8\n\n[full_quant_param]\nper_channel=true\n"
    )
    once = set_key(text, "common_quant_param", "bit_num", "7")
    assert once == text.replace("bit_num = 8", "bit_num=7")
    assert set_key(once, "common_quant_param", "bit_num", "8").count("bit_num") == 1
    assert set_key(text, "full_quant_param", "bit_num", "") == text
    added = set_key(text, "common_quant_param", "skip_quant_node", "a")
    assert added.splitlines()[:2] == ["[common_quant_param] # all", "skip_quant_node=a"]
    assert set_key("", "x", "a", "1") == "[x]\na=1\n"


def test_a_configuration_that_its_file_does_not_say_is_written_anew(tmp_path):
    path = tmp_path / "c.cfg"
    path.write_text(digits_text())
    assert text_of(Config.from_file(path)) == digits_text()
    other = Config.from_text(digits_text(per_channel="false"), str(path), tmp_path)
    assert not with_choice(other, "KL", ("fc",)).full.per_channel


def test_labels_and_chance(tmp_path):
    text = digits_text().replace("calibrate_size=100", "calibrate_size=10")
    names = sorted(p.name for p in (DIGITS / "calib").iterdir())[:10]
    bench = bench_of(DIGITS / "model.onnx", Config.from_text(text, "c.cfg"))
    answers = [int(row.argmax()) for row in bench.floats]
    wrong = [(a + (place < 3)) % 10 for place, a in enumerate(answers)]  # three are wrong
    labels = tmp_path / "labels.csv"
    labels.write_text("".join(f"{n},{a}\n" for n, a in zip(names, wrong)))
    goal = Goal("top1", 0.55)  # 0.7 less what chance may do to ten samples
    found = tune(DIGITS / "model.onnx", Config.from_text(text, "c.cfg"), goal, labels)
    assert found.best.score == 0.7 and found.best.skipped == ()
    assert goal.chance(0.7, 10) == pytest.approx((0.7 * 0.3 / 10) ** 0.5)
    assert "+-0.145" in str(found)
    with pytest.raises(InputError, match=r"0.7000 at most \(by chance \+-0.145\), not 0.6"):
        goal = Goal("top1", 0.6)
        tune(DIGITS / "model.onnx", Config.from_text(text, "c.cfg"), goal, labels)


# ---------------------------------------------------------------- real models


def zoo_text(name: str, method: str = "MAX_MIN", size: int = 30) -> str:
    """The configuration of a model of the zoo."""
    from test_zoo import config_of

    text = set_key(str(config_of(name)), "full_quant_param", "activation_quant_method", method)
    return set_key(text, "data_preprocess_param", "calibrate_size", str(size)).replace(
        ":images", f":{ZOO.resolve()}/images"
    )


ZOO_KINDS = {  # of mobilenet_v2: first, factor, cause, method, target
    "channel": ("conv_1", 40, CHANNEL, "MAX_MIN", 0.97),
    "deep channel": ("conv_33", 40, CHANNEL, "MAX_MIN", 0.97),
    "Add": ("conv_6", 100, APART, "MAX_MIN", 0.97),
    "cut": ("conv_1", 40, CUT, "KL", 0.97),
}


@zoo
@pytest.mark.parametrize("kind", ZOO_KINDS)
def test_a_fault_of_a_real_model(kind, tmp_path):
    first, factor, cause, method, target = ZOO_KINDS[kind]
    name = "mobilenet_v2_1.0_224"
    graph, text = prepare(ZOO / "models" / f"{name}.onnx"), zoo_text(name, method)
    if kind == "Add":
        model, node = uneven_add(graph, first, factor), "uneven_add"
    else:
        model, node = lift(graph, first, factor)[0], first
    row = ranked(model, text).rows[0]
    assert row.node == node and row.causes[0].name == cause
    tuned = command(tmp_path, model, text, f"--target-cosine={target}")
    assert len(tuned.common.skip_quant_node) <= 2
