"""The table of what tuning gains."""

import dataclasses

import pytest
from tuning_records import CPU, PROBLEM, make, write

from im2win_tvm.bench import timing, tuned
from im2win_tvm.schedules import SCHEDULES
from im2win_tvm.select import select, untuned
from im2win_tvm.tuning import lookup

BRIEF = timing.Limits(warmup=0.001, seconds=0.001, least=3, most=5)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv(lookup.VARIABLE, str(tmp_path / "logs"))
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs"


def test_both_choices_are_measured_in_one_run(place):
    other = PROBLEM.replace(out_channels=6)
    default = SCHEDULES["cpu_blocked"].default(PROBLEM, CPU)
    config = next(
        found for found in SCHEDULES["cpu_blocked"].configs(PROBLEM, CPU) if found != default
    )
    write(place, make(1.0, changed=dataclasses.asdict(config)))
    assert select(PROBLEM, CPU).config == config
    assert untuned(PROBLEM, CPU).config == default
    assert untuned(PROBLEM, CPU).origin.kind == "heuristic"
    record = tuned.measure({"one": PROBLEM, "other": other}, CPU, others=False, limits=BRIEF)
    one, another = record["layers"]
    assert (one["same"], another["same"]) == (False, True)
    assert one["origin"].startswith("record ") and another["origin"] == "heuristic"
    by_name = {entry["name"]: entry["detail"]["schedule"] for entry in one["implementations"]}
    assert by_name["tuned"]["config"] == dataclasses.asdict(config)
    assert by_name["heuristic"]["config"] == dataclasses.asdict(default)
    head, first, second = tuned.table(record)
    assert head == ["layer", "heuristic, us", "tuned, us", "gain"]
    assert (first[0], second[0], second[3]) == ("one", "other", "the same")
    assert first[3].endswith("x")


def _layer(name, same, **times):
    return {
        "name": name,
        "same": same,
        "implementations": [
            {"name": key, "family": family, "times": {"cold": {"median_us": us}}}
            for key, (family, us) in times.items()
        ],
    }


def test_metaschedule_stands_beside(place):
    ours = {"tuned": ("im2win", 50.0), "heuristic": ("im2win", 60.0)}
    layers = [
        _layer("a", False, **ours, other=("metaschedule", 75.0), tvm=("tvm-tuned", 100.0)),
        _layer("b", False, **(ours | {"tuned": ("im2win", 80.0)})),
        _layer("c", True, **ours),
    ]
    record = {"layers": layers}
    head, *rows = tuned.table(record)
    assert head[4:] == [
        "MetaSchedule, im2win, us", "tuned is", "MetaSchedule, conv2d, us", "tuned is"
    ]  # fmt: skip
    assert rows[0][1:] == ["60.00", "50.00", "1.20x", "75.00", "1.50x", "100.0", "2.00x"]
    assert rows[1][3:] == ["0.75x", "-", "-", "-", "-"]
    assert rows[2][3] == "the same"
    assert tuned.total(record) == (
        "tuned is another configuration on 2 of 3 layers, 0.95x as fast there (0.75x to 1.20x)"
    )
    # One that failed has no time, and no part in the mean.
    del layers[1]["implementations"][0]["times"]
    assert tuned.table(record)[2][1:4] == ["60.00", "-", "-"]
    assert tuned.total(record).endswith("on 2 of 3 layers, 1.20x as fast there (1.20x to 1.20x)")
    del layers[0]["implementations"][1]["times"]
    assert tuned.total(record) == "tuned is another configuration on 2 of 3 layers"
