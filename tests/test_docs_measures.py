"""docs/measures.md: every example runs, every measure, setting, default, cost and label in it is what there is."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from flatmin.labels import format_value, parse_label
from flatmin.plugins import Plugin, get, listing
from flatmin.sharpness import measure

PAGE = (Path(__file__).parents[1] / "docs" / "measures.md").read_text(encoding="utf-8")


def table(first: str) -> str:
    """Return the table of the page whose first heading starts so."""
    (found,) = re.findall(rf"^\| {first}.*?\n(.*?)\n\n", PAGE, re.DOTALL | re.MULTILINE)
    return str(found)


MEASURES = listing("measure")
SECTIONS = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", PAGE, re.DOTALL | re.MULTILINE))
INTRODUCTION, *EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
LABELS = sorted(set(re.findall(rf"\b(?:{'|'.join(MEASURES)})\([a-z_]+=[^()]*\)", PAGE)))
COSTS = {
    name: cost
    for names, cost in re.findall(r"^\| (`.*`) \| ([^|]+) \|$", table("cost at the defaults"), re.MULTILINE)
    for name in re.findall(r"`(\w+)`", names)
}


def number(text: str) -> int:
    found = re.match(r"\d+", text)
    assert found, text
    return int(found[0])


def written(default: Any) -> str:
    return "none" if default is None else format_value(default)


@pytest.fixture(scope="module")
def namespace() -> dict[str, Any]:
    """Return what the page's introduction defines: a trained model, its data and its initial weights."""
    names: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        exec(INTRODUCTION, names)
    return names


@pytest.fixture(scope="module")
def rows(namespace: dict[str, Any]) -> pd.DataFrame:
    """Return every measure at its defaults, of the introduction's model, by name."""
    found = measure(
        namespace["model"],
        "cross_entropy",
        (namespace["x"], namespace["y"]),
        list(MEASURES),
        initial=namespace["initial"],
    )
    return found.set_index("measure")


@pytest.mark.parametrize("example", EXAMPLES, ids=map(str, range(len(EXAMPLES))))
def test_example_runs(example: str, namespace: dict[str, Any]) -> None:
    names = dict(namespace)
    exec(example, names)
    made = [names[name] for name in ("frame", "plane", "line") if name in names]
    assert made
    for frame in made:
        assert len(frame)
        columns = frame[["value"]] if "value" in frame else frame
        assert bool(columns.notna().all().all())


def test_curves_are_as_told(namespace: dict[str, Any]) -> None:
    names = dict(namespace)
    (example,) = [example for example in EXAMPLES if "points =" in example]
    exec(example, names)
    density, plane = names["density"].sort_values("x"), names["plane"]
    integral = torch.trapezoid(*(torch.tensor(density[name].to_numpy()) for name in ("value", "x")))
    assert integral.item() == pytest.approx(1.0, abs=1e-6)
    assert plane.shape == (11, 11)
    loss = torch.nn.functional.cross_entropy(names["model"].eval()(names["x"]), names["y"]).item()
    assert plane.iloc[5, 5] == pytest.approx(loss, rel=1e-5)


def test_commands_run(tmp_path: Path) -> None:
    """In the page's order, on its study, without Ray; in one process, to import once."""
    (study,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "my-sharpness.yaml").write_text(study)
    lines = [shlex.split(command) for command in COMMANDS]
    lines = [[*line, "--inline"] if line[1] in ("launch", "measure") else line for line in lines]
    code = (
        "import sys\nfrom flatmin.orchestrator.cli import main\n"
        f"for sys.argv in {lines!r}:\n"
        "    try: main()\n"
        "    except SystemExit as done: assert not done.code, (sys.argv, done.code)\n"
        "    print('done')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    told = done.stdout.split("done\n")
    assert [bool(text) for text in told] == [*(line[1] == "query" for line in lines), False]
    assert all(name in told[2] for name in ("lpf", "lambda_max", "fisher_rao"))


def test_sections_are_the_listing() -> None:
    assert set(SECTIONS) == set(MEASURES)


@pytest.mark.parametrize("plugin", MEASURES.values(), ids=lambda plugin: plugin.name)
def test_every_setting_is_named_with_its_default(plugin: Plugin) -> None:
    (settings,) = re.findall(r"^Settings: (.*?)\n\n", SECTIONS[plugin.name], re.DOTALL | re.MULTILINE)
    told = re.findall(r"`(\w+)` = (\S+?)[.,]?(?:\s|$)", settings)
    assert dict(told) == {key: written(argument.default) for key, argument in plugin.arguments.items()}


@pytest.mark.parametrize("plugin", MEASURES.values(), ids=lambda plugin: plugin.name)
def test_every_refusal_is_told(plugin: Plugin) -> None:
    told = re.findall(r"^Takes no (.*?)\n\n", SECTIONS[plugin.name], re.DOTALL | re.MULTILINE)
    common = get("subject", "subject").arguments
    assert [name for text in told for name in re.findall(r"`(\w+)`", text) if name in common] == list(plugin.refuses)


def test_the_common_arguments_are_told() -> None:
    told = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", table("argument"), re.MULTILINE))
    common = get("subject", "subject").arguments
    assert told == {key: written(argument.default) for key, argument in common.items()}


@pytest.mark.parametrize("label", LABELS)
def test_labels_parse_and_can_be_measured(label: str, namespace: dict[str, Any]) -> None:
    """As they are written in the tables: canonical, but for numbers; on few examples."""
    parsed = parse_label(label)
    assert set(re.findall(r"(\w+)=", label)) == set(re.findall(r"(\w+)=", parsed.label)), "no setting at its default"
    few = namespace["x"][:300], namespace["y"][:300]
    (row,) = measure(
        namespace["model"],
        "cross_entropy",
        few,
        [label],
        initial=namespace["initial"],
        sets={"test": (namespace["x_test"], namespace["y_test"])},
    ).to_dict("records")
    assert row["value"] is not None


def test_the_first_column_of_controls_are_measures() -> None:
    controls = set(re.findall(r"`(\w+)`", table("control")))
    assert controls == {name for name, section in SECTIONS.items() if re.search(r"\bA\s+control\.", section)}


@pytest.mark.parametrize("name", sorted(MEASURES))
def test_costs_are_as_told(name: str, rows: pd.DataFrame, namespace: dict[str, Any]) -> None:
    """At the defaults, of a model with more weights than any budget; batches and the root search by their own rule."""
    row, examples = rows.loc[name], len(namespace["x"])
    assert name in COSTS
    cost, passes, samples = COSTS[name], row["passes"], row["samples"]
    per_batch = re.match(r"(\d+) b / n .* b = (\d+)$", cost)
    products = re.match(r"4 × (\d+) to 4 × (\d+) ", cost)
    losses = re.match(r"(\d+) to (\d+), and (\d+) more", cost)
    if per_batch:
        each, batch = map(int, per_batch.groups())
        assert passes == pytest.approx(each * batch / examples * samples)
    elif products:
        assert passes == 4 * samples
        assert int(products[1]) <= samples <= int(products[2])
    elif losses:
        least, most, further = map(int, losses.groups())
        assert least <= passes <= most + further
        assert passes - samples in (least - 16, least - 16 + further)
    elif name == "eps_sharpness":
        assert passes == pytest.approx(3 + 4 * min(1.0, 256 / examples) + samples)
    elif name == "pac_bayes":
        assert passes >= 1 + 48
    else:
        assert passes == number(cost)


def test_errors_are_what_the_table_says(rows: pd.DataFrame) -> None:
    """The measures that it does not name are exact; the others are not, on a network of more weights than budgets."""
    named = {name for name in re.findall(r"`(\w+)(?:\([^`]*\))?`", table("`stderr` is")) if name in MEASURES}
    inexact = set(rows.index[rows["stderr"] != 0])
    linear_layers_alone = {"spectral_norms"}
    whole_set = {"sam_sharpness"}
    assert inexact == named - linear_layers_alone - whole_set
