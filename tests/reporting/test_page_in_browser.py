"""The page as a browser lays it out: on a phone nothing sticks out, and every plot is drawn."""

import json
import os
import re
import shutil
import subprocess
from html import escape, unescape

import pytest

from lightning_collapse.reporting import report
from tests.reporting.test_page import hostile, write

MEASURE = """<body><iframe id=page style="border:0" width=WIDTH height=800 srcdoc="PAGE"></iframe><pre id=said></pre>
<script>
document.getElementById("page").onload = event => {
  const page = event.target.contentDocument
  for (const folded of page.querySelectorAll("details")) folded.open = true
  const boxes = [...page.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect())
  const lines = [...page.querySelectorAll("path.line")].map(path => path.getTotalLength())
  const text = [...page.querySelectorAll("svg text")].map(text => text.getBoundingClientRect().height)
  document.getElementById("said").textContent = JSON.stringify({
    width: page.documentElement.scrollWidth, room: page.documentElement.clientWidth, svgs: boxes.length,
    smallest: Math.min(...boxes.map(box => Math.min(box.width, box.height))), text: Math.min(...text),
    widest: Math.max(...boxes.map(box => box.right)), lines: lines.length, shortest: Math.min(...lines),
    scripts: page.scripts.length})
}
</script></body>"""


def browser():
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if found := shutil.which(name):
            return found
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs chromium, chrome or playwright")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.executable_path
    if not os.path.exists(found):
        pytest.skip("playwright is here, its browser is not: `playwright install chromium`")
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    name = "backbone.stages.3.blocks.17.attention.output.projection_of_a_long_name"
    curves = {f"collapse/{name}{i}/{m}": [3.0, 2.0, 1.5, 4.0] for i in range(12) for m in ("effective_rank", "n")}
    words = f"- complete collapse in `{name}1` since step 1: {'verylongword' * 20}."
    write(folder / ("run_" * 30), curves, [("guard/verdict", words, 2)])
    hostile(folder)
    return report(folder, folder / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_it_fits_and_plots_are_drawn(width, page, tmp_path):
    frame = tmp_path / "frame.html"
    frame.write_text(MEASURE.replace("WIDTH", str(width)).replace("PAGE", escape(page)), encoding="utf-8")
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", frame.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    said = json.loads(unescape(re.search(r'<pre id="said">(.*?)</pre>', dom, re.DOTALL)[1]))
    assert said["width"] <= said["room"] <= width
    assert said["widest"] <= width
    assert said["svgs"] == page.count("<svg") > 10
    assert said["smallest"] > 20
    assert said["text"] > 8
    assert said["lines"] == page.count('class="line ') > 10
    assert said["shortest"] > 10
    assert said["scripts"] == 0
