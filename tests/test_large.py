"""Models that do not fit into one protobuf message: the limit is lowered, so that small ones do not."""

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest

import ptqlit
from ptqlit.model import runtime
from ptqlit.model.graph import external_files, read_proto
from ptqlit.pipeline import Flags, apply, convert

DIGITS = Path(__file__).parents[1] / "data/digits"
CONFIG = "[common_quant_param]\nquant_type=FULL_QUANT\nskip_quant_node={skip}\nworkspace={folder}\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The digits model with its weights in a file beside it."""
    path = tmp_path / "float" / "digits.onnx"
    path.parent.mkdir()
    onnx.save(
        onnx.load(DIGITS / "model.onnx"),
        path,
        save_as_external_data=True,
        location="digits.data",
        size_threshold=1024,
    )
    return path


@pytest.fixture
def samples() -> list[dict]:
    rng = np.random.default_rng(0)
    return [{"input": rng.normal(size=(1, 1, 32, 32)).astype(np.float32)} for _ in range(4)]


def quantized(source: Path, folder: Path, samples: list[dict], skip: str, **flags):
    """A conversion of the digits model, with a folder for temporary files."""
    folder.mkdir(exist_ok=True)
    config = ptqlit.Config.from_text(CONFIG.format(skip=skip, folder=folder))
    return convert(source, config, folder / "int8", samples=samples, flags=Flags(**flags))


def test_same_numbers_in_two_files(source, samples, tmp_path, monkeypatch):
    """Loaded, calibrated, tried and written through paths, a model gives the same numbers."""
    whole = quantized(source, tmp_path / "whole", samples, "fc", infer=True)
    monkeypatch.setattr(runtime, "MESSAGE_LIMIT", 1000)
    monkeypatch.setattr(runtime, "INSIDE", 1 << 12)
    monkeypatch.setattr(onnx.ModelProto, "SerializeToString", refuse_large)
    split = quantized(source, tmp_path / "split", samples, "fc", infer=True)
    monkeypatch.undo()
    names = external_files(read_proto(split.path))
    assert len(names) == 1 and not external_files(read_proto(whole.path))
    left = {path.name for path in split.path.parent.iterdir()}
    assert left == {split.path.name, *names}
    assert (split.table.found, split.table.planned) == (whole.table.found, whole.table.planned)
    outputs = [runtime.open_session(c.path).run(None, samples[0])[0] for c in (whole, split)]
    assert np.array_equal(*outputs)


def refuse_large(proto, **options):
    """What protobuf does with more than 2 GB."""
    data = PLAIN(proto, **options)
    if len(data) > 400_000:
        raise ValueError("Message onnx.ModelProto exceeds maximum protobuf size of 2GB")
    return data


PLAIN = onnx.ModelProto.SerializeToString


def test_written_again(source, samples, tmp_path, monkeypatch):
    """A Plan gives the same two files; a second conversion replaces both."""
    monkeypatch.setattr(runtime, "MESSAGE_LIMIT", 1000)
    monkeypatch.setattr(runtime, "INSIDE", 1 << 12)
    first = quantized(source, tmp_path / "out", samples, "fc")
    hashes = {p.name: digest(p) for p in first.path.parent.iterdir()}
    again = apply(first.plan, source, tmp_path / "again" / "int8")
    assert {p.name: digest(p) for p in again.path.parent.iterdir()} == hashes
    other = quantized(source, tmp_path / "out", samples, "head_pointwise")
    names = {p.name for p in other.path.parent.iterdir()}
    assert names == {"int8.onnx", *external_files(read_proto(other.path))} and names != set(hashes)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_workspace_is_used(source, samples, tmp_path, monkeypatch):
    """The temporary files stand in the configured folder, and a wrong folder is named."""
    monkeypatch.setattr(runtime, "MESSAGE_LIMIT", 1000)
    seen, plain = [], runtime.save_split

    def spy(model, path, data):
        seen.append(path.parent.parent)
        return plain(model, path, data)

    monkeypatch.setattr(runtime, "save_split", spy)
    quantized(source, tmp_path / "work", samples, "fc")
    assert tmp_path / "work" in seen
    config = ptqlit.Config.from_text(CONFIG.format(skip="fc", folder=tmp_path / "none"), "my.cfg")
    with pytest.raises(ptqlit.InputError, match="workspace=.*expected a folder") as caught:
        convert(source, config, tmp_path / "x", samples=samples)
    assert caught.value.status == -3


def test_missing_data_is_named(source, samples, tmp_path):
    """A model whose data file is gone."""
    (source.parent / "digits.data").unlink()
    with pytest.raises(ptqlit.InputError, match="digits.data") as caught:
        quantized(source, tmp_path / "out", samples, "fc")
    assert caught.value.status == -200
