"""Every key of every section: default, each word, the ends of its range, wrong types, wrong names.

The cases are made from the schema; what the schema must say stands in TABLE, typed from the
specification sheet (sections 2.2 to 2.8).
"""

from __future__ import annotations

import math

import pytest

from ptqlit.config.file import SECTIONS, Config
from ptqlit.config.schema import key_rows, show
from ptqlit.errors import INPUT_INVALID, InputError

TABLE = """
common quant_type none WEIGHT_QUANT, FULL_QUANT, DYNAMIC_QUANT r1.8
common bit_num 8 0..16 r1.8
common min_quant_weight_size 0 0..65535 r1.8
common min_quant_weight_channel 16 0..65535 r1.8
common skip_quant_node none name,name r1.8
common debug_info_save_path none folder r1.8
common enable_encode true true, false master
common workspace none folder -
weight dequant_strategy none ON_THE_FLY -
weight quant_strategy MAX_MIN MAX_MIN, GPTQ -
weight per_channel true true, false -
weight bias_correction true true, false -
weight update_mindir true true, false -
weight max_segments 1 -2147483648..2147483647 -
mixed_bit init_scale 0.02 (0, 1) r1.8
mixed_bit auto_tune false true, false r1.8
mixed_bit use_cv_data false true, false -
mixed_bit max_iterations 40 40..65535 -
data calibrate_path none name:folder,... r1.8
data calibrate_size none 1..65535 r1.8
data input_type none IMAGE, BIN r1.8
data image_to_format BGR RGB, GRAY, BGR r1.8
data normalize_mean none [a, b, ...] r1.8
data normalize_std none [a, b, ...] r1.8
data resize_width -1 1..65535 r1.8
data resize_height -1 1..65535 r1.8
data resize_method none LINEAR, NEAREST, CUBIC r1.8
data center_crop_width -1 1..65535 r1.8
data center_crop_height -1 1..65535 r1.8
full activation_quant_method MAX_MIN MAX_MIN, KL, REMOVAL_OUTLIER, PERCENTILE, MSE r1.8
full percentile 99.999 (50, 100) ptqlit
full bias_correction true true, false r1.8
full per_channel true true, false r1.8
full target_device CPU CPU, NVGPU, DSP, ASCEND r1.8
full smooth_alpha 0.5 any -
full enable_smooth_shift false true, false -
dynamic quant_strategy ALWC ALWC, ACWL master
transform export_precision_mode QUANT QUANT, FLOAT32 -
ascend input_shape none name:[d,...];... master
ascend dynamic_dims none [a~b],[c];... master
registry disable_fusion off on, off -
registry fusion_blacklists none any -
registry plugin_path none any -
""".strip().splitlines()
COMPILER_FLAGS = """input_format precision_mode op_select_impl_mode output_type buffer_optimize
fusion_switch_config_file_path insert_op_config_file_path om_file_path aoe_mode dump_model_name
provider plugin_custom_ops enable_custom_op custom_fusion_pattern op_attrs device_id
inputs_to_variable outputs_to_variable""".split()

BESIDE = {  # keys that need others beside them
    "normalize_mean": "normalize_std=[1, 1, 1]",
    "normalize_std": "normalize_mean=[0, 0, 0]",
    "resize_method": "resize_width=8\nresize_height=8",
    "center_crop_width": "center_crop_height=8",
    "center_crop_height": "center_crop_width=8",
    "dynamic_dims": "input_shape=x:[-1,3,8,8]",
    "percentile": "activation_quant_method=PERCENTILE",
}
WRONG = {  # texts of another type
    "integer": ["8.0", "0x10", "eight", "8 8", "1_0", "٣", "true"],
    "number": ["half", "0,5", "1_0.5", "nan", "true", "[0.1]"],
    "boolean": ["1", "0", "yes", "on", "truee"],
    "word": ["nothing", "1", "true"],
    "vector": ["1", "1, 2, 3", "[]", "[1; 2; 3]", "[a, b, c]", "[1, 2", "[1, , 3]"],
    "map": ["folder", ":folder", "x:", ","],
    "shapes": ["1,2", "x", "x:1,2", "x:[]", "x:[0]", "x:[1.5]", "x:[-2]"],
    "sizes": ["4", "1~4", "[4~1]", "[0]", "[x]", "[1-4]", "[1][2]"],
    "list": [],
    "text": [],
    "path": [],
}
RIGHT = {  # one text of each type that has no words and no ends
    "vector": ["[1, 2.5, 1e2]"],
    "map": ["x:folder", "x:0:a/b,y:c"],
    "shapes": ["x:[1,3,8,8]", "x:0:[1];y:[2,3]"],
    "sizes": ["[1~4],[8],[16]"],
    "list": ["a", "a,b/c,d:0"],
    "text": ["some text", "a.so;b.so"],
    "path": ["folder/debug"],
    "boolean": ["true", "false", "TRUE", "False"],
}
KEYS = [(part, name) for part, cls in SECTIONS.items() for name in cls.model_fields]
KINDS = [(part, name, SECTIONS[part].kind(name)) for part, name in KEYS]


def config_of(part: str, name: str, text: str) -> Config:
    """A configuration with one key in line 2 of its section, and what must stand beside it."""
    title = SECTIONS[part].title
    lines = [f"[{title}]", f"{name}={text}", *BESIDE.get(name, "").splitlines()]
    if part != "common":
        lines += ["[common_quant_param]"]
    mode = "WEIGHT_QUANT" if name == "bit_num" else "FULL_QUANT"
    lines += [] if name == "quant_type" else [f"quant_type={mode}"]
    return Config.from_text("\n".join(lines), "f.cfg")


def refusal(part: str, name: str, text: str) -> str:
    """The error for a value; it must be one line and name file, line, section and key."""
    with pytest.raises(InputError) as caught:
        config_of(part, name, text)
    message = str(caught.value)
    assert caught.value.status == INPUT_INVALID
    assert message.startswith(f"f.cfg:2: [{SECTIONS[part].title}] {name}={text}: expected "), (
        message
    )
    return message


def cases(*names: str) -> list:
    return [
        pytest.param(p, n, k, id=f"{p}.{n}") for p, n, k in KINDS if not names or k.name in names
    ]


def test_the_schema_says_what_the_sheet_says():
    rows = [
        f"{part} {key} {default} {legal} {since}"
        for part, cls in SECTIONS.items()
        for key, _, default, legal, _, since in key_rows(cls)
        if key not in COMPILER_FLAGS
    ]
    assert rows == TABLE
    assert len(KEYS) == len(TABLE) + len(COMPILER_FLAGS)
    assert set(COMPILER_FLAGS) < set(SECTIONS["ascend"].model_fields)


@pytest.mark.parametrize("part, name, kind", cases())
def test_default(part, name, kind):
    config = Config.from_text("[common_quant_param]\nquant_type=FULL_QUANT")
    if name != "quant_type":
        assert getattr(getattr(config, part), name) == SECTIONS[part].model_fields[name].default
    assert (SECTIONS[part].title, name) not in config.lines or name == "quant_type"


@pytest.mark.parametrize("part, name, kind", cases("word"))
def test_each_word(part, name, kind):
    for word in kind.words:
        assert getattr(getattr(config_of(part, name, word), part), name) == word
        assert getattr(getattr(config_of(part, name, f' "{word}" '), part), name) == word
        slip = word.lower() if word != word.lower() else word.upper()
        if len(word) > 2:
            assert f'"{word}"' in refusal(part, name, slip)


@pytest.mark.parametrize("part, name, kind", cases("integer"))
def test_ends_of_integers(part, name, kind):
    low, high = (int(end) for end in kind.range.split(".."))
    for value in (low, high):
        assert getattr(getattr(config_of(part, name, str(value)), part), name) == value
    for value in (low - 1, high + 1, 10**25, -(10**25)):
        assert refusal(part, name, str(value)).endswith(f"from {low} to {high}.")


@pytest.mark.parametrize("part, name, kind", cases("number"))
def test_ends_of_numbers(part, name, kind):
    if kind.range == "any":
        low, high = -math.inf, math.inf
    else:
        low, high = (float(end) for end in kind.range[1:-1].split(","))
    for value in (math.nextafter(low, high), math.nextafter(high, low)):
        assert getattr(getattr(config_of(part, name, repr(value)), part), name) == value
    for value in (low, high):
        refusal(part, name, repr(value))


@pytest.mark.parametrize("part, name, kind", cases(*RIGHT))
def test_right_types(part, name, kind):
    for text in RIGHT[kind.name]:
        value = getattr(getattr(config_of(part, name, text), part), name)
        again = show(SECTIONS[part], name, value)
        assert getattr(getattr(config_of(part, name, again), part), name) == value


@pytest.mark.parametrize("part, name, kind", cases())
def test_wrong_types(part, name, kind):
    for text in WRONG[kind.name]:
        if text not in kind.words:
            refusal(part, name, text)


@pytest.mark.parametrize("part, name", KEYS)
def test_unknown_names(part, name):
    for slip in (name + "s", name[1:], name.upper(), name.replace("_", "", 1) + "x"):
        with pytest.raises(InputError) as caught:
            config_of(part, slip, "1")
        start = f'f.cfg:2: [{SECTIONS[part].title}] has no key "{slip}". Nearest: '
        assert str(caught.value).startswith(start) and f'"{name}"' in str(caught.value)


@pytest.mark.parametrize("part, name, kind", cases())
def test_keys_without_meaning_warn_once(part, name, kind):
    idle = SECTIONS[part].fact(name, "idle")
    some = {"integer": ["50"], "number": ["99" if name == "percentile" else "0.6"], **RIGHT}
    text = (kind.words or some[kind.name])[0]
    if name == "bit_num":
        text = "8"
    lines = [line for line in config_of(part, name, text).warnings if "no meaning for ONNX" in line]
    assert len(lines) == bool(idle)
    assert not idle or lines[0].startswith(f"f.cfg:2: [{SECTIONS[part].title}] {name}={text}: ")


RULES = [  # section, lines, the line at fault, what is expected
    ("common", "bit_num=7\nquant_type=FULL_QUANT", 2, "expected 8 with quant_type=FULL_QUANT."),
    ("common", "quant_type=DYNAMIC_QUANT\nbit_num=16", 3, "expected 8 with quant_type=DYNAMIC"),
    (
        "common",
        "quant_type=WEIGHT_QUANT\nbit_num=0\nenable_encode=false",
        4,
        "expected bit_num=8 or 16",
    ),
    (
        "common",
        "enable_encode=false\nquant_type=WEIGHT_QUANT\nbit_num=9",
        2,
        "expected bit_num=8 or 16",
    ),
    ("data", "normalize_mean=[1,2,3]", 2, "expected normalize_std beside it"),
    ("data", "normalize_std=[1,2,3]\nnormalize_mean=[1,2]", 3, "expected 3 numbers with"),
    ("data", "normalize_mean=[1,2,3]\nnormalize_std=[1,2]", 3, "expected 3 numbers with"),
    (
        "data",
        "image_to_format=GRAY\nnormalize_mean=[1]\nnormalize_std=[1,1,1]",
        4,
        "expected 1 numbers",
    ),
    (
        "data",
        "normalize_mean=[1,2,3]\nnormalize_std=[1,-1,1]",
        3,
        "expected numbers greater than 0",
    ),
    ("data", "normalize_mean=[1,inf,3]\nnormalize_std=[1,1,1]", 2, "expected finite numbers"),
    ("data", "resize_method=LINEAR", 2, "expected resize_width beside it"),
    ("data", "center_crop_height=3", 2, "expected center_crop_width beside it"),
    ("ascend", "dynamic_dims=[1]", 2, "expected an input_shape with -1"),
    ("ascend", "input_shape=x:[-1,3,8,8]", 2, "expected dynamic_dims beside"),
    ("ascend", "input_shape=x:[-1,3,8,8]\ndynamic_dims=[1,2]", 3, "expected 1 sizes"),
]


@pytest.mark.parametrize("part, text, line, expected", RULES)
def test_rules_across_keys_name_the_line_at_fault(part, text, line, expected):
    cls = SECTIONS[part]
    tail = "" if part == "common" else "\n[common_quant_param]\nquant_type=FULL_QUANT"
    with pytest.raises(InputError) as caught:
        Config.from_text(f"[{cls.title}]\n{text}{tail}", "f.cfg")
    assert str(caught.value).startswith(
        f"f.cfg:{line}: [{cls.title}] {text.splitlines()[line - 2]}: "
    )
    assert expected in str(caught.value)
    assert caught.value.status == INPUT_INVALID
