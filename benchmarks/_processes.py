"""Run a whole command and measure it: wall and CPU seconds, peak memory, of the process and all it started."""

import os
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

SAMPLE_SECONDS = 0.02
MB = 1_000_000
THREAD_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class RunFailed(Exception):
    """A command ended with an error; the message says what it wrote about it."""


@dataclass(frozen=True)
class Usage:
    """What one run took: seconds, megabytes (of 10^6 bytes) at the peak, and cores that others kept busy meanwhile."""

    wall: float
    cpu: float
    rss: float
    anonymous: float
    others: float

    def rounded(self) -> dict[str, float]:
        return {name: round(value, 3) for name, value in asdict(self).items()}


def median(runs: Sequence[Usage]) -> Usage:
    """Return the median of every measurement by itself."""
    return Usage(*(statistics.median(getattr(run, field.name) for run in runs) for field in fields(Usage)))


def measure(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> Usage:
    """Run a command to its end and return what it took.

    Peak resident memory is what the kernel counted, the larger of the process and its children. The kernel starts that
    count at the peak of whoever starts the process, so this program itself must stay small (see `aside`). Memory of
    its own - resident memory less pages of files - is sampled.
    """
    os.sync()  # what the last run left to be written is not this run's burden
    busy, started = busy_seconds(), time.perf_counter()
    with subprocess.Popen(
        [str(part) for part in command],
        env={**clean_environment(), **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        sampler = _Sampler(process.pid)
        sampler.start()
        output = process.stdout.read() if process.stdout else b""
        _, status, used = os.wait4(process.pid, 0)
        wall, busy = time.perf_counter() - started, busy_seconds() - busy
        sampler.finish()
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        lines = output.decode(errors="replace").strip().splitlines() or ["no message"]
        said = next((line for line in reversed(lines) if "error" in line.lower()), lines[-1]).strip()
        raise RunFailed(f"{Path(command[0]).name} ended with {process.returncode}: {said}")
    cpu = used.ru_utime + used.ru_stime
    return Usage(wall, cpu, used.ru_maxrss * 1024 / MB, sampler.peak / MB, max(0.0, busy - cpu) / wall)


def clean_environment() -> dict[str, str]:
    """Return the environment without limits on threads, and without the Hub."""
    kept = {name: value for name, value in os.environ.items() if name not in THREAD_LIMITS}
    return kept | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def busy_seconds() -> float:
    """Return the CPU seconds that the whole machine has spent on work since it started, all processes together."""
    names = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
    ticks = dict(zip(names, map(int, Path("/proc/stat").read_text().split()[1:]), strict=False))
    return (sum(ticks.values()) - ticks["idle"] - ticks["iowait"]) / os.sysconf("SC_CLK_TCK")


class _Sampler(threading.Thread):
    """Looks at the anonymous memory of a process and its children, fifty times a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._pid = pid
        self._finished = threading.Event()

    def run(self) -> None:
        while not self._finished.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, anonymous_memory(self._pid))

    def finish(self) -> None:
        self._finished.set()
        self.join()


def anonymous_memory(pid: int) -> int:
    """Return the bytes of anonymous resident memory of a process and its descendants; 0 for one that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    own = next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)
    return own + sum(anonymous_memory(int(child)) for child in children)


def warm(paths: Iterable[Path]) -> None:
    """Read files once, so that the page cache has them."""
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 20):
                pass


def machine() -> dict[str, str]:
    """Return what the numbers depend on: processor, cores, kernel, Python."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    cores = len(os.sched_getaffinity(0))
    return {"processor": model, "cores": str(cores), "system": f"{platform.system()} {platform.release()}"}
