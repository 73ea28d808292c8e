"""A cluster gives the bits of a plain run: with any number of workers, and when a worker dies."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import time
from pathlib import Path

import pytest

from ptqlit import Config, convert
from ptqlit.model.graph import Graph, prepare
from ptqlit.model.plan import plan_text
from ptqlit.pipeline import Flags
from ptqlit.samples.image import image_samples
from ptqlit.samples.stream import Recipes
from ptqlit.statistics.cluster import observe_cluster
from ptqlit.statistics.keep import save_statistics
from ptqlit.statistics.observe import Statistics, observe

pytest.importorskip("distributed")
psutil = pytest.importorskip("psutil")
DIGITS = Path(__file__).resolve().parents[1] / "data" / "digits"
MODEL, SIZE = DIGITS / "model.onnx", 24


def config() -> Config:
    """The shipped configuration with fewer pictures, and KL, which looks at every bin."""
    text = (DIGITS / "full_quant.cfg").read_text()
    text = text.replace("calibrate_size=100", f"calibrate_size={SIZE}").replace("MAX_MIN", "KL")
    assert f"calibrate_size={SIZE}" in text and "=KL" in text
    return Config.from_text(text, "digits.cfg", DIGITS)


def outcome(folder: Path, cluster: str) -> tuple[bytes, str, bytes]:
    """All bytes of the statistics, the Plan and the file of one conversion."""
    folder.mkdir()
    flags = Flags(cluster=cluster, statistics_file=str(folder / "kept.npz"))
    path, plan, _ = convert(MODEL, config(), folder / "q", progress=False, flags=flags)
    return (folder / "kept.npz").read_bytes(), plan_text(plan), path.read_bytes()


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[bytes, str, bytes]:
    """What a conversion without a cluster gives."""
    return outcome(tmp_path_factory.mktemp("alone") / "out", "")


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers(workers, alone, tmp_path):
    statistics, plan, model = outcome(tmp_path / "out", f"local:{workers}")
    assert statistics == alone[0]
    assert plan == alone[1]
    assert model == alone[2]


# ---------------------------------------------------------------- workers that die


def bits(statistics: Statistics, folder: Path) -> bytes:
    """Every bit of some statistics."""
    return save_statistics(statistics, folder / "bits.npz", "key").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """The statistics of a plain run."""
    graph = prepare(MODEL)
    return bits(observe(graph, image_samples(config(), graph)), tmp_path_factory.mktemp("whole"))


def first_of_all(flag: Path) -> bool:
    """Whether this call, of all processes' calls, is the first; it leaves its process's number."""
    try:
        with flag.open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return False
    return True


def dying_source(graph: Graph, flag: Path, order: int | None = None) -> Recipes:
    """The pictures, perhaps shuffled; the process that first opens the 8th one kills itself."""
    samples = image_samples(config(), graph)
    doomed, make = samples.recipes[7], samples.make
    if order is not None:
        samples.recipes = random.Random(order).sample(samples.recipes, len(samples.recipes))

    def deadly(recipe):
        if recipe == doomed and first_of_all(flag):
            os.kill(os.getpid(), signal.SIGKILL)
        return make(recipe)

    return Recipes(samples.recipes, deadly)


def gone(pid: int) -> bool:
    """Whether a process has ended, within some seconds."""
    for _ in range(100):
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.05)
                continue
        return True
    return False


def test_a_worker_that_dies_in_the_middle_of_its_work(whole, tmp_path):
    flag, seen = tmp_path / "dead", []
    source = functools.partial(dying_source, flag=flag, order=3)
    found = observe_cluster(str(MODEL), source, SIZE, "local:4", seen.append)
    pid = int(flag.read_text())  # only a process that killed itself writes it
    assert pid != os.getpid() and gone(pid)
    assert sum(seen) == SIZE == found.samples
    assert bits(found, tmp_path) == whole


def pictures(graph: Graph) -> Recipes:
    """The pictures as configured."""
    return image_samples(config(), graph)


class Killer:
    """A progress callback that kills a worker when the first shard is back."""

    def __init__(self):
        self.before, self.pid = set(workers_of_this_process()), None

    def __call__(self, samples: int) -> None:
        """Kill once."""
        if self.pid is None:
            self.pid = (set(workers_of_this_process()) - self.before).pop()
            os.kill(self.pid, signal.SIGKILL)


def workers_of_this_process() -> list[int]:
    """The numbers of the worker processes that Dask has started for us."""
    children = psutil.Process().children(recursive=True)
    return [c.pid for c in children if "spawn_main" in " ".join(c.cmdline())]


def test_a_worker_that_is_killed_from_outside(whole, tmp_path):
    killer = Killer()
    found = observe_cluster(str(MODEL), pictures, SIZE, "local:2", killer)
    assert killer.pid and gone(killer.pid)
    assert bits(found, tmp_path) == whole
