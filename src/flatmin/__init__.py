"""flatmin: plan, train, measure and analyse many networks, to ask which flat minima generalise.

    import flatmin

    flatmin.launch("digits-double-descent", "results/dd")
    flatmin.Results.open("results/dd").models()        # a pandas data frame
    flatmin.report("results/dd", "report.html")

The verbs of the command line are loaded when they are used: `import flatmin` loads neither torch nor ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flatmin.orchestrator.correlate import correlate_table as correlate
    from flatmin.orchestrator.doctor import doctor
    from flatmin.orchestrator.inspect import query, status
    from flatmin.orchestrator.launch import LaunchOptions, launch
    from flatmin.orchestrator.plan import make_plan
    from flatmin.orchestrator.report import write_report as report
    from flatmin.orchestrator.study import read_study
    from flatmin.results import Results

__all__ = [
    "LaunchOptions",
    "Results",
    "correlate",
    "doctor",
    "launch",
    "make_plan",
    "query",
    "read_study",
    "report",
    "status",
]

_PLACES = {
    "LaunchOptions": ("flatmin.orchestrator.launch", "LaunchOptions"),
    "Results": ("flatmin.results", "Results"),
    "correlate": ("flatmin.orchestrator.correlate", "correlate_table"),
    "doctor": ("flatmin.orchestrator.doctor", "doctor"),
    "launch": ("flatmin.orchestrator.launch", "launch"),
    "make_plan": ("flatmin.orchestrator.plan", "make_plan"),
    "query": ("flatmin.orchestrator.inspect", "query"),
    "read_study": ("flatmin.orchestrator.study", "read_study"),
    "report": ("flatmin.orchestrator.report", "write_report"),
    "status": ("flatmin.orchestrator.inspect", "status"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'flatmin' has no attribute '{name}'")
    module, attribute = _PLACES[name]
    return getattr(import_module(module), attribute)
