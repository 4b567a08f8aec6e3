"""The page as a browser lays it out: nothing is clipped or sticks out, from a phone to a desk; every plot is drawn."""

import json
import os
import re
import shutil
import subprocess
from html import escape, unescape

import pytest

from lightning_collapse.reporting import report
from tests.reporting.test_page import hostile, write

MEASURES = ("feature_std", "relative_spread", "direction_spread", "eigenvalue_effective_rank", "effective_rank", "n")
MEASURE = """<body><iframe id=page style="border:0" width=WIDTH height=800 srcdoc="PAGE"></iframe><pre id=said></pre>
<script>
document.getElementById("page").onload = event => {
  const page = event.target.contentDocument
  for (const folded of page.querySelectorAll("details")) folded.open = true
  const boxes = [...page.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect())
  const lines = [...page.querySelectorAll("path.line")].map(path => path.getTotalLength())
  const text = [...page.querySelectorAll("svg text")].map(text => text.getBoundingClientRect().height)
  const clipped = [...page.querySelectorAll("table, .fits, .card, .cell, .keys, .when, figure, article, p, h3, dl, td")]
    .filter(part => part.scrollWidth > part.clientWidth && part.clientWidth)
    .map(part => `${part.tagName}.${part.className} ${part.scrollWidth} > ${part.clientWidth}`)
  for (const words of page.querySelectorAll("svg text")) {
    const own = words.getBoundingClientRect(), all = words.ownerSVGElement.getBoundingClientRect()
    if (own.left < all.left - 1 || own.right > all.right + 1 || own.top < all.top - 1 || own.bottom > all.bottom + 1)
      clipped.push(`text ${words.textContent}`)
  }
  document.getElementById("said").textContent = JSON.stringify({ clipped,
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


@pytest.fixture(scope="module", params=["one run", "several runs"])
def page(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    name = "backbone.stages.3.blocks.17.attention.output.projection_of_a_long_name"
    curves = {f"collapse/{name}{i}/{m}": [3.0, 2.0, 1.5, 4.0] for i in range(12) for m in MEASURES}
    words = f"- complete collapse in `{name}1` since step 1: {'verylongword' * 20}."
    write(folder / ("run_" * 30), curves, [("guard/verdict", words, 2)])
    if request.param == "several runs":
        hostile(folder)
        write(folder / "short", curves | {f"collapse/{name}{i}/a_measure": [1e5, -2.0] for i in range(3)})
    return report(folder, folder / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [320, 420, 800, 1280])
def test_it_fits_and_plots_are_drawn(width, page, tmp_path):
    frame = tmp_path / "frame.html"
    frame.write_text(MEASURE.replace("WIDTH", str(width)).replace("PAGE", escape(page)), encoding="utf-8")
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", frame.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    said = json.loads(unescape(re.search(r'<pre id="said">(.*?)</pre>', dom, re.DOTALL)[1]))
    assert said["width"] <= said["room"] <= width
    assert said["widest"] <= width
    assert said["clipped"] == []
    assert said["svgs"] == page.count("<svg") > 10
    assert said["smallest"] > 20
    assert said["text"] > 8
    assert said["lines"] == page.count('class="line ') > 10
    assert said["shortest"] > 10
    assert said["scripts"] == 0
