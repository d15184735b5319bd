"""Tuning records for tests: of the machine that runs them, and written where a test wants them."""

from dataclasses import asdict, replace

from im2win_tvm import environment
from im2win_tvm.problem import ConvProblem
from im2win_tvm.schedules import SCHEDULES
from im2win_tvm.target import CudaTarget, resolve
from im2win_tvm.tuning.code_version import code_version
from im2win_tvm.tuning.lookup import arch_of
from im2win_tvm.tuning.records import STATES, Record, append

PROBLEM = ConvProblem(1, 3, (9, 8), 5, 3, padding=1)
CPU = resolve("llvm")
H100 = CudaTarget("sm_90", "NVIDIA H100")


def make(us=10.0, problem=PROBLEM, target=CPU, schedule="cpu_blocked", changed=None, **fields):
    """A record that is current here; `changed` are fields of the heuristic's configuration."""
    config = asdict(SCHEDULES[schedule].default(problem, target)) | (changed or {})
    state = STATES[target.kind]
    record = Record(
        problem=problem,
        schedule=schedule,
        config=config,
        target={"kind": target.kind, "arch": arch_of(target)},
        device=environment.device_name(target),
        versions={
            "code": code_version(SCHEDULES[schedule]),
            "apache-tvm": environment.package_version("apache-tvm"),
        },
        protocol="full",
        passed=True,
        relative_error=1e-7,
        times={state: {"median_us": us, "iqr_us": 0.5, "n": 30}},
        epilogue={"bias": False, "residual": False, "activation": None},
        date="2026-01-02T03:04:05+00:00",
    )
    return replace(record, **fields)


def failed(**arguments):
    """A record of a wrong output."""
    return make(**arguments, passed=False, relative_error=None, times={})


def write(place, *records, name="cpu_blocked"):
    """The log that holds these records, one a line; text and bytes are written as they are."""
    devices = [record.device for record in records if isinstance(record, Record)]
    path = place / environment.slug(devices[0] if devices else environment.device_name(CPU))
    path = path / f"{name}.jsonl"
    for record in records:
        if isinstance(record, Record):
            append(path, record)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(record if isinstance(record, bytes) else record.encode())
    return path
