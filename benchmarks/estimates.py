"""What `plan --calibrate` says a study will take, against what its launch then takes, on the same machine.

Device seconds of a launch are the sum over its models of the seconds of training and of measures; by the clock, it runs
from the start of Ray to its end. Both go through Ray, as many trials at a time as there are cores. Other work on the
machine moves both; the load at the start of each is printed beside them.

    python benchmarks/estimates.py [--budget 60] [STUDY ...]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import dataclass

from _figures import show
from rich.table import Table

from flatmin.orchestrator.calibrate import calibrate
from flatmin.orchestrator.estimate import Estimate
from flatmin.orchestrator.launch import launch
from flatmin.orchestrator.plan import make_plan
from flatmin.orchestrator.study import read_study

STUDIES = ("digits-sharpness", "digits-double-descent")


@dataclass(frozen=True)
class Compared:
    """One study: what was said of it, and what it took.

    Attributes:
        study: Its name.
        said: The calibrated estimate.
        calibrating: Seconds by the clock that it took.
        device: Device seconds of the launch.
        wall: Its seconds by the clock.
        loads: The load of the machine, one minute's mean, before the estimate and before the launch.
    """

    study: str
    said: Estimate
    calibrating: float
    device: float
    wall: float
    loads: tuple[float, float]


def compare(name: str, budget: float) -> Compared:
    """Calibrate a study, then launch all of it."""
    study, load = read_study(name), os.getloadavg()[0]
    started = time.perf_counter()
    said = calibrate(make_plan(study).trials, study.arguments, study.file.resources, budget=budget)
    calibrating = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        later, started = os.getloadavg()[0], time.perf_counter()
        results = launch(name, folder).results
        wall = time.perf_counter() - started
        device = sum(sum(results.table(table)["seconds"].to_pylist()) for table in ("models", "sharpness"))
    return Compared(name, said, calibrating, device, wall, (load, later))


def main() -> None:
    """Compare each study once and print a line of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", default=STUDIES, metavar="STUDY")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of the pilots")
    given = parser.parse_args()
    header = ["study", "calibrating, s", "device time said, s", "taken, s", "ratio", "by the clock said, s", "taken, s"]
    title = f"What plan --calibrate says of studies, against their launches: {', '.join(given.studies)}"
    table = Table(*header, "ratio", "load", box=None, title=title)
    for name in given.studies:
        found = compare(name, given.budget)
        said = found.said
        assert said.total is not None
        assert said.wall is not None
        table.add_row(
            name,
            f"{found.calibrating:.0f}",
            f"{said.total:.0f} ({said.low:.0f} to {said.high:.0f})",
            f"{found.device:.0f}",
            f"{said.total / found.device:.2f}",
            f"{said.wall:.0f}",
            f"{found.wall:.0f}",
            f"{said.wall / found.wall:.2f}",
            "{:.1f}, {:.1f}".format(*found.loads),
        )
    about = f"n = 1 each; {given.budget:g} s of pilots"
    show(table, "estimates", ("torch", "ray", "flatmin-sweep"), about=about)


if __name__ == "__main__":
    main()
