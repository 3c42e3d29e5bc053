"""Logs of trials: what is printed, with its time; nothing where nothing was said."""

from __future__ import annotations

import faulthandler
import re
import sys
from pathlib import Path

import pytest

from flatmin.results import Results
from flatmin.trainables.logs import TrialLog
from flatmin.trial import Job, Trial

STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d "


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(Trial("tiny", (), committed_as="abc"), str(Results.create(tmp_path / "r", "tiny").path), "token")


def test_every_line_has_its_time(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = TrialLog(job)
    with log:
        print("one")
        sys.stderr.write("two ")
    print("for the terminal")
    with log:  # the next slice of work
        sys.stderr.write("more\nthree\n")
        faulthandler.dump_traceback(log.file)
    log.close()
    said = (tmp_path / "r" / "logs" / "abc.log").read_text()
    assert re.match(rf"{STAMP}one\n{STAMP}two more\n{STAMP}three\n", said)
    assert "test_logs.py" in said
    assert capsys.readouterr().out == "for the terminal\n"
    again = TrialLog(job)
    with again:
        print("a retry goes on below")
    again.close()
    assert (tmp_path / "r" / "logs" / "abc.log").read_text().startswith(said)


def test_a_trial_that_says_nothing_leaves_no_log(job: Job, tmp_path: Path) -> None:
    log = TrialLog(job)
    with log:
        assert log.file.fileno() > 0  # as whoever watches over hangs has it
    log.close()
    assert not list((tmp_path / "r" / "logs").iterdir())


def test_a_log_that_cannot_be_written_costs_no_trial(job: Job, tmp_path: Path) -> None:
    (tmp_path / "r" / "logs").write_text("a file where the folder should be")
    log = TrialLog(job)
    with log:
        print("lost")
    log.close()
