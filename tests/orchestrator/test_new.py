"""`new`: what it writes runs as it stands, a copy keeps its comments, and nothing is overwritten."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from flatmin.errors import RequestError, StudyError
from flatmin.orchestrator.cli import main
from flatmin.orchestrator.study import builtin_names, find, read_study
from flatmin.orchestrator.template import new_study


def test_the_template_plans_and_counts_as_its_comment_says(tmp_path: Path) -> None:
    file = new_study("mine", folder=tmp_path)
    assert file == tmp_path / "mine.yaml"
    study = read_study(str(file))
    assert study.name == "mine"
    assert f"= {len(study.models)} models." in file.read_text()


def test_what_the_template_has_in_comments_is_valid_too(tmp_path: Path) -> None:
    """Taken out of their comments, one by one, the lines that are left out make valid studies."""
    lines = new_study("mine", folder=tmp_path).read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("study:"))
    hidden = [number for number, line in enumerate(lines) if number > first and line.lstrip().startswith("#")]
    assert hidden
    (tmp_path / "all.yaml").write_text(
        "\n".join(line.replace("# ", "", 1) if number in hidden else line for number, line in enumerate(lines))
    )
    study = read_study(str(tmp_path / "all.yaml"))
    assert {"measure_every", "cases", "resources"} <= {
        name for name, value in study.file.model_dump(exclude_defaults=True).items() if value
    }


@pytest.mark.parametrize("name", builtin_names())
def test_a_copy_of_a_builtin_study_differs_in_its_name_alone(name: str, tmp_path: Path) -> None:
    copied = new_study("mine", name, tmp_path).read_text()
    original = find(name)[0].read_text(encoding="utf-8")
    assert copied == original.replace(f"study: {name}", "study: mine", 1) != original


@pytest.mark.parametrize(
    ("original", "copied"),
    [
        ("study: a  # why\nREST", "study: mine  # why\nREST"),
        ('# top\n"study": "a"\nREST', '# top\n"study": mine\nREST'),
        ("{study: a, settings: {dataset: digits, network: mlp, optimizer: sgd}}", None),
        ("\ufeffREST\nstudy:\n    a # above\n", "REST\nstudy:\n    mine # above\n"),
    ],
)
def test_a_copy_keeps_every_other_character(original: str, copied: str | None, tmp_path: Path) -> None:
    rest = "settings: {dataset: digits, network: mlp, optimizer: sgd}  # study: a"
    (tmp_path / "a.yaml").write_text(original.replace("REST", rest), encoding="utf-8")
    expected = original.replace("study: a", "study: mine") if copied is None else copied.replace("REST", rest)
    assert new_study("mine", str(tmp_path / "a.yaml"), tmp_path).read_text(encoding="utf-8") == expected


@pytest.mark.parametrize("name", ["1e3", "12", "true", "null"])
def test_a_name_that_yaml_takes_for_something_else_is_quoted(name: str, tmp_path: Path) -> None:
    assert read_study(str(new_study(name, folder=tmp_path))).name == name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("My Study", "Did you mean 'my-study'?"),
        ("mine.yaml", "Did you mean 'mine'?"),
        ("studies/mine", "Did you mean 'mine'?"),
        ("-mine", "Did you mean 'mine'?"),
        ("", "begins with a letter or digit."),
        ("мой", "begins with a letter or digit."),
        ("digits-sharpness", "is a built-in study; choose another name"),
        ("x" * 300, "cannot be written"),
    ],
)
def test_names_that_cannot_be_used(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=said.replace("?", r"\?")):
        new_study(name, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("my work")
    with pytest.raises(RequestError, match="is there already, and nothing is overwritten"):
        new_study("mine", folder=tmp_path)
    assert (tmp_path / "mine.yaml").read_text() == "my work"


def test_what_is_no_study_is_not_copied(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("study: a\nsettings: {dataset: digitz, network: mlp, optimizer: sgd}\n")
    with pytest.raises(StudyError, match="Did you mean 'digits'"):
        new_study("mine", str(tmp_path / "a.yaml"), tmp_path)
    with pytest.raises(RequestError, match="there is no built-in study 'digits-sharpnes'"):
        new_study("mine", "digits-sharpnes", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.yaml"]


def test_a_schema_beside_it_is_named_in_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "study.schema.json").write_text("{}")
    text = new_study("mine", folder=tmp_path).read_text()
    assert text.startswith("# yaml-language-server: $schema=study.schema.json\n")
    assert yaml.safe_load(text)["study"] == "mine"
    assert new_study("other", str(tmp_path / "mine.yaml"), tmp_path).read_text().count("yaml-language-server") == 1


def test_the_command_prints_the_file_and_says_what_is_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["flatmin-sweep", "new", "mine", "--from", "digits-label-noise"])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    assert (ended.value.code, told.out) == (0, "mine.yaml\n")
    assert told.err == "next: flatmin-sweep plan mine.yaml\n"
