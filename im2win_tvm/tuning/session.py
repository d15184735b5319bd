"""A tuning session: search configurations of problems on the device that is here, and record them.

Every measurement goes through the bench's checks and timing. A search times a candidate briefly
(SEARCH); the fastest FINALISTS of each schedule and the heuristic's choice are then measured again
together, by turns, with the full protocol of `im2win bench`; those that meet an error there, each
alone. All are recorded, each as it is measured, so that what was measured stays whatever happens
next; those without a time too, so that a session that goes on does not meet them again.
"""

from __future__ import annotations

import errno
import importlib.util
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__, environment, toolchain
from ..bench import timing
from ..bench.run import limits_for
from ..builds import Builder, Request, default_jobs
from ..epilogue import NONE
from ..heuristic import heuristic
from ..kernel import Kernel
from ..problem import ConvProblem
from ..schedules import SCHEDULES
from ..target import Target
from .code_version import code_version
from .lookup import arch_of
from .measuring import Measurement, Measurer, TuningError, first_line
from .records import Record, append
from .replay import Replay
from .result import NOT_BUILT, Result, Watcher
from .search import Proposer, Trial, search

if TYPE_CHECKING:
    from .fleet import Fleet

__all__ = ["BEHIND", "FINALISTS", "HOPELESS", "SEARCH", "Session"]

#: The time of a candidate during a search. A tenth of the full protocol's; it ranks candidates, and
#: what it ranks first is measured again.
SEARCH = timing.Limits(warmup=0.02, seconds=0.06, least=5, most=20)
#: Configurations of each schedule that are measured again with the full protocol.
FINALISTS = 4
#: A schedule whose first configuration takes so many times as long as the fastest of all schedules
#: has no other trial. In 89 searches of all schedules the fastest one's first took up to 1.58
#: times as long as another's; CUDA cores lose more against tensor cores.
HOPELESS = 2.0
#: One whose best takes so many times as long after a quarter of its trials has none of the others:
#: of 25 searches on an H200 none gained more than half a percent after its first 16 of 64.
BEHIND = 1.1

# Bytes that have to be free where kernels are built: with less a build fails for that reason.
_ROOM = 64 << 20
# Characters of an error that a record keeps.
_KEPT = 500


@dataclass(frozen=True)
class _Candidate:
    """A configuration of a schedule, and its kernel or why there is none; None: not built yet."""

    result: Result
    config: Any
    built: Kernel | Exception | None = None


@dataclass(eq=False)
class _Search:
    """The search of one schedule, and what came of it so far: its trials, and what was right."""

    result: Result
    proposer: Proposer
    trials: list[Trial] = field(default_factory=list)
    right: list[tuple[float, _Candidate]] = field(default_factory=list)

    @property
    def best_us(self) -> float:
        return min((trial.time_us for trial in self.trials), default=inf)

    def finalists(self) -> list[_Candidate]:
        """The fastest, and the heuristic's if it is none of them."""
        ranked = [candidate for _, candidate in sorted(self.right, key=lambda pair: pair[0])]
        return ranked[:FINALISTS] + [
            candidate
            for candidate in ranked[FINALISTS:]
            if asdict(candidate.config) == self.result.heuristic
        ]


class Session:
    """Measures configurations and records them; a context manager.

    place: the folder of the logs, `<place>/<device>/<schedule>.jsonl`. jobs: processes that build;
    None is what pays. resume: take what the logs have already instead of measuring it. lock: a
    file; of the sessions that name it one measures at a time. A measurer that is given has its own.
    interrupted: whether Ctrl-C was pressed; asked between trials, because TVM turns a
    KeyboardInterrupt that meets it in a callback into an error like any other. `watcher` may be set
    to one that shows what happens. Raises TuningError where the target's kernels cannot be measured
    here.
    """

    def __init__(
        self,
        target: Target,
        place: Path,
        jobs: int | None = None,
        limits: timing.Limits | None = None,
        resume: bool = False,
        interrupted: Callable[[], bool] = lambda: False,
        measurer: Measurer | Fleet | None = None,
        lock: Path | None = None,
    ) -> None:
        if measurer is None:
            _require(target)
            measurer = Measurer(target.kind, lock=lock)
        self._target = target
        self._device = environment.device_name(target)
        self._folder = Path(place) / environment.slug(self._device)
        self._builder = Builder(jobs or default_jobs(target))
        self._measurer = measurer
        self._limits = limits or limits_for(target)
        self._interrupted = interrupted
        self._driver = measurer.driver
        self._commit = environment.git_commit()
        logs = sorted(self._folder.glob("*.jsonl")) if resume else []
        self._replay = Replay(logs, target, self._device)
        self.watcher = Watcher()
        self.results: list[Result] = []

    def __enter__(self) -> Session:
        self._builder.begin()
        return self

    def __exit__(self, *error: object) -> None:
        self._measurer.close()
        self._builder.close()

    @property
    def _batch(self) -> int:
        """Configurations that are built at once."""
        return max(self._builder.jobs, self._measurer.width)

    def log(self, schedule: str) -> Path:
        """Where the records of a schedule go."""
        return self._folder / f"{schedule}.jsonl"

    def tune(
        self,
        problem: ConvProblem,
        proposers: Mapping[str, Proposer],
        trials: int,
        seconds: float | None = None,
        together: float | None = None,
        patient: bool = False,
    ) -> list[Result]:
        """Search the configurations of one problem; the result of each schedule.

        proposers: by schedule. trials: most configurations of each schedule. No further trial is
        begun of a schedule after so many `seconds`, of the problem after so many `together`.
        patient: schedules that seem hopeless have all their trials, too (HOPELESS, BEHIND). Raises
        OSError where a record cannot be written or nothing can be built for want of room on a
        disk, and TuningError where the problem cannot be measured.
        """
        begun = time.monotonic()
        searches = [
            _Search(
                Result(problem, name, asdict(heuristic(SCHEDULES[name], problem, self._target))),
                proposer,
            )
            for name, proposer in proposers.items()
        ]
        results = [each.result for each in searches]
        self.results += results
        for result in results:
            self.watcher.search(result, trials)
        self._open(searches, trials)
        opened = time.monotonic() - begun  # the time of the preferred one's first trials
        fastest = min(each.best_us for each in searches)
        waiting = [each for each in searches if patient or each.best_us <= HOPELESS * fastest]
        # The slowest first: what it does not use of their time, those have that may win.
        waiting.sort(key=lambda each: -each.best_us)
        for each in searches:
            if each not in waiting:
                self.watcher.ended(each.result)
        finalists: list[_Candidate] = []
        for index, each in enumerate(waiting):
            least, spent = inf, time.monotonic() - begun
            if seconds is not None:
                least = seconds - opened if each is searches[0] else seconds
            if together is not None:
                least = min(least, (together - spent) / (len(waiting) - index))
            fastest = min(each.best_us for each in searches)
            self._search(each, trials, least, inf if patient else BEHIND * fastest)
            self.watcher.ended(each.result)
            finalists += each.finalists()
        self._finals(results, finalists)
        return results

    def _open(self, searches: list[_Search], trials: int) -> None:
        """The first trial of every schedule, and of the preferred one as many as are one batch.

        Built at once, they take hardly longer than one kernel; and what comes of them tells which
        schedules are worth more.
        """
        preferred, *others = searches
        asked = [(each, config) for each in others for config in each.proposer.propose(1, [])]
        count = min(trials, max(1, self._batch - len(others)))
        self._try([*asked, *((preferred, each) for each in preferred.proposer.propose(count, []))])

    def _search(self, searched: _Search, trials: int, seconds: float, bound: float) -> None:
        """The other trials of one schedule; bound: a time to reach by the first quarter of them."""
        begun = time.monotonic()

        def measure(configs: list[Any]) -> Iterator[Trial]:
            known = len(searched.trials)
            self._try([(searched, config) for config in configs])
            return iter(searched.trials[known:])

        def enough() -> bool:
            behind = 4 * len(searched.trials) >= trials and searched.best_us > bound
            return behind or time.monotonic() - begun >= seconds

        search(searched.proposer, measure, trials, self._batch, enough, searched.trials)

    def _try(self, asked: list[tuple[_Search, Any]]) -> None:
        """Trials of some configurations, in order; those of an earlier session are looked up."""
        known = [self._known(each.result, config, "search") for each, config in asked]
        missing = [pair for pair, record in zip(asked, known, strict=True) if not record]
        measured = self._measured([(each.result, config) for each, config in missing])
        for (each, config), record in zip(asked, known, strict=True):
            result = each.result
            result.tried += 1
            candidate = _Candidate(result, config)
            if record:
                result.replayed += 1
                result.add(record)
            else:
                candidate, measurement = next(measured)
                record = self._note(candidate, measurement, "search")
            self.watcher.trial(result, record, candidate.built is None)
            each.trials.append(Trial(config, record.time_us))
            if record.passed:
                each.right.append((record.time_us, candidate))
            if self._interrupted():
                raise KeyboardInterrupt

    def _finals(self, results: list[Result], finalists: list[_Candidate]) -> None:
        """Measure the fastest again, those of all schedules by turns."""
        waiting = []
        for candidate in finalists:
            record = self._known(candidate.result, candidate.config, "full")
            if record:
                candidate.result.add(record)
            else:
                waiting.append(candidate)
        if not waiting:
            return
        # Those whose search an earlier session had measured.
        places = [place for place, candidate in enumerate(waiting) if candidate.built is None]
        pairs = [(waiting[place].result, waiting[place].config) for place in places]
        for place, candidate in zip(places, self._build(pairs), strict=True):
            waiting[place] = candidate
        self.watcher.finals(results, len(waiting))
        measured = self._measure(results[0].problem, waiting, self._limits)
        for candidate, measurement in zip(waiting, measured, strict=True):
            self._note(candidate, measurement, "full")

    def _known(self, result: Result, config: Any, protocol: str) -> Record | None:
        return self._replay.get(result.schedule, result.problem, asdict(config), protocol)

    def _measured(
        self, asked: list[tuple[Result, Any]]
    ) -> Iterator[tuple[_Candidate, Measurement]]:
        """Candidates of these configurations, each measured alone, in order."""
        built = self._build(asked)
        if not asked:
            return
        problem = asked[0][0].problem
        if isinstance(self._measurer, Measurer):
            # Nothing is built while something is measured: builds take every processor.
            for candidate in list(built):
                yield candidate, self._measure(problem, [candidate], SEARCH)[0]
            return
        from .streaming import stream

        yield from stream(self._measurer, problem, built, SEARCH, _unbuilt)

    def _build(self, asked: list[tuple[Result, Any]]) -> Iterator[_Candidate]:
        if not asked:
            return iter(())
        self.watcher.building(asked[0][0], len(asked))
        requests = [
            Request(
                result.problem,
                self._target,
                result.schedule,
                config,
                # What was asked for is its name.
                accuracy=SCHEDULES[result.schedule].accuracy(result.problem),
            )
            for result, config in asked
        ]
        built = self._builder.build(requests)
        return (_Candidate(*pair, kernel) for pair, kernel in zip(asked, built, strict=True))

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
                next(measured) if index in paths else _unbuilt(candidate.built)
                for index, candidate in enumerate(candidates)
            ]

    def _note(self, candidate: _Candidate, measured: Measurement, protocol: str) -> Record:
        """Record a measurement, in the log and in the result."""
        record = self._record(candidate, measured, protocol)
        append(self.log(candidate.result.schedule), record)
        candidate.result.add(record, measured.message)
        return record

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
            error=None if measured.error is None else measured.error[:_KEPT],
        )


def _unbuilt(error: Exception) -> Measurement:
    """What is known of a kernel that could not be built. Raises OSError where a disk is full."""
    # A full disk fails every build, and is no fault of the configuration.
    folder = tempfile.gettempdir()
    if shutil.disk_usage(folder).free < _ROOM:
        raise OSError(errno.ENOSPC, "no room to build kernels", folder) from error
    return Measurement(NOT_BUILT + first_line(error))


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
