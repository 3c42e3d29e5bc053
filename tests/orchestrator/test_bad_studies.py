"""Bad input: exit code 2 and lines with place, value and what is possible; never a traceback, whatever the file."""

from __future__ import annotations

import random
import re
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path

import pytest

import flatmin
from flatmin.errors import RequestError, StudyError
from flatmin.orchestrator.cli import main
from flatmin.orchestrator.plan import make_plan
from flatmin.orchestrator.study import read_study

HEAD = "study: x\nsettings: {dataset: digits, network: mlp, optimizer: sgd"
AXES = f"axes: {{width: {list(range(1, 101))}, lr: {[n / 100 for n in range(1, 101)]}}}\nseeds: 100000"
BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)

BAD = {
    "unknown key": ("HEAD}\nsorce: a", "F:3: sorce: there is no such field. Did you mean 'source'?"),
    "unknown key in a case": (
        "HEAD}\ncases:\n- setings: {lr: 1}",
        "F:4: cases.0.setings: there is no such field. Did you mean 'settings'?",
    ),
    "unknown key in small": (
        "HEAD}\nsmall: {axis: {}}",
        "F:3: small.axis: there is no such field. Did you mean",
    ),
    "unknown key in a case of small": (
        "HEAD}\nsmall: {cases: [{axess: {}}]}",
        "F:3: small.cases.0.axess: there",
    ),
    "unknown key in resources": ("HEAD}\nresources: {cpu_per_trial: 1}", "Did you mean 'cpus_per_trial'?"),
    "setting among the fields": ("HEAD}\nlr: 0.1", "F:3: lr: there is no such field. 'lr' is a setting: it stands"),
    "duplicate key": ("HEAD}\nseeds: 1\nseeds: 2", "F:4: seeds: given twice (first on line 3)"),
    "duplicate key in braces": ("HEAD, lr: 1, lr: 2}", "F:2: settings.lr: given twice (first on line 2)"),
    "tab": ("study: x\nsettings:\n\tdataset: digits", "F:3: not YAML: a tab; YAML indents by spaces"),
    "tab after a key": ("study: x\nsettings:\n  dataset:\tdigits", "F:3: not YAML: a tab; YAML indents by spaces"),
    "list for a number": ("HEAD, lr: [0.1, 0.2]}", "(float); a list of values is an axis: axes: {lr: [0.1, 0.2]}"),
    "number for an axis": (
        "HEAD}\naxes: {lr: 0.1}",
        "F:3: axes.lr: 0.1: should be a list, [0.1]; one value is a se",
    ),
    "billion models": (
        f"{HEAD}}}\n{AXES}",
        "F:4: seeds: 1,000,000,000 models: 100 width x 100 lr x 100,000 seed; more than 1,000,000 are taken for a "
        "slip. If you mean it: --yes, or at_most=None in Python",
    ),
    "billion models in cases": (
        "HEAD}\ncases: [{settings: {lr: 1}}, {axes: {lr: [1, 2]}}]\nseeds: 400000",
        "F:4: seeds: 1,200,000 models, most in the case of 2 lr x 400,000 seed;",
    ),
    "setting and axis": (
        "HEAD, lr: 1}\naxes: {lr: [1]}",
        "F:3: axes.lr: is both a setting and an axis here; leave",
    ),
    "setting and axis in a case": (
        "HEAD}\ncases:\n- settings: {lr: 1}\n  axes: {lr: [1]}",
        "F:5: cases.0.axes.lr: is both a setting and an axis here; leave one of them out",
    ),
    "a case off an axis": (
        "HEAD}\naxes: {lr: [0.1, 0.2]}\ncases:\n- settings: {momentum: 0}\n- settings: {lr: 0.3}",
        "F:6: cases.1.settings.lr: 0.3 is not on the axis that all cases have, lr: [0.1, 0.2]; add it there, or move",
    ),
    "an axis of a case off an axis": (
        "HEAD}\naxes: {lr: [0.1, 0.2]}\ncases:\n- axes: {lr: [0.1, 0.3]}",
        "F:5: cases.0.axes.lr: 0.3 is not on the axis that all cases have",
    ),
    "a wrong setting in small": ("HEAD}\nsmall: {settings: {lrr: 1}}", "F:3: small.settings.lrr: "),
    "a wrong measure in small": ("HEAD}\nsmall:\n  measures: [lpff]", "F:4: small.measures.0: there is no measure"),
    "setting and axis in small": (
        "HEAD}\nsmall: {settings: {lr: 1}, axes: {lr: [1]}}",
        "F:3: small.axes.lr: is both a setting and an axis here; leave one of them out",
    ),
    "seed and seeds": (
        "HEAD, seed: 3}\nseeds: 5",
        "F:2: settings.seed: there is also seeds: 5; leave one of them out",
    ),
    "axis of seeds and seeds": ("HEAD}\naxes: {seed: [1]}\nseeds: 5", "F:3: axes.seed: there is also seeds: 5;"),
    "empty": ("", "F: the file is empty; a study is a mapping of "),
    "comments alone": ("# study: x\n", "F: the file is empty; a study is a mapping of "),
    "list at the top": ("- a\n- b", "F:1: ['a', 'b']; a study is a mapping of "),
    "two documents": ("HEAD}\n---\na: 1", "F:3: not YAML: a second document begins here, and a study is one"),
    "alias bomb": (BOMB, "more than 100,000 fields and values"),
    "alias of itself": ("study: &x {a: *x}", "F:1: nested too deeply for a study"),
    "deep nesting": ("[" * 1500, "F: nested too deeply for a study"),
    "5,000 digits": (
        f"{HEAD}, batch_size: {'9' * 5000}}}",
        "F:2: settings.batch_size: a number of 5000 digits; a whole",
    ),
    "30 digits": (f"{HEAD}}}\nseeds: {'9' * 30}", "should be less than or equal to 4611686018427387904"),
    "nan": ("HEAD, lr: .nan}", "F:2: settings.lr: nan: should be a finite number (float)"),
    "nan as text": ("HEAD, lr: nan}", "F:2: settings.lr: 'nan': should be a finite number (float)"),
    "inf": ("HEAD, lr: -.inf}", "F:2: settings.lr: -inf: should be a"),
    "inf in resources": (
        "HEAD}\nresources: {cpus_per_trial: .inf}",
        "cpus_per_trial: inf: should be a finite number",
    ),
    "date": ("HEAD, lr: 2024-01-01}", "F:2: settings.lr: '2024-01-01': should be a valid number"),
    "impossible date": ("HEAD, lr: 2024-13-45}", "F:2: settings.lr: '2024-13-45': should be a valid number"),
    "no for a number": ("HEAD, lr: no}", "F:2: settings.lr: 'no': should be a valid number"),
    "true for a number": (
        "HEAD, batch_size: true}",
        "F:2: settings.batch_size: true: must be a number, not true (int)",
    ),
    "true for a number or none": (
        "HEAD, train_size: true}",
        "train_size: true: must be a number, not true (int | none)",
    ),
    "true in a list of numbers": ("HEAD, milestones: [true]}", "milestones: [True]: must be a number, not true"),
    "true for seeds": ("HEAD}\nseeds: true", "F:3: seeds: true: should be a number, not true or false"),
    "octal": (
        "HEAD, batch_size: 010}",
        "F:2: settings.batch_size: 010: YAML 1.1 reads a leading 0 as octal; write 10",
    ),
    "tag": (
        "HEAD, lr: !!python/name:os.system }",
        "F:2: settings.lr: the tag !!python/name:os.system; a study has no",
    ),
    "wrong tag": ("HEAD, lr: !!int abc}", "F:2: settings.lr: the tag !!int; a study has no tags"),
    "number as a key": ("HEAD, 1: 2}", "F:2: settings: '1' in the place of a field's name, which is text"),
    "list as a key": ("HEAD, ? [a] : 2}", "F:2: settings: a list or mapping in the place of a field's name"),
    "NUL": ("study: \x00", "F:1: not YAML: the character 0x00, which YAML does not allow"),
    "half a character": (f'{HEAD}, precision: "\\ud800"}}', "half of a surrogate pair, which is not a character"),
    "no character": (
        'study: "\\UFFFFFFFF"',
        "F: not YAML: an escape such as \\U names a character that does not exist",
    ),
    "colon in a text": (
        "study: x\nabout: a: b",
        "F:2: not YAML: a second ': ' in 'about: a: b'; a text with ': ' in it",
    ),
    "percent": ("study: %x", "a text that begins with it wants quotes around it"),
    "empty field": ("study: x\naxes:\nsettings: {}", "F:2: axes: is empty; give it a value, or leave the line out"),
    "no seeds": ("HEAD}\nseeds: []", "F:3: seeds: []: an axis needs at least one value"),
    "seed below 0": ("HEAD}\nseeds: [1, -2]", "F:3: seeds: -2: should be greater than or equal to 0"),
    "text for measures": ("HEAD}\nmeasures: lpf", "F:3: measures: 'lpf': should be a list, ['lpf']"),
    "number for a case": ("HEAD}\ncases: [3]", "F:3: cases.0: 3: should be a mapping, name: value"),
    "number for a name": (f"study: 12\n{HEAD[9:]}}}", "F:1: study: 12: should be text; put it in quotes"),
    "capitals in the name": (
        f"study: My\n{HEAD[9:]}}}",
        "F:1: study: 'My': should be lower-case letters, digits, - and _",
    ),
}


def told_by(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[object, str]:
    """Run the command line in this process; return its exit code and what it says on the standard error."""
    monkeypatch.setattr(sys, "argv", ["flatmin-sweep", *arguments])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    assert told.out == ""
    return ended.value.code, told.err


@pytest.mark.parametrize("case", BAD)
def test_bad_studies(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text, expected = BAD[case]
    Path("F").write_text(text.replace("HEAD", HEAD), encoding="utf-8")
    small = ["--small"] if case.endswith("in small") and "key" not in case else []
    began = time.monotonic()
    code, told = told_by(["plan", "./F", *small], monkeypatch, capsys)
    assert code == 2
    assert expected in told.replace("./F", "F")
    assert all(line.startswith("./F") for line in told.splitlines())
    assert "Traceback" not in told
    assert time.monotonic() - began < 20, "refused before anything is multiplied out"


def test_files_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin").write_bytes("study: é".encode("latin-1"))
    for name, expected in {
        "latin": "latin: is not text in UTF-8: byte 7 is 0xe9; a study is a YAML file",
        ".": "'.' is a folder; a study is a YAML file",
        "x" * 300: "File name too long",
        "a\x00b": "there is no built-in study",
    }.items():
        code, told = told_by(["plan", name], monkeypatch, capsys)
        assert code == 2
        assert expected in told


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lr=[", "command line: lr=[: not YAML"),
        ("lr=2024-13-45", "command line: lr: '2024-13-45': should be a valid number"),
        ("lr=*a", "command line: lr=*a: not YAML: found undefined alias 'a'"),
        ("batch_size=010", "command line: batch_size=010: 010: YAML 1.1 reads a leading 0 as octal; write 10"),
        ("lr=!!int a", "command line: lr=!!int a: the tag !!int; a study has no tags"),
        ("lr={[1]: 2}", "a list or mapping in the place of a field's name"),
        ("lr=" + "[" * 1500, "nested too deeply"),
        ("seeds=2000000", "command line: seeds: 8,000,000 models: 2 width x 2 lr x 2,000,000 seed"),
    ],
)
def test_bad_overrides(override: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(f"{HEAD}}}\naxes: {{width: [2, 4], lr: [0.1, 0.2]}}\n")
    with pytest.raises(StudyError, match=re.escape(expected)):
        read_study(str(file), [override])


def test_what_looks_odd_and_is_meant(tmp_path: Path) -> None:
    """Numbers and words as a person writes them; text that YAML 1.1 takes for dates and truth."""
    file = tmp_path / "study.yaml"
    file.write_text(
        "study: x\nabout: 2024-01-01\nsource: no\n"
        "settings: {dataset: digits, network: mlp, optimizer: sgd, nesterov: no, batch_size: 1_00, train_size: none}\n"
        "axes: {lr: [1e-3, 1E-2, .5, 1], epochs: [1e1, 20.0]}\n",
        encoding="utf-8-sig",
    )
    study = read_study(str(file))
    first = study.models[0].settings
    assert (study.file.about, study.file.source) == ("2024-01-01", "no")
    assert (first["nesterov"], first["batch_size"], first["train_size"]) == (False, 100, None)
    assert {(model.settings["lr"], model.settings["epochs"]) for model in study.models} == {
        (lr, epochs) for lr in (0.001, 0.01, 0.5, 1.0) for epochs in (10, 20)
    }


def test_a_large_study_that_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(f"{HEAD}}}\nseeds: 30\n")
    with pytest.raises(StudyError, match=r"30 models: 30 seed; more than 29 are taken for a slip"):
        flatmin.plan(str(file), at_most=29)
    assert len(flatmin.plan(str(file), at_most=30).models) == len(flatmin.plan(str(file), at_most=None).models) == 30
    monkeypatch.setattr("flatmin.orchestrator.grid.MOST_MODELS", 29)
    for command in (["plan", str(file)], ["launch", str(file), "--results", str(tmp_path / "r")]):
        code, told = told_by(command, monkeypatch, capsys)
        assert code == 2
        assert "--yes" in told
    monkeypatch.setattr(sys, "argv", ["flatmin-sweep", "plan", str(file), "--yes"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "30 models in 1 trial of 30 models" in capsys.readouterr().out


def test_a_case_may_say_what_the_study_says(tmp_path: Path) -> None:
    """A case narrows an axis above it; its seeds stand in place of the study's."""
    file = tmp_path / "study.yaml"
    file.write_text(
        f"{HEAD}}}\naxes: {{lr: [0.1, 0.2]}}\nseeds: 3\n"
        "cases: [{settings: {lr: 0.2}}, {axes: {seed: [7]}}, {settings: {seed: 9, lr: 0.1}}]\n"
    )
    found = [(model.settings["lr"], model.settings["seed"]) for model in read_study(str(file)).models]
    assert found == [(0.2, 0), (0.2, 1), (0.2, 2), (0.1, 7), (0.2, 7), (0.1, 9)]
    assert {model.settings["seed"] for model in read_study(str(file), ["seeds=2"]).models} == {0, 1}
    assert {model.settings["seed"] for model in read_study(str(file), ["seed=4,5"]).models} == {4, 5}


def test_a_twin_thins_axes_and_seeds_of_every_kind(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(
        f"{HEAD}, lr: 0.3}}\nseeds: 3\ncases: [{{axes: {{seed: [7, 8]}}}}]\n"
        "small: {axes: {lr: [0.1, 0.2]}, seeds: 1}\n"
    )
    found = [(model.settings["lr"], model.settings["seed"]) for model in read_study(str(file), small=True).models]
    assert found == [(0.1, 0), (0.2, 0)]


WHOLE = """\
study: base
about: A study with every field.
settings: {dataset: digits, network: mlp, optimizer: sgd, epochs: 5, milestones: [1, 2]}
axes:
  width: [2, 4]
  lr: [0.1, 1e-2]
seeds: [0, 3]
measures: [lpf, lpf(sigma=0.1, data=test)]
measure_every: 2
cases:
  - settings: {momentum: 0.5}
    measures: [lambda_max]
  - axes: {optimizer: [adam, sam-sgd]}
resources: {cpus_per_trial: 1, gpus_per_trial: auto, models_per_trial: 3}
small:
  settings: {epochs: 1}
  axes: {width: [2]}
  seeds: 1
  cases: [{settings: {lr: 0.1}}]
"""
PIECES = """
    [] {} null ~ -1 0 1e400 .nan .inf no true 2024-01-01 010 *a &a !!set ' " [ ] { } # | > % @ ` \x00 é \\ ( ) , 1:2
    "\\ud800" seed seeds settings axes cases small lr sam lpf( lpf(sigma=) --- ... none fp64 {a: {<<: [*a]}} <<: width:
"""
PIECES_OF_YAML = [*PIECES.split(), "", "\t", "\n", ": ", "? ", "- ", "9" * 50]


def mutated(draw: random.Random) -> str:
    """Return the study above with one to four slips: lines lost, doubled or moved, pieces lost or put in."""
    text = WHOLE
    for _ in range(draw.randint(1, 4)):
        lines, at = text.split("\n"), draw.randrange(len(text) + 1)
        line = draw.randrange(len(lines))
        match draw.randrange(5):
            case 0:
                text = "\n".join(lines[:line] + lines[line + 1 :])
            case 1:
                text = "\n".join([*lines[:line], lines[draw.randrange(len(lines))], *lines[line:]])
            case 2:
                text = "\n".join([*lines[:line], " " * draw.randint(0, 6) + lines[line].lstrip(), *lines[line + 1 :]])
            case 3:
                text = text[:at] + text[at + draw.randint(1, 8) :]
            case _:
                word = re.compile(r"[\w.()=+-]*").match(text, at)
                until = word.end() if word and draw.random() < 0.5 else at
                text = text[:at] + draw.choice(PIECES_OF_YAML) + text[until:]
    return text


def test_whatever_the_slips_a_study_is_read_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    file, outcomes = tmp_path / "study.yaml", {"read": 0, "refused": 0}
    for seed in range(200):
        file.write_text(mutated(random.Random(seed)), encoding="utf-8")
        for small in (False, True):
            try:
                make_plan(read_study(str(file), small=small))
                outcomes["read"] += 1
            except RequestError:
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 20, outcomes
