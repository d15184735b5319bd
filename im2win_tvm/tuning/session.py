"""A tuning session: search configurations of problems on the device that is here, and record them.

Every measurement goes through the bench's checks and timing. A search times a candidate briefly
(SEARCH); the fastest FINALISTS of each schedule and the heuristic's choice are then measured again
together, by turns, with the full protocol of `im2win bench`; those that meet an error there, each
alone. All are recorded, each as it is measured, so that what was measured stays whatever happens
next.
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__, environment, toolchain
from ..bench import timing
from ..bench.run import limits_for
from ..builds import Builder, Request, default_jobs
from ..epilogue import NONE
from ..kernel import Kernel
from ..problem import ConvProblem
from ..schedules import SCHEDULES
from ..target import Target
from .code_version import code_version
from .lookup import arch_of
from .measuring import Measurement, Measurer, TuningError, first_line
from .records import Record, append
from .search import Proposer, Trial, search

if TYPE_CHECKING:
    from .fleet import Fleet

__all__ = ["FINALISTS", "SEARCH", "Result", "Session"]

#: The time of a candidate during a search. A tenth of the full protocol's; it ranks candidates, and
#: what it ranks first is measured again.
SEARCH = timing.Limits(warmup=0.02, seconds=0.06, least=5, most=20)
#: Configurations of each schedule that are measured again with the full protocol.
FINALISTS = 4

Progress = Callable[[str], None]


@dataclass
class Result:
    """What came of one schedule on one problem.

    heuristic: fields of the configuration it would have without tuning. records: everything
    measured, in order. tried: configurations taken up. wrong: what was wrong with which output.
    errors: how often candidates could not be built or run, by reason.
    """

    problem: ConvProblem
    schedule: str
    heuristic: dict[str, Any]
    tried: int = 0
    records: list[Record] = field(default_factory=list)
    wrong: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)

    def best(self, config: dict[str, Any] | None = None) -> Record | None:
        """The fastest right record (of `config`), by the full protocol if there is one."""
        wrong = [config for config, _ in self.wrong]
        right = [
            record
            for record in self.records
            if record.passed and record.config not in wrong and config in (None, record.config)
        ]
        return min(right, key=lambda r: (r.protocol != "full", r.time_us), default=None)


@dataclass(frozen=True)
class _Candidate:
    """A configuration of a schedule, and its kernel or why there is none."""

    result: Result
    config: Any
    built: Kernel | Exception


class Session:
    """Measures configurations and records them; a context manager.

    place: the folder of the logs, `<place>/<device>/<schedule>.jsonl`. jobs: processes that build;
    None is what pays. measurer: None is this machine's own device; a Fleet measures on others, and
    ends with the session. interrupted: whether Ctrl-C was pressed; asked between trials, because
    TVM turns a KeyboardInterrupt that meets it in a callback into an error like any other. Raises
    TuningError where the target's kernels cannot be measured here.
    """

    def __init__(
        self,
        target: Target,
        place: Path,
        jobs: int | None = None,
        limits: timing.Limits | None = None,
        progress: Progress = lambda what: None,
        interrupted: Callable[[], bool] = lambda: False,
        measurer: Measurer | Fleet | None = None,
    ) -> None:
        if measurer is None:
            _require(target)
            measurer = Measurer(target.kind)
        self._target = target
        self._device = environment.device_name(target)
        self._folder = Path(place) / environment.slug(self._device)
        self._builder = Builder(jobs or default_jobs(target))
        self._measurer = measurer
        self._limits = limits or limits_for(target)
        self._progress = progress
        self._interrupted = interrupted
        self._driver = measurer.driver
        self._commit = environment.git_commit()
        self.results: list[Result] = []

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self._measurer.close()
        self._builder.close()

    def log(self, schedule: str) -> Path:
        """Where the records of a schedule go."""
        return self._folder / f"{schedule}.jsonl"

    def tune(
        self,
        problem: ConvProblem,
        proposers: Mapping[str, Proposer],
        trials: int,
        seconds: float | None = None,
    ) -> list[Result]:
        """Search the configurations of one problem; the result of each schedule.

        proposers: by schedule. trials: most configurations of each schedule; seconds: no further
        batch of them is begun after so long.
        """
        results = [
            Result(problem, name, asdict(SCHEDULES[name].default(problem, self._target)))
            for name in proposers
        ]
        self.results += results
        finalists: list[_Candidate] = []
        for result, proposer in zip(results, proposers.values(), strict=True):
            finalists += self._search(result, proposer, trials, seconds)
        self._progress(f"{problem}: the fastest again")
        measured = self._measure(problem, finalists, self._limits)
        for candidate, measurement in zip(finalists, measured, strict=True):
            self._note(candidate, measurement, "full")
        return results

    def _search(
        self, result: Result, proposer: Proposer, trials: int, seconds: float | None
    ) -> list[_Candidate]:
        """Search one schedule; its finalists."""
        begun = time.monotonic()
        right: list[tuple[float, _Candidate]] = []

        def enough() -> bool:
            if self._interrupted():
                raise KeyboardInterrupt
            return seconds is not None and time.monotonic() - begun >= seconds

        def measure(configs: list[Any]) -> Iterator[Trial]:
            for candidate, measurement in self._measured(result, configs):
                self._progress(f"{result.problem} {result.schedule}")
                result.tried += 1
                time_us = self._note(candidate, measurement, "search")
                if math.isfinite(time_us):
                    right.append((time_us, candidate))
                yield Trial(candidate.config, time_us)

        batch = max(self._builder.jobs, self._measurer.width)
        search(proposer, measure, trials, batch, enough)
        ranked = [candidate for _, candidate in sorted(right, key=lambda pair: pair[0])]
        return ranked[:FINALISTS] + [
            candidate
            for candidate in ranked[FINALISTS:]
            if asdict(candidate.config) == result.heuristic
        ]

    def _measured(
        self, result: Result, configs: list[Any]
    ) -> Iterator[tuple[_Candidate, Measurement]]:
        """Candidates of these configurations, each measured alone, in order."""
        built = self._build(result, configs)
        if isinstance(self._measurer, Measurer):
            # Nothing is built while something is measured: builds take every processor.
            for candidate in list(built):
                yield candidate, self._measure(result.problem, [candidate], SEARCH)[0]
            return
        from .streaming import stream

        yield from stream(
            self._measurer, result.problem, built, SEARCH, lambda e: Measurement(first_line(e))
        )

    def _build(self, result: Result, configs: list[Any]) -> Iterator[_Candidate]:
        problem = result.problem
        accuracy = SCHEDULES[result.schedule].accuracy(problem)  # what was asked for is its name
        requests = [
            Request(problem, self._target, result.schedule, config, accuracy=accuracy)
            for config in configs
        ]
        built = self._builder.build(requests)
        return (_Candidate(result, *pair) for pair in zip(configs, built, strict=True))

    def _measure(
        self, problem: ConvProblem, candidates: list[_Candidate], limits: timing.Limits
    ) -> list[Measurement]:
        """One measurement a candidate; of those that were not built, the error."""
        with tempfile.TemporaryDirectory(prefix="im2win-") as folder:
            paths = {
                index: candidate.built.export(Path(folder) / f"{index}.so")
                for index, candidate in enumerate(candidates)
                if isinstance(candidate.built, Kernel)
            }
            measured = iter(
                self._measurer.measure(problem, list(paths.values()), limits) if paths else ()
            )
            return [
                next(measured) if index in paths else Measurement(first_line(candidate.built))
                for index, candidate in enumerate(candidates)
            ]

    def _note(self, candidate: _Candidate, measured: Measurement, protocol: str) -> float:
        """Record a measurement; its time in microseconds, infinite if there is none."""
        result = candidate.result
        if measured.error is not None:
            result.errors[measured.error] = result.errors.get(measured.error, 0) + 1
            return math.inf
        record = self._record(candidate, measured, protocol)
        result.records.append(record)
        append(self.log(result.schedule), record)
        if not measured.passed:
            result.wrong.append((record.config, measured.message))
        return record.time_us

    def _record(self, candidate: _Candidate, measured: Measurement, protocol: str) -> Record:
        target, result = self._target, candidate.result
        return Record(
            problem=result.problem,
            schedule=result.schedule,
            config=asdict(candidate.config),
            target={"kind": target.kind, "arch": arch_of(target)},
            device=self._device,
            versions={
                "code": code_version(SCHEDULES[result.schedule]),
                "apache-tvm": environment.package_version("apache-tvm"),
                "im2win_tvm": __version__,
                "nvcc": toolchain.nvcc_version() if target.kind == "cuda" else None,
            },
            protocol=protocol,
            passed=measured.passed,
            relative_error=measured.relative_error,
            times={state: _rounded(times) for state, times in measured.times.items()},
            epilogue=asdict(NONE),
            driver=self._driver,
            commit=self._commit,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )


def _rounded(times: timing.Times) -> dict[str, float]:
    """Times as a record has them, to the nanosecond."""
    return {name: round(value, 3) for name, value in asdict(times).items()}


def _require(target: Target) -> None:
    """Raise TuningError if kernels for `target` cannot be measured here."""
    if target.kind == "llvm":
        return
    if target.device is None:
        raise TuningError(
            f"target={str(target)!r}: tuning measures, and no GPU of this kind is here"
        )
    if importlib.util.find_spec("torch") is None:
        raise TuningError(
            "target='cuda': measuring needs PyTorch for its tensors and events; "
            "pip install 'im2win_tvm[torch]'"
        )
