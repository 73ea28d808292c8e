"""Whole configuration files: the reference's examples, its parsing table, and files gone wrong.

FUZZ=n in the environment sets the number of mutated files (20,000 without it).
"""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ptqlit.config.ascend import all_shapes, expand
from ptqlit.config.explain import SAMPLES, explain, missing, sample
from ptqlit.config.file import IDLE_SECTIONS, SECTIONS, Config, flag_warnings, requirements
from ptqlit.errors import FILE_FAILED, INPUT_INVALID, InputError

FOLDER = Path(__file__).parent / "configs"
FILES = sorted(FOLDER.glob("*.cfg"))
MUTATIONS = int(os.environ.get("FUZZ", "20000"))
FULL = "[common_quant_param]\nquant_type=FULL_QUANT\n"
WEIGHT = "[common_quant_param]\nquant_type=WEIGHT_QUANT\n"


def read(text: str) -> Config:
    return Config.from_text(text, "f.cfg")


# ---------------------------------------------------------------- the reference's examples

EXPECTED = {  # file -> what it must say
    "weight_8bit": "common.quant_type=WEIGHT_QUANT common.bit_num=8",
    "weight_7bit": "common.bit_num=7",
    "weight_9bit": "common.bit_num=9 common.min_quant_weight_channel=16",
    "weight_debug": "common.debug_info_save_path=.",
    "weight_on_the_fly": "weight.dequant_strategy=ON_THE_FLY weight.bias_correction=False",
    "weight_skip": "common.skip_quant_node=('first_conv', 'fc') common.enable_encode=False",
    "mixed": "common.bit_num=0 mixed_bit.init_scale=0.02 common.min_quant_weight_size=5000",
    "mixed_auto_tune": "mixed_bit.auto_tune=True mixed_bit.init_scale=0.02",
    "mixed_auto_tune_pictures": "mixed_bit.use_cv_data=True mixed_bit.max_iterations=80",
    "dynamic": "common.quant_type=DYNAMIC_QUANT dynamic.quant_strategy=ALWC",
    "dynamic_acwl": "dynamic.quant_strategy=ACWL",
    "full": "full.per_channel=True data.calibrate_size=100 data.resize_method=LINEAR",
    "full_per_channel": "full.per_channel=True full.bias_correction=True",
    "full_per_layer": "full.per_channel=False",
    "full_kl": "full.activation_quant_method=KL",
    "full_removal_outlier": "full.activation_quant_method=REMOVAL_OUTLIER",
    "nvgpu": "full.target_device=NVGPU full.bias_correction=True",
    "nvgpu_r1.8": "full.target_device=NVGPU",
    "dsp": "full.target_device=DSP full.bias_correction=False",
    "ascend_static": "full.target_device=ASCEND",
    "ascend_dynamic": "ascend.input_shape=(('input_1',(-1,32,32,4)),)",
    "ascend_image_size": "ascend.input_shape=(('a',(1,-1,-1,3)),)",
    "bin": "data.input_type=BIN data.calibrate_path=(('input:0','calib/a'),('mask','calib/b'))",
}


def test_every_example_has_its_expectation():
    assert {path.stem for path in FILES} == set(EXPECTED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_example(path):
    config = Config.from_file(path)
    assert config.warnings == ()
    for wish in re.findall(r"(\w+)\.(\w+)=((?:\([^ ].*\)|\S+))", EXPECTED[path.stem]):
        assert str(getattr(getattr(config, wish[0]), wish[1])).replace(" ", "") in (
            wish[2].replace(" ", ""),
            wish[2].split(" ")[0],
        )
    assert Config.from_text(str(config)) == config
    text = explain(config)
    for (title, key), line in config.lines.items():
        assert re.search(
            rf"\[{title}\](\n  .*)*\n  {key}=.*  {re.escape(str(path))}:{line}\n", text
        )
    assert "Missing for a conversion:\n" in text


def test_ascend_without_its_flag():
    config = Config.from_file(FOLDER / "ascend_static.cfg")
    assert ":21: [full_quant_param] target_device=ASCEND without" in flag_warnings(config)[0]
    assert flag_warnings(config, "ascend_oriented") == []


LESSONS = sorted((Path(__file__).parents[1] / "nbs").rglob("*.ipynb"))


def test_examples_of_the_lessons_are_valid():
    """Every block of a lesson that is marked as a configuration parses; at most it is part of a file."""
    blocks = [
        (path.name, block)
        for path in LESSONS
        for cell in json.loads(path.read_text())["cells"]
        if cell["cell_type"] == "markdown"
        for block in re.findall(r"```ini\n(.*?)```", "".join(cell["source"]), re.DOTALL)
    ]
    assert len(blocks) >= len(SECTIONS)
    for name, block in blocks:
        head = "" if "quant_type=" in block else FULL
        warnings = Config.from_text(head + block, name).warnings
        assert [line for line in warnings if "is not used with" not in line] == [], name


def test_samples():
    for kind in SAMPLES:
        config = Config.from_text(sample(kind), kind)
        assert config.warnings == () and Config.from_text(str(config)) == config
        assert all(
            line.startswith("#") or "=" in line or line.startswith("[") or not line
            for line in sample(kind).splitlines()
        )
    with pytest.raises(InputError, match='Nearest: "dynamic"'):
        sample("dynamics")


# ---------------------------------------------------------------- Appendix A.6


def data(line: str) -> str:
    return f"{FULL}[data_preprocess_param]\n{line}"


def ascend(shape: str, dims: str) -> str:
    return f"{FULL}[ascend_context]\ninput_shape={shape}\ndynamic_dims={dims}"


ACCEPTED = [  # text, attribute, value, words of the one warning (ours; "" for none)
    (
        data("calibrate_path=input:0:calib/a,mask:calib/b"),
        "data.calibrate_path",
        (("input:0", "calib/a"), ("mask", "calib/b")),
        "",
    ),
    (data("calibrate_path=x:'calib/a'"), "data.calibrate_path", (("x", "calib/a"),), ""),
    (data("calibrate_path=x:'c:/a'"), "data.calibrate_path", (("x", "c:/a"),), "quotes"),
    (FULL + "skip_quant_node=a, b,", "common.skip_quant_node", ("a", "b"), "blanks"),
    (
        data("normalize_mean=[1, 2, 3]\nnormalize_std=[1, 1, 1]"),
        "data.normalize_mean",
        (1, 2, 3),
        "",
    ),
    (
        data("normalize_mean=[1 , 2, 3]\nnormalize_std=[1,1,1]"),
        "data.normalize_mean",
        (1, 2, 3),
        "blanks",
    ),
    (FULL + "bit_num=8 # eight", "common.bit_num", 8, "comment"),
    (FULL + "bit_num=", "common.bit_num", 8, "not given"),
    ('[common_quant_param]\nquant_type="WEIGHT_QUANT"', "common.quant_type", "WEIGHT_QUANT", ""),
    (
        f"{WEIGHT}bit_num=0\n[mixed_bit_weight_quant_param]\nauto_tune=TRUE",
        "mixed_bit.auto_tune",
        True,
        "",
    ),
]
REFUSED = [  # text, status, line, words
    (
        data("normalize_mean=[]\nnormalize_std=[1]"),
        INPUT_INVALID,
        4,
        "expected numbers in brackets",
    ),
    (FULL + "bit_num==8", FILE_FAILED, 3, "expected one key=value"),
    ("[common_quant_param]\nquant_type=weight_quant", INPUT_INVALID, 2, 'Nearest: "WEIGHT_QUANT"'),
    (f"{WEIGHT}[mixed_bit_weight_quant_param]\nauto_tune=1", INPUT_INVALID, 4, "true or false"),
    (ascend("a:[-1,-1,32,3]", "[1]"), INPUT_INVALID, 4, "batch alone or for two of"),
]


@pytest.mark.parametrize("text, attribute, value, words", ACCEPTED)
def test_parsing_table_accepted(text, attribute, value, words):
    config = read(text)
    part, key = attribute.split(".")
    assert getattr(getattr(config, part), key) == value
    assert len(config.warnings) == bool(words)
    assert not words or words in config.warnings[0]
    assert Config.from_text(str(config)) == config


@pytest.mark.parametrize("text, status, line, words", REFUSED)
def test_parsing_table_refused(text, status, line, words):
    with pytest.raises(InputError) as caught:
        read(text)
    assert caught.value.status == status
    assert str(caught.value).startswith(f"f.cfg:{line}: ") and words in str(caught.value)


def test_parsing_table_shapes():
    batch = Config.from_file(FOLDER / "ascend_dynamic.cfg").ascend
    sizes = expand(batch.input_shape, batch.dynamic_dims)
    assert (sizes.kind, [n for (n,) in sizes.sizes]) == ("batch", [1, 2, 3, 4, 8, 16])
    image = Config.from_file(FOLDER / "ascend_image_size.cfg").ascend
    assert expand(image.input_shape, image.dynamic_dims) == ("image", ((16, 20), (17, 20)))
    assert all_shapes(image.input_shape, image.dynamic_dims)[1] == {"a": (1, 17, 20, 3)}


# ---------------------------------------------------------------- traps

TRAPS = [  # text, words of the one warning
    (FULL + "[comon_quant_param]\nbit_num=7", "f.cfg:3: section [comon_quant_param] is not known"),
    (FULL + "[micro_param]\ntarget=ARM", "f.cfg:3: section [micro_param] has no meaning for ONNX"),
    (
        FULL + "[weight_quant_param]\nper_channel=false",
        "f.cfg:3: section [weight_quant_param] is not",
    ),
    (
        FULL + "min_quant_weight_channel=4",
        "f.cfg:3: [common_quant_param] min_quant_weight_channel=4",
    ),
    (
        FULL + "bit_num=9\nbit_num=8",
        "f.cfg:3: [common_quant_param] bit_num=9: given again in line 4",
    ),
    (FULL + "\tbit_num=8", "f.cfg:3: a tab is taken as a blank"),
    (FULL + "bit_num=8\xa0", "f.cfg:3: the character U+00A0 is taken as a blank"),
    (FULL + "bit_num=8=", "f.cfg:3: the last = is dropped"),
    (FULL + "  # indented", "f.cfg:3: the text after # is taken as a comment"),
    ("bit_num=3\n" + FULL, "f.cfg:1: bit_num stands before any section"),
    ("\ufeff" + FULL, "f.cfg:1: the byte order mark"),
    (FULL.replace("\n", "\r"), "f.cfg:1: carriage returns"),
    (FULL + "bit_n\rum=8", "f.cfg:3: a carriage return inside a line"),
    (
        data("resize_width=8\nresize_height=8"),
        "f.cfg:4: [data_preprocess_param] resize_width=8: nothing",
    ),
    (data("calibrate_path=x:a,x:b"), "named twice"),
    (
        FULL + "[full_quant_param]\nactivation_quant_method=RemovalOutlier",
        "taken as REMOVAL_OUTLIER",
    ),
    (FULL + "[full_quant_param]\npercentile=99", "only PERCENTILE looks at it"),
    (
        WEIGHT + "[weight_quant_param]\nmax_segments=4",
        "f.cfg:4: [weight_quant_param] max_segments=4: no",
    ),
]


@pytest.mark.parametrize("text, words", TRAPS)
def test_traps_warn_once(text, words):
    config = read(text)
    assert len(config.warnings) == 1 and words in config.warnings[0]
    assert config.warnings[0] in explain(config)


def test_every_idle_section_warns_once():
    for title in IDLE_SECTIONS:
        (warning,) = read(f"{FULL}[{title}]\nanything=goes\n[{title}]\nmore=1").warnings
        assert warning.startswith(f"f.cfg:3: section [{title}] has no meaning for ONNX: ")


def test_advice():
    for text, words in {
        FULL + "[full_quant_param]\ntarget_device=KIRIN": "leave target_device out",
        data("resize_method=NEARST"): 'Nearest: "NEAREST"',
        "[common_quant_param]\nbit_num=8": "quant_type is missing",
        "": "quant_type is missing",
    }.items():
        with pytest.raises(InputError, match=words) as caught:
            read(text)
        assert caught.value.status == INPUT_INVALID


LOST = [  # text, the sentence that says where the missing thing was seen
    (
        "[common_quant_parm]\nquant_type=FULL_QUANT",
        "Line 2 has it under [common_quant_parm], which",
    ),
    ("[Common_Quant_Param]\nquant_type=FULL_QUANT", 'Nearest: "common_quant_param"'),
    ("[quant]\nquant_type=FULL_QUANT", "Line 2 has it under [quant], which is no section."),
    ("[common_quant_parm]\nbit_num=8", "Line 1 has [common_quant_parm], which is no section."),
    ("quant_type=FULL_QUANT\n[common_quant_param]", "Line 1 has it, but it stands before any"),
    ("[common_quant_param]\nquant_type=", "Line 2 has it, but it has no value."),
    (FULL + "activation_quant_method=KL", "It belongs into [full_quant_param]."),
    (FULL + "per_channel=false", "It belongs into [full_quant_param] or [weight_quant_param]."),
    (FULL + "[full_quant_param]\nquant_type=FULL_QUANT", "It belongs into [common_quant_param]."),
    (
        data("resize_method=CUBIC\nresize_width=8\nresize_height="),
        "expected resize_height beside it. Line 6 has it, but it has no value.",
    ),
    (
        data("normalize_mean=[1,2,3]\n[data_preprocess]\nnormalize_std=[1,2,3]"),
        "expected normalize_std beside it. Line 6 has it under [data_preprocess], which is no",
    ),
]


@pytest.mark.parametrize("text, words", LOST)
def test_what_is_missing_but_stands_in_the_file(text, words):
    with pytest.raises(InputError) as caught:
        read(text)
    assert words in str(caught.value) and caught.value.status == INPUT_INVALID


def test_what_a_conversion_misses_but_stands_in_the_file():
    (line,) = requirements(read(FULL + "[data_preproces_param]\ncalibrate_size=3"))
    assert "Line 3 has [data_preproces_param], which is no section. Nearest: " in line
    lines = requirements(read(data("calibrate_size=\ninput_type=BIN\n[data]\ncalibrate_path=x:a")))
    assert lines[0].endswith("Line 7 has it under [data], which is no section.")
    assert lines[1].endswith("Line 4 has it, but it has no value.")
    assert [line for line in requirements(read(FULL)) if "Line" in line] == []


def test_nothing_is_missing_twice():
    assert requirements(read(FULL)) == missing(read(FULL))
    for kind in ("weight", "dynamic"):
        assert all("not supported yet" in line for line in missing(read(sample(kind))))


# ---------------------------------------------------------------- random valid files

NAME = st.text(
    st.characters(exclude_characters="=,;:\"#'\r\n[]", exclude_categories=["Cs", "Cc", "Z"]),
    min_size=1,
    max_size=6,
)
WORD = {
    "integer": st.sampled_from(["1", "+50", "65535"]),
    "number": st.floats(0.001, 0.999).map(repr),
    "boolean": st.sampled_from(["true", "False", "TRUE"]),
    "list": st.lists(NAME | st.just('"a #b"'), min_size=1, max_size=3).map(", ".join),
    "text": NAME,
    "path": NAME | st.just('"# c"'),
    "vector": st.lists(st.floats(0.01, 1e6), min_size=3, max_size=3).map(str),
    "map": st.dictionaries(NAME, NAME | st.just("'c:/a, b'"), min_size=1, max_size=3).map(
        lambda pairs: ",".join(f"{k}:{v}" for k, v in pairs.items())
    ),
    "shapes": st.just("x:0:[-1,3,8,8];y:[2,3]"),
    "sizes": st.sampled_from(["[1~4],[8],[16]", "[ 2 ];[]"]),
}
TOGETHER = [
    ("normalize_mean", "normalize_std"),
    ("center_crop_width", "center_crop_height"),
    ("resize_method", "resize_width", "resize_height"),
    ("input_shape", "dynamic_dims"),
]


FIXED = {"percentile": "99.5", "image_to_format": "RGB", "max_iterations": "50"}


@st.composite
def files(draw) -> str:
    """The text of a valid configuration."""
    blocks = []
    for part, cls in SECTIONS.items():
        names = set(draw(st.sets(st.sampled_from(list(cls.model_fields)))))
        for group in TOGETHER:
            names |= set(group) if names & set(group) else set()
        names -= {"quant_type", "bit_num", "enable_encode"}
        if part == "common":
            names.add("quant_type")
        lines = []
        for name in sorted(names, key=lambda name: draw(st.integers(0, 9))):
            kind = cls.kind(name)
            value = draw(st.sampled_from(kind.words) if kind.words else WORD[kind.name])
            lines.append(f"{name}={FIXED.get(name, value)}")
        if names or draw(st.booleans()):
            blocks.append("\n".join([f"[{cls.title}]", *lines]))
    return "\n".join(draw(st.permutations(blocks)))


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(files())
def test_printed_configurations_read_to_themselves(text):
    try:
        config = read(text)
    except InputError as error:
        assume("center_crop" not in str(error))
        raise
    again = read(str(config))
    assert again == config
    assert str(again) == str(config)
    assert len(again.lines) == len(config.lines)
    assert explain(config)


# ---------------------------------------------------------------- anything at all


def check(path: Path, content: bytes) -> Config | None:
    """A Config, or an InputError that is one line and has a line number where one is at fault."""
    path.unlink(missing_ok=True)  # writing over a file is 40 times slower on some file systems
    path.write_bytes(content)
    try:
        config = Config.from_file(path)
    except InputError as error:
        message = str(error)
        assert error.status in (INPUT_INVALID, FILE_FAILED)
        place = re.match(re.escape(str(path)) + r":(\d+): ", message)
        assert place or "quant_type is missing" in message, message
        assert not place or 1 <= int(place[1]) <= len(re.split(b"\n|\r", content))
        assert message.isprintable() and len(message) < 700
        return None
    explain(config)
    assert Config.from_text(str(config)) == config
    return config


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=80), st.binary(max_size=20), st.sampled_from(FILES), st.integers(0, 999))
def test_any_bytes(tmp_path_factory, content, piece, path, place):
    target = tmp_path_factory.getbasetemp() / "any.cfg"
    check(target, content)
    whole = path.read_bytes()
    place %= len(whole)
    check(target, whole[:place] + piece + whole[place:])


PIECES = [
    p.encode()
    for p in (
        "=",
        "==",
        " ",
        "\t",
        "\n",
        "\r",
        "\0",
        "#",
        " # ",
        '"',
        "'",
        "[",
        "]",
        ",",
        ";",
        ":",
        "~",
        "-1",
        "0",
        "9" * 40,
        "1e999",
        "nan",
        "0x1p3",
        "true",
        "KIRIN",
        "é",
        "\ufeff",
        "\u2028",
        "[x]",
        "RemovalOutlier",
        "[common_quant_param]",
        "[weight_quant_param]",
        "[registry]\nplugin_path=a.so",
        "[model_param]",
    )
] + [b"\xff\xfe", b"\x80"]


def mutate(chance: random.Random, content: bytes, others: list[bytes]) -> bytes:
    """One to four small accidents."""
    for _ in range(chance.randint(1, 4)):
        place, end = sorted(chance.randrange(len(content) + 1) for _ in range(2))
        lines = content.split(b"\n")
        number = chance.randrange(len(lines))
        accident = chance.randrange(8)
        if accident == 0:  # cut a little
            content = content[:place] + content[min(end, place + 8) :]
        elif accident in (1, 2):  # put something in
            content = content[:place] + chance.choice(PIECES) + content[place:]
        elif accident == 3:  # flip a bit
            at = min(place, len(content) - 1)
            flipped = bytes([content[at] ^ 1 << chance.randrange(8)]) if content else b"x"
            content = content[:at] + flipped + content[at + 1 :]
        elif accident == 4:  # a line away, or twice
            lines[number : number + 1] = [lines[number]] * chance.choice((0, 2))
            content = b"\n".join(lines)
        elif accident == 5:  # another value
            key = lines[number].split(b"=")[0]
            lines[number] = key + b"=" + chance.choice(PIECES)
            content = b"\n".join(lines)
        elif accident == 6:  # a line from somewhere else
            lines.insert(number, chance.choice(chance.choice(others).split(b"\n")))
            content = b"\n".join(lines)
        else:  # two lines change places
            other = chance.randrange(len(lines))
            lines[number], lines[other] = lines[other], lines[number]
            content = b"\n".join(lines)
    return content


def test_mutated_files(tmp_path):
    """Deterministic accidents on the files above: parsed, or InputError; never anything else."""
    chance, parsed = random.Random(20), 0
    contents = [path.read_bytes() for path in FILES]
    for _ in range(MUTATIONS):
        content = mutate(chance, chance.choice(contents), contents)
        parsed += check(tmp_path / "mutated.cfg", content) is not None
    assert 0.1 < parsed / MUTATIONS < 0.9


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "junk", [b"what is this", b"a=b=c", b"[open", b"no_such_key=1", b"x\0=1", b"\x80"]
)
def test_the_broken_line_is_named(tmp_path, path, junk):
    lines = path.read_bytes().split(b"\n")
    heads = [n for n, line in enumerate(lines) if line.startswith(b"[")]
    for number in range(heads[0] + 1, len(lines)):
        broken = b"\n".join([*lines[:number], junk, *lines[number:]])
        target = tmp_path / "broken.cfg"
        target.write_bytes(broken)
        with pytest.raises(InputError) as caught:
            Config.from_file(target)
        assert str(caught.value).startswith(f"{target}:{number + 1}: ")
