"""A model of two inputs, calibrated from two folders and from whatever Python can iterate over."""

from __future__ import annotations

import itertools
import logging
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import Net, conv, matmul, op, run
from onnx import TensorProto
from onnxruntime.quantization import CalibrationDataReader

from ptqlit import Config, InputError, cli, convert
from ptqlit.errors import FILE_FAILED, INPUT_INVALID, PATH_FAILED
from ptqlit.model.graph import prepare
from ptqlit.pipeline import Flags
from ptqlit.samples.bin import bin_samples
from ptqlit.samples.stream import Spool, as_samples, rereadable, shared
from ptqlit.statistics.observe import observe

MASK = "mask:0"  # as TensorFlow names tensors
KINDS = {
    "float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8, "int16": TensorProto.INT16, "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}  # fmt: skip
Feeds = list[dict[str, np.ndarray]]


def model_of(kind: str = "int32", batch: int | str = "n", size: int | str = 8) -> onnx.ModelProto:
    """A picture and a row of four numbers of some type, joined by an Add."""
    net = Net()
    x, mask = net.input("x", (batch, 3, size, size)), net.input(MASK, (batch, 4), KINDS[kind])
    seen = run(net, x, conv(), op("Relu"), op("GlobalAveragePool"), op("Flatten"))
    told = run(net, net.op("Cast", mask, to=TensorProto.FLOAT), matmul())
    return net.model(run(net, net.op("Add", seen, told), op("Relu"), matmul()))


def feeds_for(kind: str = "int32", count: int = 5, batch: int = 1, size: int = 8) -> Feeds:
    """Random samples; the integers use their whole sign range."""
    random = np.random.default_rng(7)
    feeds = []
    for _ in range(count):
        smooth = random.normal(size=(batch, 3, size, 1)) + np.linspace(0, 1, size)
        numbers = random.integers(0 if kind == "uint8" else -100, 100, (batch, 4))
        feeds.append({"x": smooth.astype(np.float32), MASK: (numbers / 1).astype(kind)})
    return feeds


def write(folder: Path, feeds: Feeds, names: list[str] | None = None) -> Path:
    """A folder for each input with one raw buffer for each sample."""
    for name, place in (("x", "pictures"), (MASK, "masks")):
        (folder / place).mkdir(exist_ok=True)
        for number, feed in enumerate(feeds):
            stem = names[number] if names and place == "masks" else f"{number:02d}"
            (folder / place / f"{stem}.bin").write_bytes(feed[name].tobytes())
    return folder


def config_of(folder: Path, count: int = 5, paths: str = "") -> Config:
    """A configuration of two folders; `paths` says something else in place of them."""
    paths = paths or f"{MASK}:masks,x:pictures"
    text = (
        "[common_quant_param]\nquant_type=FULL_QUANT\n[data_preprocess_param]\n"
        f"calibrate_path={paths}\ncalibrate_size={count}\ninput_type=BIN\n"
    )
    (folder / "c.cfg").write_text(text)
    return Config.from_file(folder / "c.cfg")


def bytes_of(model: onnx.ModelProto, folder: Path, config: Config | None = None, **more) -> bytes:
    """The file that a conversion writes."""
    config = config or Config.from_text("[common_quant_param]\nquant_type=FULL_QUANT\n")
    return convert(model, config, folder / "out.onnx", progress=False, **more).path.read_bytes()


def refusal(folder: Path, config: Config, status: int, model: onnx.ModelProto | None = None) -> str:
    """The message of a conversion that must fail before anything is written."""
    with pytest.raises(InputError) as caught:
        bytes_of(model or model_of(), folder, config)
    assert caught.value.status == status and not (folder / "out.onnx").exists()
    return str(caught.value)


# ---------------------------------------------------------------- two folders


@pytest.mark.parametrize("kind", KINDS)
def test_two_folders_give_what_the_arrays_give(kind, tmp_path):
    model, feeds = model_of(kind), feeds_for(kind)
    config = config_of(write(tmp_path, feeds))
    read = list(bin_samples(config, prepare(model)))
    for sample, feed in zip(read, feeds):
        for name, array in feed.items():
            assert sample[name].dtype == array.dtype and np.array_equal(sample[name], array)
    written = bytes_of(model, tmp_path, config)
    assert written == bytes_of(model, tmp_path, samples=feeds)
    assert written != bytes_of(model, tmp_path, samples=feeds[:2])
    inputs = onnx.load_from_string(written).graph.input
    assert [i.type.tensor_type.elem_type for i in inputs] == [TensorProto.FLOAT, KINDS[kind]]


@pytest.mark.parametrize("batch", ["n", 3])
def test_a_file_holds_a_whole_batch(batch, tmp_path):
    model, feeds = model_of("int64", batch), feeds_for("int64", batch=3)
    config = config_of(write(tmp_path, feeds))
    shapes = {sample["x"].shape for sample in bin_samples(config, prepare(model))}
    assert shapes == {(3, 3, 8, 8)}
    assert bytes_of(model, tmp_path, config) == bytes_of(model, tmp_path, samples=feeds)


def test_batches_may_differ_from_file_to_file(tmp_path):
    feeds = [feeds_for(count=1, batch=batch)[0] for batch in (1, 4, 2)]
    config = config_of(write(tmp_path, feeds), 3)
    statistics = observe(prepare(model_of()), bin_samples(config, prepare(model_of())))
    assert statistics.tensors["x"].counts.total == (1 + 4 + 2) * 3 * 8 * 8
    assert bytes_of(model_of(), tmp_path, config) == bytes_of(model_of(), tmp_path, samples=feeds)


def test_only_pictures_are_transposed(tmp_path, caplog):
    feeds = feeds_for()
    turned = [{**f, "x": f["x"].transpose(0, 2, 3, 1).copy()} for f in feeds]
    config = config_of(write(tmp_path, turned))
    flags = Flags(input_data_format="NHWC")
    with caplog.at_level(logging.WARNING, "ptqlit"):
        found = bytes_of(model_of(), tmp_path, config, flags=flags)
    assert found == bytes_of(model_of(), tmp_path, samples=feeds)
    told = [r.getMessage() for r in caplog.records if "transposed" in r.getMessage()]
    assert told == ["x: buffers are NHWC, the model wants NCHW: they are transposed."]
    assert found != bytes_of(model_of(), tmp_path, config)
    graph = onnx.load_from_string(found).graph
    assert [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim[1:]] == [3, 8, 8]
    caplog.clear()
    own = config_of(write(tmp_path, feeds))
    assert bytes_of(model_of(), tmp_path, own, flags=Flags(input_data_format="NCHW")) == found
    assert "transposed" not in caplog.text


def test_open_sizes_take_the_flag(tmp_path):
    model, feeds = model_of(size="s"), feeds_for()
    config = config_of(write(tmp_path, feeds))
    message = refusal(tmp_path, config, FILE_FAILED, model)
    assert "pictures/00.bin: 768 bytes" in message and "--inputShape" in message
    flags = Flags(input_shape=f"{MASK}:1,4;x:1,3,8,8")
    assert bytes_of(model, tmp_path, config, flags=flags) == bytes_of(
        model, tmp_path, samples=feeds
    )


# ---------------------------------------------------------------- what is wrong with folders


def test_too_few_files(tmp_path):
    config = config_of(write(tmp_path, feeds_for()))
    (tmp_path / "masks" / "04.bin").unlink()
    message = refusal(tmp_path, config, FILE_FAILED)
    assert f'masks: 4 files for the input "{MASK}": expected at least calibrate_size=5' in message
    (tmp_path / "masks" / "04").mkdir()  # a folder is no file, nor is what is hidden
    (tmp_path / "masks" / ".04.bin").write_bytes(b"")
    assert "masks: 4 files" in refusal(tmp_path, config, FILE_FAILED)


def test_files_beyond_the_size_are_not_read(tmp_path):
    feeds = feeds_for()
    config = config_of(write(tmp_path, feeds), 3)
    (tmp_path / "masks" / "04.bin").write_bytes(b"broken")
    (tmp_path / "masks" / "05.bin").write_bytes(b"one more")
    assert bytes_of(model_of(), tmp_path, config) == bytes_of(
        model_of(), tmp_path, samples=feeds[:3]
    )


SIZES = [  # bytes of one mask of 16, the batch of the model, what is expected
    (15, 1, "15 bytes: expected 16 for mask:0, int32 (1, 4)"),
    (17, 1, "17 bytes: expected 16"),
    (32, 1, "32 bytes: expected 16"),
    (0, 1, "0 bytes: expected 16"),
    (15, "n", "15 bytes for mask:0, int32 (n, 4): expected a whole multiple of 16 bytes"),
]


@pytest.mark.parametrize("size, batch, words", SIZES)
def test_wrong_sizes(size, batch, words, tmp_path):
    config = config_of(write(tmp_path, feeds_for()))
    (tmp_path / "masks" / "03.bin").write_bytes(bytes(size))
    message = refusal(tmp_path, config, FILE_FAILED, model_of(batch=batch))
    assert message.startswith(f"{tmp_path}/masks/03.bin: ") and words in message


def test_folders_that_were_exchanged(tmp_path):
    folder = write(tmp_path, feeds_for())
    message = refusal(tmp_path, config_of(folder, 5, f"x:masks,{MASK}:pictures"), FILE_FAILED)
    assert "masks/00.bin: 16 bytes" in message and "for x" in message


PATHS = [  # calibrate_path, status, words
    ("x:pictures", INPUT_INVALID, f'no folder for the input "{MASK}"'),
    (
        f"x:pictures,{MASK}:masks,y:masks",
        INPUT_INVALID,
        'no input "y". Its inputs: x, mask:0.',
    ),
    ("x:pictures,mask:masks", INPUT_INVALID, 'no input "mask". Nearest: "mask:0"'),
    (f"x:pictures,{MASK}1:masks", INPUT_INVALID, 'no input "mask:01". Nearest: "mask:0"'),
    (f"x:pictures,{MASK}:mask", PATH_FAILED, f'cannot open the folder of the input "{MASK}"'),
    (f"x:pictures,{MASK}:c.cfg", PATH_FAILED, "c.cfg: cannot open the folder"),
]


@pytest.mark.parametrize("paths, status, words", PATHS)
def test_wrong_paths(paths, status, words, tmp_path):
    config = config_of(write(tmp_path, feeds_for()), 5, paths)
    message = refusal(tmp_path, config, status)
    assert words in message
    assert status != INPUT_INVALID or message.startswith(f"{tmp_path}/c.cfg:4: [data_prep")


def test_other_stems_are_told_once(tmp_path, caplog):
    feeds = feeds_for()
    config = config_of(write(tmp_path, feeds))
    bytes_of(model_of(), tmp_path, config)
    assert "names differ" not in caplog.text
    for path in sorted((tmp_path / "masks").iterdir()):
        path.unlink()
    config = config_of(write(tmp_path, feeds, ["00", "01", "02b", "03", "04"]))
    found = bytes_of(model_of(), tmp_path, config)
    (told,) = [r.getMessage() for r in caplog.records if "names differ" in r.getMessage()]
    assert told.endswith(": 02.bin, 02b.bin")
    assert found == bytes_of(model_of(), tmp_path, samples=feeds)  # paired by place


def test_pairs_follow_the_bytes_of_the_names(tmp_path, caplog):
    """`10` stands before `2`, in both folders alike; the suffix does not matter."""
    feeds = feeds_for(count=12)
    config = config_of(write(tmp_path, feeds), 12)
    for folder in ("pictures", "masks"):
        for number in range(12):
            path = tmp_path / folder / f"{number:02d}.bin"
            path.rename(path.with_name(f"{number}.{'raw' if folder == 'masks' else 'bin'}"))
    order = sorted(range(12), key=str)
    read = list(bin_samples(config, prepare(model_of())))
    for sample, place in zip(read, order):
        assert all(np.array_equal(sample[name], feeds[place][name]) for name in sample)
    assert "names differ" not in caplog.text


def test_on_the_command_line(tmp_path, capfd, caplog):
    onnx.save(model_of(), str(tmp_path / "m.onnx"))
    config_of(write(tmp_path, feeds_for(), ["00", "01", "2", "3", "4"]))
    flags = [f"--modelFile={tmp_path}/m.onnx", f"--outputFile={tmp_path}/q"]
    assert cli.run(["convert", "--fmk=ONNX", *flags, f"--configFile={tmp_path}/c.cfg"]) == 0
    assert capfd.readouterr().out.endswith("CONVERT RESULT SUCCESS:0\n")
    assert "02.bin, 2.bin" in caplog.text
    (tmp_path / "pictures" / "01.bin").write_bytes(b"1234")
    assert cli.run(["convert", "--fmk=ONNX", *flags, f"--configFile={tmp_path}/c.cfg"]) == 255
    out, err = capfd.readouterr()
    assert out == "CONVERT RESULT FAILED:-1\n" and "pictures/01.bin: 4 bytes" in err


# ---------------------------------------------------------------- from Python


class Reader(CalibrationDataReader):
    """A reader as onnxruntime's own tools want it."""

    def __init__(self, feeds: Feeds):
        self.feeds = iter(feeds)

    def get_next(self):
        return next(self.feeds, None)


class Rewound(Reader):
    """A reader that can begin again."""

    def __init__(self, feeds: Feeds):
        self.kept, self.times = feeds, 0
        self.rewind()

    def rewind(self):
        self.feeds, self.times = iter(self.kept), self.times + 1


def varied() -> Feeds:
    """Samples of which no two have the same shape."""
    sizes = itertools.product((1, 2, 3), (6, 9))
    return [feeds_for(count=1, batch=batch, size=size)[0] for batch, size in sizes]


SOURCES = {
    "list": list,
    "tuple": tuple,
    "generator": lambda feeds: (dict(feed) for feed in feeds),
    "iterator": iter,
    "map": lambda feeds: map(dict, feeds),
    "reader": Reader,
    "reader that rewinds": Rewound,
    "other order": lambda feeds: feeds[::-1],
}


@pytest.mark.parametrize("source", SOURCES)
def test_shapes_that_vary_from_any_source(source, tmp_path):
    model, feeds = model_of("int64", size="s"), varied()
    for feed in feeds:
        feed[MASK] = feed[MASK].astype(np.int64)
    graph = prepare(model)
    statistics = observe(graph, as_samples(SOURCES[source](feeds)))
    assert statistics.samples == len(feeds)
    assert statistics.tensors["x"].counts.total == sum(feed["x"].size for feed in feeds)
    written = bytes_of(model, tmp_path, samples=SOURCES[source](feeds))
    assert written == bytes_of(model, tmp_path, samples=feeds)


WRONG = {  # what is wrong with the third sample -> words
    "no array": (lambda f: {"x": f["x"]}, f'no array for the input "{MASK}"'),
    "unknown": (lambda f: {**f, "mask": f[MASK]}, 'no input "mask". Nearest: "mask:0"'),
    "type": (lambda f: {**f, MASK: f[MASK].astype(np.int64)}, "is int64 (1, 4): expected int32"),
    "rank": (lambda f: {**f, MASK: f[MASK][0]}, "is int32 (4,): expected int32 (n, 4)"),
    "size": (lambda f: {**f, "x": f["x"][:, :, :7]}, "is float32 (1, 3, 7, 8): expected"),
    "list": (lambda f: {**f, MASK: f[MASK].tolist()}, "is a list: expected a NumPy array"),
    "nothing": (lambda f: {**f, MASK: None}, "is a NoneType: expected a NumPy array"),
    "array": (lambda f: f["x"], "a ndarray; expected a dictionary"),
    "pair": (lambda f: (f["x"], f[MASK]), "a tuple; expected a dictionary"),
}


@pytest.mark.parametrize("name", WRONG)
def test_samples_that_do_not_fit(name, tmp_path):
    change, words = WRONG[name]
    feeds = feeds_for()
    feeds[2] = change(feeds[2])
    with pytest.raises(InputError) as caught:
        bytes_of(model_of(), tmp_path, samples=feeds)
    assert caught.value.status == INPUT_INVALID and not (tmp_path / "out.onnx").exists()
    assert str(caught.value).startswith("sample 2: ") and words in str(caught.value)


@pytest.mark.parametrize("source", [[], (), iter([]), Reader([])])
def test_no_samples(source, tmp_path):
    with pytest.raises(InputError, match="no calibration samples") as caught:
        bytes_of(model_of(), tmp_path, samples=source)
    assert caught.value.status == FILE_FAILED


def test_an_error_of_the_caller_stays_what_it_is(tmp_path):
    def broken():
        yield feeds_for()[0]
        raise KeyError("of the caller")

    with pytest.raises(KeyError, match="of the caller"):
        bytes_of(model_of(), tmp_path, samples=broken())
    assert not (tmp_path / "out.onnx").exists()


# ---------------------------------------------------------------- a second reading


def equal(one: Feeds, two: Feeds) -> bool:
    """Whether two readings gave the same names, types and bits."""
    return len(one) == len(two) and all(
        a.keys() == b.keys()
        and all((a[n].dtype, a[n].shape) == (b[n].dtype, b[n].shape) for n in a)
        and all(a[n].tobytes() == b[n].tobytes() for n in a)
        for a, b in zip(one, two)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_can_be_read_once_is_kept_in_files(kind):
    feeds = [*feeds_for(kind), {"file": np.float32(1) * np.ones(()), "a/b\\c": np.zeros((0, 3))}]
    spool = rereadable(feed for feed in feeds)
    assert isinstance(spool, Spool)
    folder = Path(spool.folder.name)
    assert list(folder.iterdir()) == []  # nothing is read before somebody asks
    assert equal(list(spool), feeds) and len(list(folder.iterdir())) == len(feeds)
    assert equal(list(spool), feeds)
    del spool
    assert not folder.exists()


def test_the_second_reading_may_begin_before_the_first_ends():
    feeds, drawn = feeds_for(), []
    spool = rereadable(drawn.append(place) or feed for place, feed in enumerate(feeds))
    first = iter(spool)
    begun = [next(first), next(first)]
    assert drawn == [0, 1]  # one at a time
    assert equal(list(spool), feeds)
    assert equal(begun + list(first), feeds) and drawn == [0, 1, 2, 3, 4]


def test_what_can_be_read_again_is_not_kept():
    feeds = feeds_for()
    for source in (feeds, tuple(feeds), as_samples(Rewound(feeds))):
        assert rereadable(source) is source
        assert equal(list(source), feeds) and equal(list(source), feeds)
    once = rereadable(as_samples(Reader(feeds)))
    assert isinstance(once, Spool)
    assert equal(list(once), feeds) and equal(list(once), feeds)


def test_two_observations_of_a_generator():
    graph, feeds = prepare(model_of()), feeds_for()
    spool = rereadable(feed for feed in feeds)
    whole = observe(graph, feeds)
    for _ in range(2):
        again = observe(graph, spool)
        assert again.samples == 5
        for name, one in whole.tensors.items():
            assert np.array_equal(one.counts.bins, again.tensors[name].counts.bins)


@pytest.mark.parametrize(
    "sample, words",
    [
        ([1, 2], "sample 1: a list; expected a dictionary"),
        ({"x": np.array([{}])}, 'sample 1: "x" holds objects: expected numbers'),
    ],
)
def test_what_cannot_be_kept(sample, words):
    with pytest.raises(InputError) as caught:
        list(rereadable(iter([{"x": np.ones(1)}, sample])))
    assert words in str(caught.value)


def test_a_full_disk_is_told(monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(InputError, match="cannot keep sample 0 .*: No space left") as caught:
        list(rereadable(iter([{"x": np.ones(1)}])))
    assert caught.value.status == FILE_FAILED


def test_many_hands_take_each_sample_once():
    for source in (rereadable(feed for feed in feeds_for(count=40)), feeds_for(count=40)):
        take, taken, lock = shared(source), [], threading.Lock()

        def work(take=take, taken=taken, lock=lock):
            while (sample := take()) is not None:
                with lock:
                    taken.append(sample["x"].tobytes())

        hands = [threading.Thread(target=work) for _ in range(4)]
        for hand in hands:
            hand.start()
        for hand in hands:
            hand.join()
        assert sorted(taken) == sorted(feed["x"].tobytes() for feed in feeds_for(count=40))
