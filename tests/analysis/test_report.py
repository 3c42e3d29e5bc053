"""The report: one valid file that needs nothing else, whatever the tables hold."""

from __future__ import annotations

import base64
import gzip
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from flatmin.analysis import page, section
from flatmin.analysis.report import report
from flatmin.errors import RequestError

VOID = {"meta", "input", "br"}


class Page(HTMLParser):
    """Reads a page, checks that elements are properly nested, and keeps what a test asks for."""

    def __init__(self, content: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.data: dict[str, Any] = {}
        self.scripts: list[str] = []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        _, attributes = self.elements[-1] if self.elements else ("", {})
        inside = self.open[-1] if self.open else ""
        if inside == "script" and attributes.get("type") == "application/json":
            self.data[str(attributes["id"])] = json.loads(data)
        elif inside == "script" and attributes.get("data-packed") == "gzip":
            self.data[str(attributes["id"])] = json.loads(gzip.decompress(base64.b64decode(data)))
        elif inside == "script":
            self.scripts.append(data)
        elif inside != "style":
            self.words.append(data)

    @property
    def figures(self) -> set[str]:
        return {str(attributes["data-figure"]) for _, attributes in self.elements if "data-figure" in attributes}

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, tables: Any, study: dict[str, object]) -> Page:
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    arguments = {"models": tables.models, "epochs": tables.epochs, "sharpness": tables.sharpness}
    assert report(study=study, path=path, **arguments) == path
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
    return read(path)


def test_everything_is_there(written: Page) -> None:
    measures = {"scatter", "correlations", "psi", "noise-label_noise", "cost"}
    figures = measures | {"against-axis", "training", "coverage"}
    assert written.figures == figures
    plots, tables = {f"plot-{name}" for name in figures}, {f"data-{name}" for name in figures}
    assert set(written.data) == plots | tables | {"data-models"}
    expected = ["fake-double-descent", "Source: Nobody et al. 2026", "66 models", "1 diverged"]
    for words in [*expected, "torch 2.9.0", "commit abc1234"]:
        assert words in written.text
    assert "Left out: status diverged (1)." in written.text


def test_nothing_is_fetched(written: Page) -> None:
    """No element loads anything, the policy forbids it, and plotly.js's upload button is off."""
    loaders = {"src", "href", "srcset", "action", "data", "poster", "background"}
    assert [element for element in written.elements if loaders & set(element[1])] == []
    tags = {tag for tag, _ in written.elements}
    assert tags & {"link", "iframe", "img", "object", "embed", "base"} == set()
    named = {attributes.get("http-equiv"): attributes.get("content") for _, attributes in written.elements}
    policy = named["Content-Security-Policy"]
    assert str(policy).startswith("default-src 'none';")
    assert "http" not in str(policy)
    own = written.scripts[-1]
    assert "showSendToCloud: false" in own
    assert 'plotlyServerURL: ""' in own
    assert "http" not in own
    assert sum(len(script) > 1_000_000 for script in written.scripts) == 1


def test_the_style_asks_for_nothing() -> None:
    style = (Path(page.__file__).parent / "report.css").read_text(encoding="utf-8")
    assert "url(" not in style
    assert "@import" not in style


def test_the_peak_is_said_and_counts_are_right(written: Page) -> None:
    assert "label_noise 0: Test error peaks at width 16" in written.text
    assert "label_noise 0.2: Test error peaks at width 16" in written.text
    assert "Models converged or finished: n = 65; 1 diverged left out." in written.text
    # 22 stacks of three models whose shares are 2, 3 and 4 s
    assert "3 min training time" in written.text


def test_the_model_table_has_all_models(written: Page, tables: Any) -> None:
    table = written.data["data-models"]
    assert table["columns"][:4] == ["model_id", "width", "label_noise", "seed"]
    assert table["columns"][-2:] == ["eps_sharpness(radius=0.1)", "lpf"]
    assert len(table["data"]) == len(tables.models)
    assert table["data"][0][table["columns"].index("gen_gap")] is None
    assert table["data"][0][0] == tables.models["model_id"].iloc[0]


def test_the_correlation_table_has_the_interval(written: Page) -> None:
    assert re.search(r"lpf -?0\.\d{3} \[-?0\.\d{3}, -?0\.\d{3}\] 65 22", written.text)


NASTY = "</script><script>alert('x')</script><b>&amp;\"'"


def test_every_value_is_escaped(tmp_path: Path, tables: Any) -> None:
    names = [f"{NASTY}{place % 2}" for place in range(len(tables.models))]
    models = tables.models.assign(network=names, host=NASTY, dataset=NASTY)
    models["execution"] = json.dumps({"versions": {NASTY: NASTY}, "commit": NASTY})
    sharpness = tables.sharpness.assign(label=tables.sharpness["label"] + NASTY)
    study = {"study": NASTY, "about": NASTY, "source": NASTY, "measures": [NASTY]}
    path = tmp_path / "r.html"
    report(study=study, models=models, epochs=tables.epochs, sharpness=sharpness, path=path)
    read_back = read(path)
    assert "alert('x')" not in "".join(read_back.scripts)
    assert {tag for tag, _ in read_back.elements} & {"b", "i"} == set()
    assert read_back.text.count(NASTY) >= 6
    table = read_back.data["data-models"]
    assert table["data"][0][table["columns"].index("network")] == names[0]


def edge_cases(tables: Any) -> dict[str, dict[str, Any]]:
    models, epochs, sharpness = tables.models, tables.epochs, tables.sharpness
    scores = [column for column in models if column.endswith(("_loss", "_acc", "_gap"))]
    one = models.iloc[[5]]
    narrow = models[(models["width"] == 16) & (models["label_noise"] == 0)]
    return {
        "no sharpness": {"models": models, "epochs": epochs, "sharpness": sharpness.iloc[:0]},
        "no tables but models": {"models": models},
        "one model": {"models": one, "epochs": epochs, "sharpness": sharpness},
        "all diverged": {
            "models": models.assign(status="diverged", **dict.fromkeys(scores)),
            "epochs": epochs,
            "sharpness": sharpness,
        },
        "null scores": {"models": models.assign(**dict.fromkeys(scores, np.nan)), "sharpness": sharpness},
        "null values": {"models": models, "sharpness": sharpness.assign(value=np.nan, stderr=None)},
        "one axis": {"models": models[models["label_noise"] == 0], "epochs": epochs, "sharpness": sharpness},
        "only seeds": {"models": narrow, "epochs": epochs, "sharpness": sharpness},
        "names as axis": {
            "models": models[models["width"] == 16].assign(width=16, network=list("ababab"), label_noise=0.0),
            "epochs": epochs,
            "sharpness": sharpness,
        },
        "null settings": {
            "models": models.assign(rho=np.where(models.index % 2, 0.1, np.nan), note=None, optimizer="sam"),
            "sharpness": sharpness,
        },
        "no execution": {"models": models.drop(columns=["execution", "host", "device", "seconds"])},
        "broken execution": {"models": models.assign(execution=["{", "[]", None] * 22)},
        "list axis": {"models": models.assign(width=4, milestones=[[1], [2, 3]] * 33), "epochs": epochs},
        "constant gap": {"models": models.assign(gen_gap=0.1), "epochs": epochs, "sharpness": sharpness},
    }


NOISE = "noise-label_noise"
MEASURES = {"scatter", "correlations", "psi", "cost"}
FIGURES = {
    "no sharpness": {"against-axis", "training", NOISE},
    "no tables but models": {"against-axis", NOISE},
    "one model": {"scatter", "correlations", "training", "cost"},
    "all diverged": {"cost"},
    "null scores": {"against-axis", "cost", NOISE},
    "null values": {"against-axis", "correlations", "cost", NOISE},
    "one axis": {"against-axis", "training"} | MEASURES,
    "only seeds": {"scatter", "correlations", "training", "cost"},
    "names as axis": {"training"} | MEASURES,
    "null settings": {"against-axis", NOISE} | MEASURES,
    "no execution": {"against-axis", NOISE},
    "broken execution": {"against-axis", NOISE},
    "list axis": {"training", NOISE},
    "constant gap": {"against-axis", "scatter", "training", "cost", NOISE},
}
REASONS = {
    "no sharpness": "Measures against gen_gap: no measure was taken.",
    "one model": "against a setting: no numeric setting has 5 values or more.",
    "all diverged": "No correlation: no model is converged or finished",
    "null values": "Measures against gen_gap: no model that counts has both a measure and gen_gap.",
    "no tables but models": "Training curves: no epoch was recorded.",
    "constant gap": "No correlation: target: column 'gen_gap' is constant (0.1)",
}


@pytest.mark.parametrize("case", FIGURES)
def test_odd_tables_make_a_valid_page(case: str, tmp_path: Path, tables: Any, study: dict[str, object]) -> None:
    cases = edge_cases(tables)
    assert set(cases) == set(FIGURES) >= set(REASONS)
    made = read(report(study=study, path=tmp_path / "r.html", **cases[case]))
    assert made.figures == FIGURES[case] | {"coverage"}
    assert len(made.data["data-models"]["data"]) == len(cases[case]["models"])
    assert "nan" not in made.text.lower().split()
    assert REASONS.get(case, "") in made.text


def test_planned_and_failed_are_counted(tmp_path: Path, tables: Any) -> None:
    path = report(study={}, models=tables.models, path=tmp_path / "r.html", planned=70, failed=4)
    assert "66 of 70 models" in read(path).text
    assert "4 failed" in read(path).text


def test_three_thousand_models_stay_small_and_quick(tmp_path: Path, tables: Any) -> None:
    def many(table: pd.DataFrame) -> pd.DataFrame:
        return pd.concat([table.assign(model_id=table["model_id"] + str(copy)) for copy in range(46)])

    start = time.process_time()
    models, epochs, sharpness = many(tables.models), many(tables.epochs), many(tables.sharpness)
    path = report(study={}, models=models, epochs=epochs, sharpness=sharpness, path=tmp_path / "r.html")
    assert time.process_time() - start < 20
    assert len(models) > 3000
    assert path.stat().st_size < 10e6


def test_the_main_axis_is_width_then_noise_then_any_number(tables: Any) -> None:
    models = tables.models
    row = models.index
    many = models.assign(label_noise=row % 7 / 10, data_noise=row % 5, lr=row % 6 + 1.0)
    assert section.main_axis(many) == "width"
    assert section.main_axis(many.assign(width=4)) == "label_noise"
    assert section.main_axis(many.assign(width=4, label_noise=0.1)) == "data_noise"
    assert section.main_axis(many.assign(width=4, label_noise=0.1, data_noise=0)) == "lr"
    assert section.main_axis(models.assign(width=4)) is None


def test_wrong_requests(tmp_path: Path, tables: Any) -> None:
    with pytest.raises(RequestError, match="no trained model"):
        report(study={}, models=tables.models.iloc[:0], path=tmp_path / "r.html")
    with pytest.raises(RequestError, match="no column 'gap'"):
        report(study={}, models=tables.models, path=tmp_path / "r.html", target="gap")
    with pytest.raises(RequestError, match="is a directory"):
        report(study={}, models=tables.models, path=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot be written"):
        report(study={}, models=tables.models, path=tmp_path / "file" / "r.html")


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.html"
    page.write(path, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        page.write(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.html"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(3, "3"), (1 / 3, "0.3333"), (float("nan"), "–"), ([1, None], "1, –"), ({"a": "<"}, "a: &lt;")],
)
def test_text(value: object, text: str) -> None:
    assert page.text(value) == text
