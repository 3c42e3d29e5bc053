"""Headless Chromium for tests: it opens a page, lets a script look at it, and asks nothing of a network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

BUILD = Path(__file__).parents[2] / "build"
"""Where screenshots for people to look at are kept."""

LEAVE = """
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
"""
"""The end of a script that `play` runs: it leaves its object `found`."""


def chromium(page: Path, *options: str, width: int = 1160, height: int = 5200) -> str:
    """Open a page; return what the browser writes, and demand that the page writes nothing to its console."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert program, "there is no Chromium; on Debian, run: sudo apt install chromium"
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    command += [f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},{height}"]
    command += ["--virtual-time-budget=20000", "--host-resolver-rules=MAP * ~NOTFOUND", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    return done.stdout


def play(page: Path, script: str) -> dict[str, Any]:
    """Open a page with a further script in it; return what that leaves in an element `found`."""
    played = page.with_name("played.html")
    played.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    return found_in(chromium(played, "--dump-dom"))


def found_in(dom: str) -> dict[str, Any]:
    """Return what a script left in a page."""
    match = re.search(r'<pre id="found">(.*?)</pre>', dom, flags=re.DOTALL)
    assert match, "the script did not come to its end"
    return dict(json.loads(unescape(match[1])))
