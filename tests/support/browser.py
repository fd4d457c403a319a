"""A page in a real browser: headless Chromium."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
# What the page is once its own scripts have run: in the title, which the browser prints with the rest of the document.
PROBE = """<script>document.title = JSON.stringify([document.documentElement.scrollWidth, innerWidth,
[...document.images].every(each => each.complete && each.naturalWidth > 0), (() => { %s })()])</script>"""


@dataclass(frozen=True)
class Seen:
    """A page as a browser has it.

    Attributes:
        errors: what its scripts and its resources complained of.
        overflows: it is wider than the window.
        images: all of its pictures are shown.
        answer: what the test's own script returned.
    """

    errors: list[str]
    overflows: bool
    images: bool
    answer: object


def missing() -> str:
    """Return why no browser can be started here, or an empty string."""
    return "" if any(map(shutil.which, PROGRAMS)) else "no Chromium (apt-get install chromium)"


def see(page: Path, width: int, folder: Path, script: str = "") -> Seen:
    """Open a page in a window of `width` pixels; a picture of it is left in `folder`.

    Args:
        page: an HTML file.
        width: of the window; 500 at least.
        folder: for the browser's own files, and NAME-WIDTH.png.
        script: JavaScript whose `return` is the answer, run once the page is there.
    """
    probed = folder / f"{page.stem}-{width}.html"
    probed.write_text(page.read_text("utf-8").replace("</body>", PROBE % script + "</body>"), "utf-8")
    command = [
        next(filter(None, map(shutil.which, PROGRAMS))), "--headless", "--no-sandbox", "--disable-gpu",
        "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions", f"--user-data-dir={folder / 'profile'}",
        "--enable-logging=stderr", "--hide-scrollbars", f"--window-size={width},1600",
    ]  # fmt: skip
    told = _run([*command, "--dump-dom", probed.as_uri()])
    _run([*command, f"--screenshot={probed.with_suffix('.png')}", page.resolve().as_uri()])
    title = re.search(r"<title>(.*?)</title>", told.stdout, re.DOTALL)
    assert title, told.stderr
    scroll_width, inner_width, images, answer = json.loads(html.unescape(title[1]))
    errors = [line for line in told.stderr.splitlines() if "CONSOLE" in line]
    return Seen(errors, scroll_width > inner_width, images, answer)


def _run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
