"""Models of the time against the records that ship: what GPUs said, not what the models say."""

import math
from statistics import median

import pytest
from window_cases import FEW

from im2win_tvm.schedules import (
    SCHEDULES,
    cuda_simt_async_tiles,
    cuda_thin_tiles,
    cuda_window_fp32_tiles,
    cuda_window_tiles,
)
from im2win_tvm.schedules.cuda_window import walk
from im2win_tvm.schedules.cuda_window_cost import clusters
from im2win_tvm.target import CudaTarget
from im2win_tvm.tuning import lookup

H200 = CudaTarget("sm_90a", "NVIDIA H200")
WINDOWS = {
    "cuda_window": (cuda_window_tiles.Config, cuda_window_tiles.Geometry),
    "cuda_window_tf32": (cuda_window_tiles.Config, cuda_window_tiles.Geometry),
    "cuda_window_fp32": (cuda_window_fp32_tiles.Config, cuda_window_fp32_tiles.SplitGeometry),
}


def _measured(name, make, field="split", least=1):
    """Problem, configuration and logarithm of predicted over measured time, of a schedule.

    least: of a field of the configuration.
    """
    schedule = SCHEDULES[name]
    for _, (_, record) in lookup.lines(lookup.SHIPPED, H200.device):
        if isinstance(record, str) or (record.schedule, record.protocol) != (name, "full"):
            continue
        if record.passed and record.config[field] >= least:
            problem, config = record.problem, make(**record.config)
            predicted = schedule.microseconds(problem, config, H200)
            yield problem, config, math.log(predicted / record.time_us)


@pytest.mark.parametrize("name", WINDOWS)
def test_what_is_divided_takes_a_turn_more_where_clusters_are_too_many(name):
    """Such tiles take up to 1.8 times as long as ones that clusters compute at once."""
    config_of, geometry_of = WINDOWS[name]
    alone, more = [], []
    for problem, config, error in _measured(name, config_of, least=3):
        tiles = geometry_of(walk(problem), config).tiles
        at_once = clusters(config.split, H200) * config.blocks
        (more if tiles > at_once else alone).append(error)
    assert len(alone) >= 10
    assert abs(median(alone)) < 0.2
    assert min(more) > -0.25


def test_clusters():
    counts = [clusters(split, H200) for split in range(2, 9)]
    assert counts == sorted(counts, reverse=True)
    assert all(split * count <= 132 for split, count in enumerate(counts, 2))
    assert clusters(8, FEW) == 1


def test_adding_up_over_a_cluster_takes_its_time_on_cuda_cores():
    """Without it what is divided seemed a fifth faster than it is."""
    make = cuda_simt_async_tiles.Config
    found = [e for p, _, e in _measured("cuda_simt_async", make, least=2) if p.batch == 1]
    assert len(found) >= 10
    assert abs(median(found)) < 0.12


def test_blocks_of_a_multiprocessor_read_a_filter_each():
    """Without it two and more of them seemed a sixth faster than they are."""
    errors = [
        error
        for name in ("cuda_thin", "cuda_thin_tf32")
        for problem, _, error in _measured(name, cuda_thin_tiles.Config, "blocks", least=2)
        if problem.batch == 1
    ]
    assert len(errors) >= 10
    assert abs(median(errors)) < 0.1
