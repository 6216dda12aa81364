"""Many damaged files through every reader, each case in bounded time and memory, and repeatable by its number."""

import logging
import random
import shutil
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .readers import Reader, is_refusal, readers

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

SECONDS = 2.0  # of processor time that one case may take
ROOM = 1_500_000_000  # bytes of address space above what the imports took
LONGEST_MESSAGE = 7000
_KEPT_FAULTS = 20
_TOLD_EVERY = 10_000  # cases


@dataclass(slots=True)
class Tally:
    """What came of the cases of one reader."""

    cases: int = 0
    refused: int = 0
    slowest: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)

    @property
    def read(self) -> int:
        """Cases that were read to the end, rightly."""
        return self.cases - self.refused


@dataclass(slots=True)
class Outcome:
    """Of a campaign. `faults`: a text for each kind, the first twenty; `fault_count`: all; `seen`: how often each."""

    tallies: dict[str, Tally] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    fault_count: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    growth: int = 0

    @property
    def cases(self) -> int:
        return sum(tally.cases for tally in self.tallies.values())

    def table(self) -> str:
        """A line for each reader, and the sums."""
        lines = [f"{'reader':<16}{'cases':>9}{'refused':>9}{'read':>9}{'slowest':>10}"]
        for name, tally in self.tallies.items():
            lines.append(f"{name:<16}{tally.cases:>9}{tally.refused:>9}{tally.read:>9}{tally.slowest:>8.2f} s")
        lines.append(
            f"{self.cases} cases in {self.seconds:.0f} s, {self.fault_count} faults, memory grew by "
            f"{self.growth / 1e6:.0f} MB"
        )
        return "\n".join(lines)


def run(
    folder: Path,
    cases: range,
    *,
    seed: int = 0,
    only: str = "",
    seconds: float = 0.0,
    keep: Path | None = None,
    tell: Callable[[str], None] | None = None,
) -> Outcome:
    """Go through cases by number; a number and a seed are always the same file.

    Args:
        folder: for the files; best in memory.
        cases: their numbers.
        seed: of the whole campaign.
        only: the name of one reader, "" for all.
        seconds: stop after so many, 0: never.
        keep: where files go that were no good; None: they are not kept.
        tell: called with the text of every new kind of fault, and with the table so far after each 10,000 cases.
    """
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    known = readers(folder)
    chosen = [reader for reader in known for _ in range(reader.share) if only in ("", reader.name)]
    outcome = Outcome({reader.name: Tally() for reader in known if only in ("", reader.name)})
    limit_memory()
    started, before = time.monotonic(), 0
    for number in cases:
        if number == cases.start + 200:
            before = memory()  # by then everything is imported and every cache is filled
        outcome.seconds = time.monotonic() - started
        if seconds and outcome.seconds > seconds:
            break
        if tell is not None and number > cases.start and (number - cases.start) % _TOLD_EVERY == 0:
            outcome.growth = memory() - before
            tell(outcome.table())
        fault = one_case(folder, number, seed, chosen, outcome, keep)
        if fault:
            outcome.fault_count += 1
            kind = "".join(fault.partition(", ")[2].splitlines()[-4:])  # where it was raised, and what
            if kind not in outcome.seen and len(outcome.faults) < _KEPT_FAULTS:
                outcome.faults.append(fault)
                if tell is not None:
                    tell(fault)
            outcome.seen[kind] += 1
    outcome.seconds = time.monotonic() - started
    outcome.growth = memory() - before if before else 0
    return outcome


def one_case(
    folder: Path, number: int, seed: int, chosen: list[Reader], outcome: Outcome, keep: Path | None = None
) -> str:
    """Make one damaged file and read it; what is wrong, or ""."""
    draw = random.Random(f"{seed}/{number}")
    reader = draw.choice(chosen)
    content = reader.mutate(draw.choice(reader.samples), draw)
    path = folder / f"case{reader.ending}"
    path.write_bytes(content)
    (folder / "now").write_text(f"{number} {reader.name}")  # a crash leaves behind which case it was
    tally, problem = outcome.tallies[reader.name], ""
    tally.cases += 1
    start = time.process_time()
    try:
        reader.use(path, content)
    except Exception as error:  # noqa: BLE001 - the point is to see every kind
        tally.kinds[type(error).__name__] += 1
        tally.refused += 1
        if not is_refusal(error):
            problem = "".join(traceback.format_exception(error, limit=-6))
        elif len(str(error)) > LONGEST_MESSAGE:
            problem = f"a message of {len(str(error))} characters: {str(error)[:200]}..."
    took = time.process_time() - start
    tally.slowest = max(tally.slowest, took)
    if took > SECONDS:
        problem = problem or f"it took {took:.1f} s"
    if problem and keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, keep / f"{seed}-{number}{reader.ending}")
    return f"case {number} of seed {seed}, {reader.name}: {problem}" if problem else ""


def limit_memory() -> None:
    """A file that asks for more than ROOM ends in a MemoryError, which is a fault, and not in a busy machine."""
    if resource is None or not Path("/proc/self/statm").exists():
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def memory() -> int:
    """Bytes that this process holds in RAM, 0 where nothing says so."""
    if resource is None or not Path("/proc/self/statm").exists():
        return 0
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
