"""The same input gives the same bytes: again, in another order, with other threads, in another process, from the Plan."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from builders import batch_norm, both, chain, conv, gemm, op, samples_for

from ptqlit import Config, Plan, apply, convert
from ptqlit.backends.cpu import CPU
from ptqlit.model.graph import prepare
from ptqlit.model.plan import load_plan, plan_text
from ptqlit.pipeline import finish, make_plan
from ptqlit.samples.image import image_samples
from ptqlit.statistics.observe import observe

DIGITS = Path(__file__).resolve().parents[1] / "data" / "digits"


def digits(folder: Path = DIGITS / "calib", size: int = 100) -> Config:
    """The shipped configuration, with another folder or number of pictures."""
    text = (DIGITS / "full_quant.cfg").read_text()
    return Config.from_text(
        text.replace("input:calib", f"input:{folder}").replace(
            "calibrate_size=100", f"calibrate_size={size}"
        )
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> tuple[bytes, Plan]:
    """Bytes and Plan of one conversion of the shipped model."""
    path, plan, _ = convert(
        DIGITS / "model.onnx", digits(), tmp_path_factory.mktemp("first") / "q", progress=False
    )
    return path.read_bytes(), plan


def test_twice(first, tmp_path):
    path, plan, _ = convert(
        DIGITS / "model.onnx",
        digits(),
        tmp_path / "q.onnx",
        plan=tmp_path / "p.json",
        progress=False,
    )
    assert path.read_bytes() == first[0]
    assert plan_text(plan) == plan_text(first[1])


def test_the_same_pictures_under_other_names_in_another_order(first, tmp_path):
    pictures = sorted((DIGITS / "calib").iterdir())
    order = np.random.default_rng(0).permutation(len(pictures))
    (tmp_path / "calib").mkdir()
    for place, picture in zip(order, pictures):
        shutil.copy(picture, tmp_path / "calib" / f"{place:03}_{picture.name}")
    path, _, _ = convert(
        DIGITS / "model.onnx", digits(tmp_path / "calib"), tmp_path / "q", progress=False
    )
    assert path.read_bytes() == first[0]


def test_other_pictures_give_other_bytes(first, tmp_path):
    path, _, _ = convert(DIGITS / "model.onnx", digits(size=20), tmp_path / "q", progress=False)
    assert path.read_bytes() != first[0]


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads(threads, first, tmp_path):
    graph, config = prepare(DIGITS / "model.onnx"), digits()
    statistics = observe(graph, image_samples(config, graph), threads=threads)
    plan = make_plan(graph, config, statistics, CPU)
    assert plan_text(plan) == plan_text(first[1])
    assert finish(graph, plan, tmp_path / "q.onnx").path.read_bytes() == first[0]


def test_workers_that_are_merged(first):
    graph, config = prepare(DIGITS / "model.onnx"), digits()
    samples = list(image_samples(config, graph))
    parts = [observe(graph, samples[start::3], threads=1) for start in range(3)]
    merged = parts[2].merge(parts[0]).merge(parts[1])
    assert plan_text(make_plan(graph, config, merged, CPU)) == plan_text(first[1])


def test_the_saved_plan(first, tmp_path):
    _, plan, _ = convert(
        DIGITS / "model.onnx", digits(), tmp_path / "q", plan=tmp_path / "p.json", progress=False
    )
    assert plan_text(load_plan(tmp_path / "p.json")) == plan_text(plan)
    for source in (tmp_path / "p.json", str(tmp_path / "p.json"), plan):
        assert (
            apply(source, DIGITS / "model.onnx", tmp_path / "again").path.read_bytes() == first[0]
        )


def test_a_plan_with_large_arrays(tmp_path):
    model = chain(conv(), op("GlobalAveragePool"), op("Flatten"), gemm(5000))
    first, _, _ = convert(
        model,
        Config.from_text("[common_quant_param]\nquant_type=FULL_QUANT\n"),
        tmp_path / "q",
        samples_for(model),
        plan=tmp_path / "p.json",
    )
    assert (tmp_path / "p.npz").exists()
    assert (
        apply(tmp_path / "p.json", model, tmp_path / "again").path.read_bytes()
        == first.read_bytes()
    )


SCRIPT = """
import sys
from ptqlit.cli import run
sys.exit(run(["convert", "--modelFile=" + sys.argv[1], "--configFile=" + sys.argv[2], "--outputFile=" + sys.argv[3]]))
"""


def test_other_processes_and_hash_seeds(first, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    started = []
    for seed in ("0", "4711"):
        command = [
            sys.executable,
            "-c",
            SCRIPT,
            DIGITS / "model.onnx",
            DIGITS / "full_quant.cfg",
            tmp_path / seed,
        ]
        started.append(
            subprocess.Popen(
                command,
                env=os.environ | {"PYTHONHASHSEED": seed},
                cwd=tmp_path / "elsewhere",
                stdout=subprocess.DEVNULL,
            )
        )
    assert [process.wait(60) for process in started] == [0, 0]
    assert {(tmp_path / f"{seed}.onnx").read_bytes() for seed in ("0", "4711")} == {first[0]}


def test_samples_of_a_caller_in_another_order(tmp_path):
    model = chain(conv(), batch_norm(), op("Relu"), both("Add", [conv()], []), op("Relu"), conv())
    feeds = samples_for(model, 8)
    config = Config.from_text("[common_quant_param]\nquant_type=FULL_QUANT\n")
    results = [
        convert(model, config, tmp_path / "q", feeds[::step]).path.read_bytes() for step in (1, -1)
    ]
    assert results[0] == results[1]


def test_a_stream_that_can_be_read_only_once(tmp_path):
    model = chain(conv(), op("Relu"), conv())
    config = Config.from_text("[common_quant_param]\nquant_type=FULL_QUANT\n")
    feeds = samples_for(model)
    whole = convert(model, config, tmp_path / "a", feeds).path.read_bytes()
    assert convert(model, config, tmp_path / "b", iter(feeds)).path.read_bytes() == whole
    assert (
        convert(model, config, tmp_path / "c", (dict(f) for f in feeds)).path.read_bytes() == whole
    )
