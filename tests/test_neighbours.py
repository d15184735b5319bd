"""Records of other problems, and what a search takes from them."""

from dataclasses import asdict

import pytest
from tuning_records import PROBLEM, make, write

from im2win_tvm.schedules import SCHEDULES
from im2win_tvm.target import CudaTarget
from im2win_tvm.tuning import plan
from im2win_tvm.tuning.neighbours import distance, nearest
from im2win_tvm.tuning.records import key_of

H100 = CudaTarget("sm_90a", "NVIDIA H100")
H200 = CudaTarget("sm_90a", "NVIDIA H200")


def test_distances_are_octaves():
    near = PROBLEM.replace(batch=4 * PROBLEM.batch)
    assert distance(PROBLEM, near) == distance(near, PROBLEM) == 2.0
    more = near.replace(in_channels=2 * PROBLEM.in_channels, out_channels=2 * PROBLEM.out_channels)
    assert distance(PROBLEM, more) == pytest.approx(4.0)
    assert distance(PROBLEM, PROBLEM) == 0.0


@pytest.mark.parametrize(
    "changes",
    [
        dict(kernel_size=1, padding=0),
        dict(stride=2),
        dict(dilation=2),
        dict(dtype="float16"),
        dict(layout="NHWC"),
    ],
)
def test_what_makes_a_kernel_another_one_is_no_neighbour(changes):
    assert distance(PROBLEM, PROBLEM.replace(**changes)) is None


def test_depthwise_problems_are_neighbours_whatever_their_channels():
    one, other = (PROBLEM.replace(in_channels=c, out_channels=c, groups=c) for c in (8, 16))
    assert distance(one, other) == 2.0  # input and output channels
    halves = one.replace(groups=2)
    assert distance(one, halves) is None
    assert distance(halves, halves.replace(in_channels=16)) == 1.0


def test_the_nearest_come_first():
    far, near = PROBLEM.replace(batch=16), PROBLEM.replace(batch=2)
    others = [far, PROBLEM.replace(stride=2), near, PROBLEM]
    assert nearest(PROBLEM, others) == [
        (distance(PROBLEM, near), near), (distance(PROBLEM, far), far)
    ]  # fmt: skip


def test_float16_and_bfloat16_are_neighbours_the_own_dtype_first():
    half, brain = (PROBLEM.replace(dtype=dtype) for dtype in ("float16", "bfloat16"))
    assert distance(half, brain) == 0.0
    others = [each.replace(batch=2) for each in (half, brain)]
    assert [other for _, other in nearest(brain, [*others, half])] == [half, *others[::-1]]
    assert [other for _, other in nearest(half, [*others, brain])] == [brain, *others]


def test_a_search_begins_with_the_neighbours_configurations_that_fit(tmp_path):
    schedule = SCHEDULES["cuda_simt"]
    default = schedule.default(PROBLEM, H200)
    good = next(c for c in schedule.configs(PROBLEM, H200) if c != default)

    def of(time_us, batch, target=H100, **changed):
        problem = PROBLEM.replace(batch=batch)
        return make(time_us, problem=problem, target=target, schedule="cuda_simt", changed=changed)

    write(
        tmp_path,
        of(5.0, 2, **asdict(good) | {"vector": 3}),  # the schedule does not take it
        of(9.0, 4),
        of(3.0, 4, **asdict(good)),
        of(1.0, 8, CudaTarget("sm_80", "NVIDIA A100"), **asdict(good) | {"unroll": 1}),
    )
    write(tmp_path, of(1.0, 2, H200, **asdict(default)))
    known = plan.elsewhere([PROBLEM], H200, [tmp_path])
    assert known == {(key_of(PROBLEM), "cuda_simt"): [good]}
    # What is on record for the problem itself goes before.
    mine = next(c for c in schedule.configs(PROBLEM, H200) if c not in (default, good))
    write(tmp_path, of(99.0, PROBLEM.batch, **asdict(mine)))
    known = plan.elsewhere([PROBLEM], H200, [tmp_path])
    assert known == {(key_of(PROBLEM), "cuda_simt"): [mine, good]}
