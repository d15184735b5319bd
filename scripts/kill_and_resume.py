#!/usr/bin/env python3
"""Kill a tuning session at random moments, resume it, and check that its log is whole.

    python scripts/kill_and_resume.py [--kills 20] [--trials 24] [--jobs N] [--seed 0] [PROBLEM]

On the CPU. After every kill -9: what was in the log before is still there, byte for byte; no line
but the last is torn; no configuration was measured twice; no process is left. After every fourth
kill the last line is cut short, as a power cut would leave it. In the end the session runs to its
end, and once more, which adds nothing and chooses the same. Exits with 1 where that does not hold.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from im2win_tvm.tuning.records import Record, read  # noqa: E402

# Seconds: until the command measures its first trial; that orphans may take to end; for a run.
START, ENDING, PATIENCE = 3.0, 20.0, 600.0


class Broken(Exception):
    """What does not hold."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("problem", nargs="?", default="mb1ic3ih9oc5kh3ph1")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    asked = parser.parse_args()
    chance = random.Random(asked.seed)
    with tempfile.TemporaryDirectory(prefix="im2win-") as folder:
        command = [sys.executable, "-m", "im2win_tvm", "tune", asked.problem, "--target", "llvm",
                   "--trials", str(asked.trials), "--jobs", str(asked.jobs), "--resume",
                   "--out", folder]  # fmt: skip
        try:
            for turn in range(1, asked.kills + 1):
                kept = _kill(command, Path(folder), chance)
                cut = turn % 4 == 0 and _cut(Path(folder), chance)
                print(f"kill {turn}: {kept} records{', the last one cut' * bool(cut)}", flush=True)
            first, second = _finish(command), _finish(command)
            if second != first:
                raise Broken(f"resumed twice, chosen twice:\n{first}\n{second}")
            records = _whole(Path(folder))
            found = sum(record.protocol == "search" for record in records)
            if found != asked.trials:
                raise Broken(f"{found} trials in the log, {asked.trials} asked for")
        except Broken as error:
            sys.exit(f"FAIL {error}")
        print(f"PASS {asked.kills} kills, {len(records)} records, none lost, torn or twice")


def _kill(command: list[str], place: Path, chance: random.Random) -> int:
    """Run the command, kill it at a random moment, check the log; how many records it has."""
    before = _bytes(place)
    running = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    time.sleep(chance.random() * START)
    wanted = before.count(b"\n") + chance.randrange(3)
    until = time.monotonic() + PATIENCE
    while running.poll() is None and _bytes(place).count(b"\n") < wanted:
        if time.monotonic() > until:
            raise Broken(f"no {wanted} records within {PATIENCE:.0f} s")
        time.sleep(0.005)
    time.sleep(chance.random() * 0.5)
    running.send_signal(signal.SIGKILL)
    running.wait()
    _require_end(running.pid)
    if not _bytes(place).startswith(before):
        raise Broken("a line of an earlier session was lost")
    return len(_whole(place))


def _require_end(group: int) -> None:
    """Wait until no process of the killed session is left."""
    until = time.monotonic() + ENDING
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(group, signal.SIGKILL)
    raise Broken(f"processes of the killed session were there {ENDING:.0f} s later")


def _whole(place: Path) -> list[Record]:
    """The records; a line that is none may stand where a session died, one for each cut."""
    records = []
    for path in place.glob("*/*.jsonl"):
        lines = read(path)
        records += [line.record for line in lines if isinstance(line.record, Record)]
        for line in lines:
            if isinstance(line.record, str) and not line.record.startswith("not JSON"):
                raise Broken(f"{path.name}:{line.number}: {line.record}")
    keys = Counter((r.schedule, str(r.key), repr(r.config), r.protocol) for r in records)
    twice = [key for key, count in keys.items() if count > 1]
    if twice:
        raise Broken(f"measured twice: {twice[0]}")
    return records


def _cut(place: Path, chance: random.Random) -> bool:
    """Cut the last line short, as a power cut may; whether there was one."""
    for path in place.glob("*/*.jsonl"):
        text = path.read_bytes()
        last = len(text) - text.rstrip(b"\n").rfind(b"\n") - 1
        if last > 1:
            os.truncate(path, len(text) - chance.randrange(1, last))
            return True
    return False


def _bytes(place: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(place.glob("*/*.jsonl")))


def _finish(command: list[str]) -> str:
    """Run the command to its end; what it chose."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    if done.returncode:
        raise Broken(f"exit code {done.returncode}: {done.stdout}{done.stderr}")
    # Without how many of the trials were replayed.
    return done.stdout[done.stdout.index(", best ") :]


if __name__ == "__main__":
    main()
