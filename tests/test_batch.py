"""Problem lists: benchdnn batch files and JSON lines."""

import json
import os
import re
from itertools import islice
from pathlib import Path

import pytest

from im2win_tvm.batch import BatchError, read_problems
from im2win_tvm.problem import ConvProblem

ROW = {"n": 1, "c": 3, "h": 8, "w": 9, "k": 4, "r": 3, "s": 2}


@pytest.fixture
def listed(tmp_path):
    """Cases of a list given as text."""

    def read(text, **arguments):
        path = tmp_path / "list"
        path.write_text(text, encoding="utf-8")
        return list(read_problems(path, **arguments))

    return read


def test_descriptors_comments_and_origins(listed, tmp_path):
    cases = listed('# a comment ic1\n\nic3ih8oc4kh3n"a b"\n  mb5ic3ih9oc4kh3  ic3iw8oc4kw3 # ic9\n')
    assert [case.problem for case in cases] == [
        ConvProblem(2, 3, (8, 8), 4, 3),
        ConvProblem(5, 3, (9, 9), 4, 3),
        ConvProblem(2, 3, (8,), 4, 3),
    ]
    assert [case.name for case in cases] == ["a b", "mb5ic3ih9oc4kh3", "mb2ic3iw8oc4kw3"]
    assert [case.origin for case in cases] == [f"{tmp_path / 'list'}:{n}" for n in (3, 4, 4)]


def test_batch_sizes(listed):
    text = "ic3ih8oc4kh3 --mb=0,7 ic3ih8oc4kh3 --mb=0 mb9ic3ih8oc4kh3"
    assert [case.problem.batch for case in listed(text)] == [2, 2, 7, 9]
    assert [case.problem.batch for case in listed(text, batch=4)] == [4, 4, 4]
    assert [case.problem.batch for case in listed(json.dumps(ROW), batch=4)] == [4]


def test_dtypes_and_layouts(listed):
    cases = listed(
        "--dt=f16:f16:f16 --stag=axb --wtag=any --dtag=any ic3ih8oc4kh3 ic3iw8oc4kw3\n"
        "--dt=f32,f16 --stag=abx,acdb --dtag=ANY ic3ih8oc4kh3\n"
        "--reset ic3ih8oc4kh3\n"
    )
    assert [(case.problem.dtype, case.problem.layout) for case in cases] == [
        ("float16", "NHWC"),
        ("float16", "NWC"),
        ("float32", "NCHW"),
        ("float32", "NHWC"),
        ("float16", "NCHW"),
        ("float16", "NHWC"),
        ("float32", "NCHW"),
    ]


def test_defaults_hold_where_the_file_is_silent(listed):
    cases = listed(
        "ic3ih8oc4kh3 --dt=f32 --dtag=abcd ic3ih8oc4kh3 --reset ic3ih8oc4kh3",
        dtype="float16",
        layout="NHWC",
    )
    assert [(case.problem.dtype, case.problem.layout) for case in cases] == [
        ("float16", "NHWC"),
        ("float32", "NCHW"),
        ("float16", "NHWC"),
    ]


def test_options_without_effect(listed):
    text = "--dir=FWD_B,FWD_D,FWD_I --alg=DIRECT,auto --skip-impl=ref,x64:gemm ic3ih8oc4kh3"
    assert len(listed(text)) == 1


def test_included_lists_share_options(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "inner").write_text("ic3ih8oc4kh3\n--batch=leaf --dt=f32")
    (tmp_path / "sub" / "leaf").write_text("ic5ih8oc4kh3")
    outer = tmp_path / "outer"
    outer.write_text("--dt=f16 --batch=sub/inner\nic7ih8oc4kh3\n--batch=sub/leaf")
    cases = list(read_problems(str(outer)))
    assert [(case.problem.in_channels, case.problem.dtype) for case in cases] == [
        (3, "float16"),
        (5, "float16"),
        (7, "float32"),
        (5, "float32"),
    ]
    assert cases[1].origin == f"{tmp_path / 'sub' / 'leaf'}:1"


def test_json_rows(listed):
    rows = [
        ROW,
        {**ROW, "stride": [2, 1], "pad": [1, 0, 2, 1], "dil": [1, 2], "name": "x", "oh": 5},
        # The last row and column go unused.
        {**ROW, "r": 1, "s": 1, "stride": [2, 2], "pad": [0, 0, -1, -2], "pad_ops": [0] * 4},
        # Fewer rows and more columns than the padding gives.
        {**ROW, "pad": [1, 1, 1, 1], "oh": 7, "ow": 12, "crop": True},
        # Without the padding that the output asks for, no window fits at all.
        {**ROW, "r": 9, "s": 11, "oh": 1, "ow": 1, "crop": True},
    ]
    cases = listed("\n\n".join(map(json.dumps, rows)))
    assert [case.problem for case in cases] == [
        ConvProblem(1, 3, (8, 9), 4, (3, 2)),
        ConvProblem(1, 3, (8, 9), 4, (3, 2), (2, 1), ((1, 2), (0, 1)), (1, 2)),
        ConvProblem(1, 3, (8, 9), 4, 1, 2),
        ConvProblem(1, 3, (8, 9), 4, (3, 2), 1, ((1, 0), (1, 3))),
        ConvProblem(1, 3, (8, 9), 4, (9, 11), 1, ((0, 1), (0, 2))),
    ]
    assert [case.name for case in cases[:2]] == [str(cases[0].problem), "x"]
    assert cases[3].origin.endswith(":7")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--mb=-1", "option '--mb=-1': allowed: --mb=N"),
        ("--mb=2,", "option '--mb=2,': allowed"),
        ("--stag=abx --dtag=axb ic3ih8oc4kh3", "--stag=abx with --dtag=axb"),
        ("--stag=acb ic3ih8oc4kh3", "tag 'acb' has 3 axes; allowed: .* of 4 axes"),
        ("ic3ih8oc4", "'ic3ih8oc4': kh is missing"),
        ("garbage", "'garbage', position 0"),
        ("--batch=absent", "cannot read"),
        ("--batch=list", "includes itself"),
        ('{"n": 1', "not JSON"),
        ('{"n": 1, "c": 3}', "h is missing"),
        (json.dumps({**ROW, "n": 0}), "batch=0"),
        (json.dumps({**ROW, "name": 3}), "name=3: allowed: a string"),
        (json.dumps({**ROW, "pad": [1, 1]}), r"pad=\[1, 1\]: allowed: \[top"),
        (json.dumps({**ROW, "pad": [-1, 0, 0, 0]}), "padding=-1"),
        (json.dumps({**ROW, "oh": 5}), "oh=5: allowed: 6, which the other fields give"),
        (json.dumps({**ROW, "oh": 5, "ow": 8, "crop": True}), "oh=5: allowed: a size that"),
        (json.dumps({**ROW, "oh": 6, "crop": True}), "ow=None: allowed: a size that"),
        (json.dumps({**ROW, "oh": "5", "crop": True}), "oh='5': allowed"),
    ],
)
def test_errors_name_file_and_line(listed, tmp_path, line, message):
    with pytest.raises(BatchError, match=message) as caught:
        listed("ic3ih8oc4kh3\n" + line)
    assert str(caught.value).startswith(f"{tmp_path / 'list'}:2: ")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--attr-post-ops=relu", "option '--attr-post-ops=relu': allowed: --mb= --dt="),
        ("--verbose", "option '--verbose': allowed"),
        ("--skip-impl", "option '--skip-impl'"),
        ("--dir=BWD_D", r"option '--dir=BWD_D': allowed: --dir=fwd_b\|fwd_d\|fwd_i"),
        ("--dir=FWD_B,BWD_D", "option '--dir=FWD_B,BWD_D'"),
        ("--alg=wino", r"option '--alg=wino': allowed: --alg=direct\|auto"),
        ("--dt=s8", r"option '--dt=s8': allowed: --dt=f32\|f16\|bf16"),
        ("--dt=f16:f16:f32", "option '--dt=f16:f16:f32': allowed"),
        ("--stag=aBcd8b", r"option '--stag=aBcd8b': allowed: --stag=any\|abx"),
    ],
)
def test_cases_under_an_unsupported_option_say_so(listed, tmp_path, option, message):
    """They are still read, for a list goes on after them; --reset ends it."""
    text = f"ic3ih8oc4kh3\n{option} ic3ih8oc4kh3\nic3ih9oc4kh3 --reset ic3ih8oc4kh3"
    first, second, third, last = listed(text)
    assert first.unsupported is None and last.unsupported is None
    assert re.match(f"{re.escape(str(tmp_path / 'list'))}:2: {message}", second.unsupported)
    assert third.unsupported == second.unsupported


def test_a_supported_value_ends_an_unsupported_one(listed):
    backward, forward = listed("--dir=BWD_D ic3ih8oc4kh3 --dir=FWD_D ic3ih8oc4kh3")
    assert "--dir=BWD_D" in backward.unsupported and forward.unsupported is None


def test_layout_of_another_rank_is_refused(listed):
    with pytest.raises(BatchError, match="list:1: layout='NHWC': allowed: NCW or NWC"):
        listed("ic3iw8oc4kw3", layout="NHWC")


def test_unreadable_lists(tmp_path):
    with pytest.raises(BatchError, match=r"cannot read .*absent"):
        list(read_problems(tmp_path / "absent"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BatchError, match="allowed: a UTF-8 text file"):
        list(read_problems(tmp_path / "binary"))


def test_lists_are_read_as_asked_for(tmp_path):
    path = tmp_path / "list"
    path.write_text("ic3ih8oc4kh3\ngarbage\n")
    assert len(list(islice(read_problems(path), 1))) == 1


def test_every_listed_case():
    folder = os.environ.get("IM2WIN_CASES")
    if not folder or not Path(folder).is_dir():
        pytest.skip("IM2WIN_CASES names no folder of case lists")
    paths = sorted(Path(folder).glob("*.jsonl"))
    assert paths
    for path in paths:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for row, case in zip(rows, read_problems(path), strict=True):
            assert case.problem.flops == row["flops"], case
            assert case.problem.output_size == (row["oh"], row["ow"]), case
            assert case.name == row["name"]
