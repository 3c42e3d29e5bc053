"""`report` on a results directory."""

from __future__ import annotations

from pathlib import Path

import yaml

from flatmin.analysis.report import report
from flatmin.orchestrator.beside import as_published
from flatmin.orchestrator.inspect import status
from flatmin.results import Results


def write_report(results: str | Path, path: str | Path) -> Path:
    """Write the report of a results directory as one HTML file; return its path.

    Raises:
        RequestError: The directory cannot be used, or holds no trained model.
    """
    opened = Results.open(results)
    try:
        study = yaml.safe_load(opened.study_file.read_text()) or {}
    except (OSError, yaml.YAMLError):
        study = {}  # the title and the source go missing, the numbers do not; the next launch writes it again
    counts = status(opened)
    models = opened.models()
    return report(
        study=study,
        models=models,
        epochs=opened.epochs(),
        sharpness=opened.sharpness(),
        spectra=opened.spectra(),
        path=path,
        target="gen_gap" if models["gen_gap"].notna().any() else "loss_gap",  # a regression has no accuracy
        planned=counts.planned,
        failed=counts.failed,
        plan=opened.plan(),
        failures=opened.failures(),
        recipes=as_published(str(study.get("study", ""))),
    )
