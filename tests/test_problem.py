"""ConvProblem, its text form and the suites, against numbers worked out by hand."""

import dataclasses
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from im2win_tvm.descriptor import descriptor_name
from im2win_tvm.problem import ConvProblem, ProblemError
from im2win_tvm.suites import SUITES, SuiteError, layer, suite

MIB = 1 << 20

# Ho, K, GFLOP, then MiB of input, im2win tensor and im2col matrix: the paper's table at batch 128.
PAPER = {
    "conv1": (55, 363, 26.99, 75.5, 201.2, 536.2),
    "conv2": (56, 363, 27.98, 78.2, 208.4, 555.8),
    "conv3": (111, 147, 29.67, 75.5, 258.4, 884.4),
    "conv4": (109, 3136, 610.45, 1568, 5341, 18193),
    "conv5": (20, 2400, 62.91, 27, 112.5, 468.8),
    "conv6": (10, 2304, 30.20, 18, 45, 112.5),
    "conv7": (222, 27, 21.80, 73.5, 218.5, 649.7),
    "conv8": (110, 576, 228.38, 392, 1155, 3403.1),
    "conv9": (54, 576, 27.52, 98, 283.5, 820.1),
    "conv10": (26, 1152, 25.52, 49, 136.5, 380.2),
    "conv11": (12, 2304, 21.74, 24.5, 63, 162),
    "conv12": (5, 4608, 15.10, 12.2, 26.2, 56.2),
}


def small(**changes):
    fields = dict(batch=2, in_channels=4, input_size=(7, 9), out_channels=6, kernel_size=3)
    return ConvProblem(**{**fields, **changes})


def test_fields_become_tuples():
    p = small(padding=(1, 2), stride=2, dilation=(1, 2), groups=2)
    assert p.kernel_size == (3, 3)
    assert p.stride == (2, 2)
    assert p.padding == ((1, 1), (2, 2))
    assert p.dilation == (1, 2)
    assert p.layout == "NCHW"
    assert p.kernel_extent == (3, 5)
    assert p.padded_size == (9, 13)
    assert p.output_size == (4, 5)
    assert p.weight_shape == (6, 2, 3, 3)
    assert p.k == 18


def test_padding_forms_agree():
    assert small(padding=1) == small(padding=(1, 1)) == small(padding=[[1, 1], (1, 1)])
    assert small(padding=((0, 1), 2)).padding == ((0, 1), (2, 2))
    assert small(padding=np.array([1, 2])).padding == ((1, 1), (2, 2))


def test_is_a_frozen_dictionary_key():
    assert {small(): 1}[small(kernel_size=(3, 3))] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        small().batch = 3


def test_numpy_integers_become_integers():
    p = ConvProblem(
        np.int64(2), np.int32(4), np.array([7, 9]), np.uint8(6), np.int64(3), padding=np.int8(1)
    )
    assert p == small(padding=1)
    assert type(p.batch) is int and type(p.input_size[0]) is int
    assert json.dumps(dataclasses.asdict(p))


@pytest.mark.parametrize(
    ("size", "layout", "shape"),
    [
        ((5,), None, (2, 4, 5)),
        ((5,), "NWC", (2, 5, 4)),
        ((5, 6), "NHWC", (2, 5, 6, 4)),
        ((5, 6, 7), None, (2, 4, 5, 6, 7)),
        ((5, 6, 7), "NDHWC", (2, 5, 6, 7, 4)),
    ],
)
def test_shapes_follow_the_layout(size, layout, shape):
    p = ConvProblem(2, 4, size, 6, 1, layout=layout)
    assert p.input_shape == shape
    assert p.output_shape == tuple(6 if n == 4 else n for n in shape)
    assert p.weight_shape == (6, 4, *(1,) * len(size))
    assert p.channels_last == (layout is not None)


def test_work_and_traffic():
    # 2x2 inputs of 3 channels, 1x1 kernels, 5 outputs a pixel: 4 * 5 * 3 multiply-adds.
    p = ConvProblem(1, 3, (2, 2), 5, 1)
    assert p.flops == 120
    assert p.min_bytes == 4 * (12 + 15 + 20)
    assert p.arithmetic_intensity == 120 / 188
    assert p.replace(dtype="float16").min_bytes == 2 * 47


def test_transform_sizes_in_every_rank():
    # 1-D has no outer axis whose overlap would be copied: the padded input itself.
    line = ConvProblem(2, 3, (10,), 4, 3, padding=1)
    assert line.im2win_elements == 2 * 3 * 12
    assert line.im2col_elements == 2 * 3 * 10 * 3
    plane = ConvProblem(2, 3, (10, 20), 4, (3, 5), padding=((1, 1), (0, 2)))
    assert plane.im2win_elements == 2 * 3 * 10 * 3 * 22
    assert plane.im2col_elements == 2 * 3 * 10 * 18 * 15
    volume = ConvProblem(1, 2, (4, 5, 6), 1, (2, 3, 4))
    assert volume.im2win_elements == 2 * (3 * 2) * (3 * 3) * 6


@pytest.mark.parametrize("name", PAPER)
def test_paper_layers(name):
    out, k, gflop, input_mib, im2win_mib, im2col_mib = PAPER[name]
    p = suite("paper")[name]
    assert p.batch == 128
    assert p.output_size == (out, out)
    assert p.k == k
    assert p.flops / 1e9 == pytest.approx(gflop, abs=0.0051)
    assert np.prod(p.input_shape) * 4 / MIB == pytest.approx(input_mib, abs=0.051)
    assert p.im2win_elements * 4 / MIB == pytest.approx(im2win_mib, abs=0.51)
    assert p.im2col_elements * 4 / MIB == pytest.approx(im2col_mib, abs=0.51)


def test_suites():
    assert list(suite("paper")) == list(PAPER)
    assert layer("paper", "conv4-c32") == layer("paper", "conv4").replace(in_channels=32)
    # Convolutions of the two networks: how many, and multiply-adds an image.
    for name, layers, macs in (("resnet50", 53, 4087136256), ("vgg16", 13, 15346630656)):
        problems, counts = suite(name, batch=1), SUITES[name].counts
        assert sum(counts.values()) == layers
        assert sum(p.flops * counts[title] for title, p in problems.items()) == 2 * macs
        assert len(set(problems.values())) == len(problems)
    assert suite("stems", dtype="float16")["vgg16"] == layer("vgg16", "conv1_1", dtype="float16")
    assert layer("stems", "vit_b_16").output_shape == (32, 768, 14, 14)
    chosen = suite("vgg16", batch=3, dtype="float16", layout="NHWC")["conv1_1"]
    assert chosen.input_shape == (3, 224, 224, 3) and chosen.dtype == "float16"


def test_unknown_suite_and_layer():
    with pytest.raises(SuiteError, match=r"'pape'.*paper, resnet50, vgg16"):
        suite("pape")
    with pytest.raises(SuiteError, match=r"'conv13'.*conv12, conv4-c32"):
        layer("paper", "conv13")
    with pytest.raises(ProblemError, match="batch=0"):
        suite("paper", batch=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch=0: allowed: a positive integer"),
        ({"batch": True}, "batch=True"),
        ({"in_channels": 4.0}, r"in_channels=4\.0"),
        ({"out_channels": "6"}, "out_channels='6'"),
        ({"groups": -1}, "groups=-1"),
        ({"groups": 3}, "groups=3: allowed: a divisor of in_channels, which is 4"),
        ({"groups": 4}, "groups=4: allowed: a divisor of out_channels, which is 6"),
        ({"input_size": 7}, "input_size=7: allowed: 1 to 3"),
        ({"input_size": ()}, "input_size="),
        ({"input_size": (1, 2, 3, 4)}, "input_size="),
        ({"input_size": (7, 0)}, "input_size=0"),
        ({"input_size": "79"}, "input_size='79'"),
        ({"kernel_size": 0}, "kernel_size=0"),
        ({"kernel_size": (3,)}, r"kernel_size=\(3,\): allowed: one integer, or 2"),
        ({"kernel_size": 8}, r"kernel_size=\(8, 8\): allowed: at most 7 on axis 0"),
        ({"dilation": 5}, "at most 7 on axis 0, the padded input; dilated it is 11"),
        ({"stride": (1, 0)}, "stride=0"),
        ({"dilation": 0}, "dilation=0"),
        ({"padding": -1}, "padding=-1: allowed: an integer of 0 or more"),
        ({"padding": ((0, 1), (1, -1))}, "padding=-1"),
        ({"padding": (1, 1, 1)}, r"padding=\(1, 1, 1\): allowed: an integer, or 2"),
        ({"padding": ((1, 1, 1), 0)}, r"padding=\(\(1, 1, 1\), 0\)"),
        ({"padding": "same"}, "padding='same'"),
        ({"padding": (True, 0)}, "padding=True"),
        ({"dtype": "float64"}, "dtype='float64': allowed: float32 or float16"),
        ({"dtype": 1}, "dtype=1"),
        ({"layout": "NWC"}, "layout='NWC': allowed: NCHW or NHWC with 2 spatial axes"),
        ({"layout": []}, r"layout=\[\]"),
    ],
)
def test_refusals_name_field_value_and_allowed(changes, message):
    with pytest.raises(ProblemError, match=message):
        small(**changes)


def test_replace():
    assert small().replace(batch=5).batch == 5
    with pytest.raises(ProblemError, match=r"pad=1: allowed: the fields batch, .*padding"):
        small().replace(pad=1)
    with pytest.raises(ProblemError, match="stride=0"):
        small().replace(stride=0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ic3ih8oc4kh3", ConvProblem(2, 3, (8, 8), 4, 3)),
        ("g2_mb7ic4_ih8iw9oc6kh3kw2_", ConvProblem(7, 4, (8, 9), 6, (3, 2), groups=2)),
        ("mb1ic3ih8oc4kh3sh2ph1dh1", ConvProblem(1, 3, (8, 8), 4, 3, 2, 1, 2)),
        ("ic3ih8iw9oc4kh3sh2sw1ph1pw0", ConvProblem(2, 3, (8, 9), 4, 3, (2, 1), (1, 0))),
        ("ic3ih8iw9oc4kh3sh2ph1", ConvProblem(2, 3, (8, 9), 4, 3, 2, 1)),
        ("mb1ic3iw8oc4kw3dw2", ConvProblem(1, 3, (8,), 4, 3, dilation=3)),
        ("ic3id8oc4kd3pd1", ConvProblem(2, 3, (8, 8, 8), 4, 3, padding=1)),
        ("ic3id8ih7iw6oc4kd3kh2kw1", ConvProblem(2, 3, (8, 7, 6), 4, (3, 2, 1))),
        # Spelled-out idle fields of an axis that is not there.
        ("ic3ih8oc4kh3sd1pd0dd0", ConvProblem(2, 3, (8, 8), 4, 3)),
        # Padding deduced: 7 rows are read of 5, one more in front and behind.
        ("ic3ih5oc4oh5kh3", ConvProblem(2, 3, (5, 5), 4, 3, padding=1)),
        # 9 rows of 8 are read: the odd one is behind.
        ("ic3ih8oc4oh4kh3sh2", ConvProblem(2, 3, (8, 8), 4, 3, 2, ((0, 1), (0, 1)))),
        # 7 rows of 8 are read: nothing to deduce.
        ("ic3ih8oc4oh4kh1sh2", ConvProblem(2, 3, (8, 8), 4, 1, 2)),
        # Symmetric padding gives 112 as well as benchdnn's own (3, 2): PyTorch's is taken.
        ("mb1ic3ih224oc64oh112kh7sh2ph3", ConvProblem(1, 3, (224, 224), 64, 7, 2, 3)),
        # Symmetric padding would give 9 outputs, 8 need two rows behind.
        ("ic3ih5oc4oh8kh3ph3", ConvProblem(2, 3, (5, 5), 4, 3, 1, ((3, 2), (3, 2)))),
        # Symmetric padding would give 2 outputs; the one asked for reads nothing behind.
        ("ic3ih2oc4oh1kh3ph1", ConvProblem(2, 3, (2, 2), 4, 3, 1, ((1, 0), (1, 0)))),
        ('ic3ih8oc4kh3n"net:conv1*2"', ConvProblem(2, 3, (8, 8), 4, 3)),
        ("  ic3ih8oc4kh3nplain \n", ConvProblem(2, 3, (8, 8), 4, 3)),
    ],
)
def test_parse(text, expected):
    assert ConvProblem.parse(text) == expected


def test_parse_with_dtype_layout_and_name():
    p = ConvProblem.parse("ic3iw8oc4kw3", dtype="float16", layout="NWC")
    assert (p.dtype, p.layout) == ("float16", "NWC")
    assert descriptor_name('ic3ih8oc4kh3_n"net:conv1*2"') == "net:conv1*2"
    assert descriptor_name("ic3ih8oc4kh3nplain") == "plain"
    assert descriptor_name("ic3ih8oc4kh3") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        (b"ic3", "allowed: a descriptor string"),
        ("mb0ic3ih8oc4kh3", "position 0: mb=0: allowed: a positive integer"),
        ("ic3ih8oc4kh3oh0", "position 12: oh=0"),
        ("ic3ih8oc4kh3ic3", "position 12: 'ic3': ic was given before"),
        ("ic3ih8oc4kh3xx5", "position 12: 'xx5': unknown field; allowed: g mb ic"),
        ("ic3ih8oc4KH3", "position 9: 'KH3': unknown field"),
        ("ic3ih8oc4kh3 ph1", "position 12: ' ph1': unknown field"),
        ("ic3ih8oc4kh3ph-1", "position 12: 'ph-1': ph needs a number"),
        ("ic3ih8oc4kh", "position 9: 'kh': kh needs a number"),
        ("ic3ih8oc4kh" + "9" * 5000, "kh needs a number; allowed: 1 to 18 digits"),
        ("ic3ih8oc4kh٣", "kh needs a number"),
        ("ih8oc4kh3", "ic is missing"),
        ("ic3ih8kh3", "oc is missing"),
        ("ic3oc4kh3", "ih is missing"),
        ("ic3oc4", "ih is missing"),
        ("ic3ih8oc4", "kh is missing"),
        ("ic3iw8oc4", "kw is missing; needed: ic, oc, iw and kw"),
        ("ic3ih8oc4kh3oh3ph0", "position 12: oh=3: with 0 in front, allowed: 6 or more"),
        ("ic3ih8oc4kh9", r"'ic3ih8oc4kh9': kernel_size=\(9, 9\)"),
        ("g2ic3ih8oc4kh3", "'g2ic3ih8oc4kh3': groups=2"),
        ('ic3ih8oc4kh3n"open', "position 12: .*not one quoted word"),
        ('ic3ih8oc4kh3n"a"b', "not one quoted word"),
    ],
)
def test_parse_refuses(text, message):
    with pytest.raises(ProblemError, match=message):
        ConvProblem.parse(text)


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (ConvProblem(2, 3, (8, 8), 4, 3), "mb2ic3ih8oc4kh3"),
        (ConvProblem(1, 4, (8, 8), 4, 3, 2, 1, 2, 4), "g4mb1ic4ih8oc4kh3sh2ph1dh1"),
        (ConvProblem(1, 3, (8, 9), 4, 3), "mb1ic3ih8iw9oc4kh3kw3"),
        (ConvProblem(1, 3, (8, 8), 4, 3, (2, 1)), "mb1ic3ih8iw8oc4kh3kw3sh2sw1"),
        (ConvProblem(1, 3, (9,), 4, 3, padding=1), "mb1ic3iw9oc4kw3pw1"),
        (ConvProblem(1, 3, (9, 9, 9), 4, 3), "mb1ic3id9oc4kd3"),
        (ConvProblem(1, 3, (9, 9, 8), 4, 3), "mb1ic3id9ih9iw8oc4kd3kh3kw3"),
        (ConvProblem(1, 3, (8, 8), 4, 3, 1, ((0, 1), (0, 1))), "mb1ic3ih8oc4oh7kh3ph0"),
        (
            ConvProblem(1, 3, (8, 8), 4, 3, 1, ((0, 1), (1, 1))),
            "mb1ic3ih8iw8oc4oh7ow8kh3kw3ph0pw1",
        ),
    ],
)
def test_str_is_short_and_parses_back(problem, text):
    assert str(problem) == text
    assert ConvProblem.parse(text) == problem


def random_problem(rng):
    rank = rng.randint(1, 3)
    while True:
        groups = rng.choice((1, 1, 2, 3))
        axes = [
            (rng.randint(1, 12), rng.randint(1, 5), rng.randint(1, 3), rng.randint(1, 3))
            for _ in range(rank)
        ]
        if rng.random() < 0.4:
            axes = axes[:1] * rank
        pads = [(rng.randint(0, 3), rng.randint(0, 3)) for _ in axes]
        if rng.random() < 0.5:
            pads = [(before, before) for before, _ in pads]
        sizes, kernels, strides, dilations = zip(*axes, strict=True)
        try:
            return ConvProblem(
                rng.randint(1, 9),
                groups * rng.randint(1, 5),
                sizes,
                groups * rng.randint(1, 5),
                kernels,
                strides,
                pads,
                dilations,
                groups,
            )
        except ProblemError:
            continue


def test_descriptors_of_random_problems_compute_the_same():
    rng = random.Random(5)
    equal = 0
    for _ in range(600):
        p = random_problem(rng)
        q = ConvProblem.parse(str(p))
        # The same windows: only padding behind the last one may differ.
        assert q.output_size == p.output_size, p
        assert [a for a, _ in q.padding] == [a for a, _ in p.padding], p
        assert q.replace(padding=p.padding) == p
        assert str(ConvProblem.parse(str(q))) == str(q)
        # Even padding, or uneven padding that nothing else could stand for, comes back as it was.
        if all(
            before == after or not other_padding(p, axis)
            for axis, (before, after) in enumerate(p.padding)
        ):
            equal += 1
            assert q == p
    assert equal > 300


def other_padding(p, axis):
    """Whether some other trailing padding has as many outputs: the leading one, or one less."""
    before, after = p.padding[axis]
    for other in {before, after - 1} - {-1}:
        changed = [list(pair) for pair in p.padding]
        changed[axis][1] = other
        try:
            if p.replace(padding=changed).output_size == p.output_size:
                return True
        except ProblemError:
            continue
    return False


def listed_rows():
    folder = os.environ.get("IM2WIN_CASES")
    if not folder or not Path(folder).is_dir():
        pytest.skip("IM2WIN_CASES names no folder of case lists")
    for path in sorted(Path(folder).glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def test_descriptors_of_the_listed_cases():
    seen = 0
    for row in listed_rows():
        if "desc" not in row:
            continue
        seen += 1
        p = ConvProblem.parse(row["desc"])
        top, left, bottom, right = row["pad_ops"]
        expected = ConvProblem(
            row["n"],
            row["c"],
            (row["h"], row["w"]),
            row["k"],
            (row["r"], row["s"]),
            row["stride"],
            ((top, bottom), (left, right)),
            row["dil"],
            row["groups"],
        )
        assert p.output_size == (row["oh"], row["ow"])
        assert p.flops == row["flops"]
        assert p.replace(padding=expected.padding) == expected
        if row["torch_sym"]:
            assert p.padding == ((top, top), (left, left))
        else:
            assert p == expected
        assert descriptor_name(row["desc"]) == row["name"]
    assert seen
