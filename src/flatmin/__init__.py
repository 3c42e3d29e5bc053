"""flatmin: plan, train, measure and analyse many networks, to ask which flat minima generalise.

    import flatmin

    flatmin.launch("digits-double-descent", "results/dd")
    flatmin.Results("results/dd").models()        # a pandas data frame
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
    from flatmin.orchestrator.launch import LaunchOptions, launch, measure
    from flatmin.orchestrator.plan import plan
    from flatmin.orchestrator.release import export, import_study
    from flatmin.orchestrator.replay import replay
    from flatmin.orchestrator.report import write_report as report
    from flatmin.orchestrator.runner import RunOptions
    from flatmin.orchestrator.schema import study_schema as schema
    from flatmin.orchestrator.study import builtin_studies as studies
    from flatmin.orchestrator.template import new_study as new
    from flatmin.results import Results

__all__ = [
    "LaunchOptions",
    "Results",
    "RunOptions",
    "correlate",
    "doctor",
    "export",
    "import_study",
    "launch",
    "measure",
    "new",
    "plan",
    "query",
    "replay",
    "report",
    "schema",
    "status",
    "studies",
]

_PLACES = {
    "LaunchOptions": ("flatmin.orchestrator.launch", "LaunchOptions"),
    "Results": ("flatmin.results", "Results"),
    "RunOptions": ("flatmin.orchestrator.runner", "RunOptions"),
    "correlate": ("flatmin.orchestrator.correlate", "correlate_table"),
    "doctor": ("flatmin.orchestrator.doctor", "doctor"),
    "export": ("flatmin.orchestrator.release", "export"),
    "import_study": ("flatmin.orchestrator.release", "import_study"),
    "launch": ("flatmin.orchestrator.launch", "launch"),
    "measure": ("flatmin.orchestrator.launch", "measure"),
    "new": ("flatmin.orchestrator.template", "new_study"),
    "plan": ("flatmin.orchestrator.plan", "plan"),
    "query": ("flatmin.orchestrator.inspect", "query"),
    "replay": ("flatmin.orchestrator.replay", "replay"),
    "report": ("flatmin.orchestrator.report", "write_report"),
    "schema": ("flatmin.orchestrator.schema", "study_schema"),
    "status": ("flatmin.orchestrator.inspect", "status"),
    "studies": ("flatmin.orchestrator.study", "builtin_studies"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'flatmin' has no attribute '{name}'")
    module, attribute = _PLACES[name]
    return getattr(import_module(module), attribute)
