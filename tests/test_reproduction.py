"""The ablation's configurations, and the published figures beside measured ones."""

import dataclasses

import pytest

from im2win_tvm import emulate, reference, tensors
from im2win_tvm.bench import ablation, published, reproduction
from im2win_tvm.problem import ConvProblem
from im2win_tvm.schedules import SCHEDULES, ScheduleError
from im2win_tvm.suites import suite
from im2win_tvm.target import CudaTarget, resolve

CUDA = CudaTarget("sm_90")
SIMT = SCHEDULES["cuda_simt"]
INTENDED = {
    ablation.ALL_ON: set(),
    "no shared memory": {"shared", "double_buffer", "prefetch", "table"},
    "no micro-kernel": {"block_m", "block_p", "thread_m", "thread_p"},
    "no double buffer": {"double_buffer"},
    "no prefetch": {"prefetch"},
    "no vector loads": {"vector"},
}


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("switch", ablation.SWITCHES)
def test_switches_change_what_they_say_and_nothing_else(switch, layout):
    for name, problem in suite("paper", 128, layout=layout).items():
        default = SIMT.default(problem, CUDA)
        config = ablation.config_without(switch, problem, CUDA)
        assert SIMT.check(config, problem, CUDA) is None
        changed = {
            field.name
            for field in dataclasses.fields(default)
            if getattr(default, field.name) != getattr(config, field.name)
        }
        intended = INTENDED[switch] - (set() if default.table else {"table"})
        assert changed == intended, (name, switch)
        assert config.threads == default.threads
    assert set(ablation.SWITCHES) == set(INTENDED)


@pytest.mark.parametrize("switch", ablation.SWITCHES)
def test_every_switch_computes_the_convolution(switch):
    problem = ConvProblem(2, 5, (13, 9), 19, (3, 4), stride=(2, 1))
    made = tensors.fill(problem, "integer", 1)
    config = ablation.config_without(switch, problem, CUDA)
    actual = emulate.run(SIMT, problem, config, CUDA, {"x": made.x, "w": made.w})
    expected = reference.conv2d(made.x, made.w, problem)
    assert tensors.check(actual, expected, problem, "integer").ok


def test_a_switch_that_leaves_nothing_valid_is_a_gap(monkeypatch):
    problem = suite("paper", 1)["conv9"]
    entry = ablation.Ablated("no vector loads")
    assert entry.available(problem, CUDA) is None
    assert entry.available(problem, resolve("llvm")).startswith("target=llvm: cuda_simt is for")
    monkeypatch.setattr(
        SIMT, "check", lambda config, *rest: "vector=1: refused" if config.vector == 1 else None
    )
    assert entry.available(problem, CUDA) == "no vector loads: vector=1: refused"
    with pytest.raises(ScheduleError, match="no vector loads: vector=1: refused"):
        ablation.config_without("no vector loads", problem, CUDA)


def _timed(name, family, us, workspace=0):
    times = {"cold": {"median_us": us, "iqr_us": 0.0, "n": 5}}
    entry = {"name": name, "family": family, "status": "ok", "reason": None}
    return entry | {"workspace_bytes": workspace, "times": times}


def _record(*layers):
    return {
        "target": {"kind": "cuda"},
        "environment": {
            "versions": {"python": "3.12", "apache-tvm": "0.27", "torch": "2.11"},
            "cuda": {"gpu": "GPU", "nvidia_smi": None},
        },
        "layers": [
            {
                "name": name,
                "flops": 1_000_000_000,
                "min_bytes": 1000,
                "batch": 128,
                "dtype": "float32",
                "implementations": entries,
            }
            for name, entries in layers
        ],
    }


def _ablated(times):
    return [_timed(switch, "im2win", us) for switch, us in zip(INTENDED, times, strict=True)]


def test_speed_kept(tmp_path):
    second = _ablated([100, 200, 400, 100, 100, 100])
    second[-1].pop("times")  # failed its check
    record = _record(("conv1", _ablated([100, 1000, 400, 125, 200, 400])), ("conv2", second))
    record["kept"] = ablation.kept(record)
    assert record["kept"]["no shared memory"] == {
        "layers": {"conv1": 0.1, "conv2": 0.5},
        "geomean": pytest.approx(0.05**0.5),
    }
    assert ablation.table(record, {"no prefetch": 0.852}) == [
        [
            "layer",
            "all on us",
            "no shared memory",
            "no micro-kernel",
            "no double buffer",
            "no prefetch",
            "no vector loads",
        ],
        ["conv1", "100.0", "0.10", "0.25", "0.80", "0.50", "0.25"],
        ["conv2", "100.0", "0.50", "0.25", "1.00", "1.00", "-"],
        ["geomean", "", "0.22", "0.25", "0.89", "0.71", "0.25"],
        ["published", "", "-", "-", "-", "0.85", "-"],
    ]
    path = tmp_path / "ablation.png"
    ablation.draw(record, path, published.kept_means())
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_published_figures():
    assert list(published.PAPER) == list(suite("paper"))
    assert published.tflops("im2win")["conv4"] == 13.03
    assert published.memory("cudnn")["conv8"] == 3719
    assert published.kept("no prefetch")["conv9"] == pytest.approx(5.63 / 7.30)
    wins = sum(row.im2win > row.cudnn for row in published.PAPER.values())
    ratios = [row.im2win / row.cudnn for row in published.PAPER.values()]
    assert wins == 7
    assert (round(min(ratios), 2), round(max(ratios), 2)) == (0.75, 1.80)
    assert published.kept_means() == pytest.approx(
        {"no micro-kernel": 0.487, "no prefetch": 0.852, "no vector loads": 0.773}, abs=1e-3
    )


@pytest.fixture
def compared():
    entries = [
        _timed("simt", "im2win", 100.0),
        _timed("cudnn:FFT", "cudnn", 200.0, 3 << 20),
        _timed("torch nchw", "torch", 50.0, 1 << 20),
        _timed("cublas", "cublas", 400.0, 2 << 20),
    ]
    return _record(("conv1", entries), ("other", [_timed("simt", "im2win", 200.0)]))


def test_our_figures_beside_the_published(compared):
    assert reproduction.rates(compared)["cudnn"] == {"conv1": pytest.approx(20.0), "other": None}
    assert reproduction.memory(compared)["cublas"] == {"conv1": 2 << 20, "other": None}
    assert reproduction.summary(compared) == [
        [
            "layer",
            "cublas TFLOPS",
            "cudnn TFLOPS",
            "direct TFLOPS",
            "im2win TFLOPS",
            "cublas memory",
            "cudnn memory",
            "direct memory",
            "im2win memory",
        ],
        [
            "conv1",
            "2.50 (3.02)",
            "20.00 (4.46)",
            "- (0.67)",
            "10.00 (8.02)",
            "2.0 MiB (1.2 GiB)",
            "1.0 MiB (1.2 GiB)",
            "- (805.0 MiB)",
            "0 (879.0 MiB)",
        ],
        ["other", "-", "-", "-", "5.00", "-", "-", "-", "0"],
        [
            "im2win / it",
            "4.00x (2.94x)",
            "0.50x (1.06x)",
            "- (22.49x)",
            "1.00x (1.00x)",
            "",
            "",
            "",
            "",
        ],
    ]


def test_pictures(compared, tmp_path):
    for draw in (reproduction.draw_rates, reproduction.draw_memory):
        draw(compared, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
