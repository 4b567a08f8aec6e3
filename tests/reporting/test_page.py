"""The page of real runs: what it says, that names stay text, that it stands alone, and that it does not grow."""

import re
from html.parser import HTMLParser
from math import inf, nan
from shutil import copytree

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import histogram_raw

from lightning_collapse import CollapseGuard, CollapseMonitor
from lightning_collapse.__main__ import main
from lightning_collapse.functional import expected_under_isotropy
from lightning_collapse.reporting import report
from tests.toys import Toy, batches, fit

SCRIPT = "<script>alert(1)</script>"
VOID = {"meta", "img"}


class Dying(Toy):
    """Its encoder forgets what it was given, more at every step."""

    def __init__(self):
        super().__init__()
        self.encoder.add_module(SCRIPT, nn.Identity())

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.encoder[2].weight *= 0.3
        return super().training_step(batch, batch_idx)


class Page(HTMLParser):
    """Elements, attributes and text; fails on a tag that is not closed in its turn."""

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def unknown_decl(self, data):
        raise AssertionError(data)

    def handle_data(self, words):
        self.words.append(words)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def train(folder, version, model, layers=("encoder", "encoder.*"), **kwargs):
    guard = CollapseGuard(action=kwargs.pop("action", "log"))
    logger = TensorBoardLogger(folder, name="", version=version)
    callbacks = [CollapseMonitor(list(layers), every_n_steps=2), guard]
    fit(model, callbacks, batches(24), logger=logger, log_every_n_steps=2, **kwargs)
    logger.experiment.close()
    return guard


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs: one that collapses, with a layer that is called like a script, and one that does not."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("logs")
    guard = train(folder, '<b>dying</b> & "co"', Dying())
    assert any("script" in str(verdict) for verdict in guard.verdicts)
    assert not train(folder, "healthy", Toy()).verdicts
    return folder, guard.verdicts


@pytest.fixture(scope="module")
def logs(trained):
    return trained[0]


@pytest.fixture(scope="module")
def html(logs, tmp_path_factory):
    return report(logs, tmp_path_factory.mktemp("page") / "new" / "page.html").read_text(encoding="utf-8")


def write(folder, curves, texts=()):
    writer = SummaryWriter(folder)
    for tag, values in curves.items():
        for step, value in enumerate(values):
            writer.add_scalar(tag, value, step, walltime=1e9 + step)
    for tag, words, step in texts:
        writer.add_text(tag, words, step, walltime=1e9)
    writer.close()
    return folder


def hostile(folder):
    """Names that no monitor writes, in every place from where one reaches the page."""
    writer = SummaryWriter(folder / f"{SCRIPT}\" onload='x' {{{{")
    layer = f"{SCRIPT}\" onload='x' ]]> \u202e"
    for step in range(6):
        tags = [f"collapse/{layer}/{name}" for name in ("effective_rank", "feature_std", "relative_spread", SCRIPT)]
        values = [Summary.Value(tag=tag, simple_value=1.0 / (step + 1)) for tag in (*tags, f"loss {layer}")]
        values += [Summary.Value(tag=f"guard/{kind}", simple_value=1.0) for kind in ("complete_collapse", "a&b<u>")]
        writer.file_writer.add_summary(Summary(value=values), step)
        for tag in (f"collapse/{layer}/log10_std", "collapse/b/log10_std"):
            writer.file_writer.add_summary(histogram_raw(tag, 0, 1, 8, 4, 4, [0.0, 0.25], [4, 4]), step)
    writer.add_text("guard/verdict", f"- complete collapse in `{layer}` since step 2: {SCRIPT} & so on.", 3)
    writer.add_text("guard/verdict", f"- unheard of in `{SCRIPT}` since step 2: it is so.", 4)
    writer.close()


def bare(words):
    """Without what markup and white space make of them."""
    return re.sub(r"[`\s]", "", words)


def page_of(folder, tmp_path):
    return report(folder, tmp_path / "page.html").read_text(encoding="utf-8")


def test_it_says_what_the_guard_said(trained, html):
    page = Page(html)
    assert trained[1]
    for verdict in trained[1]:
        kind = verdict.kind.replace("_", " ")
        said = f"{kind} in {verdict.layer} since step {verdict.since}, said at step {verdict.step}"
        assert said in page.text
        assert bare(f"{verdict.evidence[1:]}; also {', '.join(verdict.also)}.") in bare(page.text)
        assert bare(page.text).count(bare(verdict.advice)) == 1
    assert page.text.count("No verdict") == 1
    assert "`" not in page.text


def test_the_first_screen_is_the_verdict_a_sentence_and_the_curve_it_rests_on(trained, html):
    dying, healthy = re.findall(r'<article class="card .*?</article>', html, re.DOTALL)[:2]
    [verdict, *_] = trained[1]
    assert f"Complete collapse in <code>{verdict.layer}</code> since step {verdict.since}" in dying
    assert bare(verdict.says) in bare(Page(dying).text)
    assert f"feature_std of {verdict.layer}" in Page(dying).of("svg")[0]["aria-label"]
    assert f"since step {verdict.since}" in re.findall(r'<li class="mark">.*?</li>', dying)[0]
    assert "The guard was there and said nothing, in 4 layers over 13 points." in Page(healthy).text
    assert "of all layers the lowest beside noise" in Page(healthy).of("svg")[0]["aria-label"]


def test_what_is_part_of_a_verdict_is_no_further_one(tmp_path):
    curves = {"guard/complete_collapse": [0, 1, 1], "guard/dimensional_collapse": [0, 2, 2]}
    curves["guard/neural_collapse_reached"] = [0, 0, 1]
    words = "- complete collapse in `a` since step 1: it is so; also dimensional collapse in `b`."
    page = Page(page_of(write(tmp_path / "run", curves, [("guard/verdict", words, 1)]), tmp_path))
    assert "2 verdicts in 1 run" in page.text
    assert "neural collapse reached since step 2" in page.text
    assert "Dimensional collapse" not in page.text


def test_numbers_of_the_page_are_those_of_the_events(tmp_path):
    curves = {"collapse/a/effective_rank": [8.0, 4.25, 2.5], "collapse/a/feature_std": [1.0, 0.5, 0.123]}
    page = Page(page_of(write(tmp_path / "run", curves), tmp_path))
    assert "a 0.123 2.5" in page.text
    assert "0 8 1 4.25 2 2.5" in page.text


def test_names_stay_text(tmp_path):
    hostile(tmp_path / "logs")
    html = page_of(tmp_path / "logs", tmp_path)
    page = Page(html)
    assert page.of("script") == []
    assert "<u>" not in html
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert "\u202e" not in html
    for words in (f"{SCRIPT} & so on.", "Unheard of in <script>", f"loss {SCRIPT}"):
        assert words in page.text
    assert sum(SCRIPT in a["aria-label"] for a in page.of("svg")) > 5
    assert Page(html).of("h3")


def test_a_run_keeps_its_name_whatever_it_is(html):
    assert '<b>dying</b> & "co"' in Page(html).text


def test_it_stands_alone(html):
    page = Page(html)
    links = [a[name] for _, a in page.elements for name in ("src", "href", "xlink:href", "action") if name in a]
    assert links
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert {link[1:] for link in links if link[0] == "#"} == {a["id"] for _, a in page.elements if "id" in a}
    assert "url(" not in html
    assert "@import" not in html
    assert not page.of("link")
    assert page.of("meta")[1] == {"name": "viewport", "content": "width=device-width, initial-scale=1"}
    assert "prefers-color-scheme: dark" in html


def test_every_picture_has_a_name_and_numbers(html):
    page = Page(html)
    assert len(page.of("svg")) > 20
    assert all(a["role"] == "img" and a["aria-label"] for a in page.of("svg"))
    assert all("alt" in a for a in page.of("img"))
    bare = html.count("<figure class=card>") + html.count("<figure class=spark>")
    assert html.count("<figure") - bare == html.count("<summary>Numbers</summary>")
    for svg in re.findall("<svg.*?</svg>", html):
        assert ">step</text>" in svg


def test_dashed_and_dotted_lines_have_a_key(html):
    for figure in re.findall("<figure.*?</figure>", html, re.DOTALL):
        for style in ("mark", "line null"):
            assert (f'class="{style}"' in figure) == (f'<li class="{style.removeprefix("line ")}">' in figure)


def test_evidence_has_the_curves_that_the_rule_reads(html):
    [verdict, *_] = re.findall(r"<h3>Complete collapse in <code>[^<]*</code></h3>.*?</article>", html, re.DOTALL)
    assert re.findall(r"<figure><b>(\w+)</b>", verdict) == [
        "feature_std",
        "relative_spread",
        "direction_spread",
        "eigenvalue_effective_rank",
    ]
    assert verdict.count('path class="mark"') == 8
    assert all(len(re.findall(r"[ML]", path)) > 5 for path in re.findall(r'class="line c0" d="([^"]+)"', verdict))


def test_equal_events_give_equal_bytes(logs, html, tmp_path):
    assert page_of(logs, tmp_path) == html


def test_missing_numbers_are_gaps_and_ticks(tmp_path):
    curves = {"collapse/a/effective_rank": [3.0, nan, 2.0, inf, 1.0, -inf], "collapse/b/effective_rank": [nan] * 6}
    html = page_of(write(tmp_path / "run", curves), tmp_path)
    Page(html)
    assert not re.findall(r'[" ,]-?(?:nan|inf)', re.sub(r"base64,[^\"]*", "", html))
    html = html.partition("<h2>Collapse</h2>")[2]
    [path] = re.findall(r'class="line c0" d="([^"]+)"', html)
    assert path.count("M") == 3
    assert re.findall(r'class="lost c0" d="([^"]+)"', html)[0].count("M") == 3
    assert re.findall(r'class="lost c1" d="([^"]+)"', html)[0].count("M") == 6


def test_runs_share_an_axis_and_colors(tmp_path):
    for run, top in (("a", 2.0), ("b", 40.0)):
        write(tmp_path / "logs" / run, {f"collapse/{layer}/effective_rank": [1.0, top] for layer in "xy"})
    html = page_of(tmp_path / "logs", tmp_path).partition("<h2>Collapse</h2>")[2]
    labels = [re.findall(r'class="y"[^>]*>([^<]+)', svg) for svg in re.findall("<svg.*?</svg>", html)]
    assert [label for label in labels if "x" not in label] == [["0", "10", "20", "30", "40", "step"]] * 2
    assert re.findall(r'<li class="(c\d)"><i></i>(\w)</li>', html) == [("c0", "a"), ("c1", "b")] * 2
    assert len(set(re.findall(r"<figcaption>(0 .*?; a column per point)", html))) == 1


def test_what_noise_reads_stands_beside_a_rank(logs, html):
    n, d = 64, 8
    null = expected_under_isotropy("effective_rank", n, d)
    assert f'<span class="soft">of {null:.3g}</span>'.replace('"', "") in html


def test_a_long_run_is_thinned_and_keeps_its_spike(tmp_path):
    values = [5.0] * 3000
    values[1234] = 77.0
    html = page_of(write(tmp_path / "run", {"collapse/a/effective_rank": values}), tmp_path)
    [path] = re.findall(r'class="line c0" d="([^"]+)"', html.partition("<h2>Collapse</h2>")[2])
    assert 100 < len(re.findall("[ML]", path)) <= 500
    assert len({re.split(" ", at)[1] for at in re.findall(r"[ML]([\d. ]+)", path)}) == 2
    assert len(html) < 60_000


def test_many_runs_layers_and_measures_do_not_make_a_large_page(tmp_path):
    curves = {f"collapse/layer{i}/m{j}": [float(i + j)] * 40 for i in range(20) for j in range(12)}
    first = write(tmp_path / "logs" / "0", curves)
    for run in range(1, 10):
        copytree(first, tmp_path / "logs" / str(run))
    html = page_of(tmp_path / "logs", tmp_path)
    assert "8 of 10 runs are shown" in html
    assert "8 of 20 layers are drawn" in html
    assert len(html) < 6e6


def test_curves_of_other_tools_are_left_out_but_for_the_loss(tmp_path):
    curves = {"collapse/a/effective_rank": [2.0], "train/accuracy": [0.5], "train_loss": [1.0], "glossary": [3.0]}
    html = page_of(write(tmp_path / "run", curves), tmp_path)
    assert "train_loss" in html
    assert "accuracy" not in html
    assert "glossary" not in html


def test_without_words_the_counts_tell(tmp_path):
    curves = {"guard/complete_collapse": [0, 1, 2, 0, 0, 1, 1], "guard/neural_collapse_reached": [0] * 6 + [1]}
    page = Page(page_of(write(tmp_path / "run", curves), tmp_path))
    assert "complete collapse since step 1, said at step 1 complete collapse since step 5" in page.text
    assert "layers that are judged so" in page.of("svg")[0]["aria-label"]
    assert [a["class"] for a in page.of("article")] == ["card bad", "card bad", "card bad", "card news"]
    assert "Only the number of layers was logged" in page.text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "missing", "`logdir` must be a folder .*no such folder"),
        (lambda folder: folder, "none is under it. Give the folder that `TensorBoardLogger"),
        (lambda folder: write(folder, {"accuracy": [1.0]}), "none of 1 runs has a curve of this package. Train with"),
    ],
)
def test_nothing_to_show_says_what_to_do(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        report(make(tmp_path), tmp_path / "page.html")
    with pytest.raises(SystemExit, match=message):
        main(["report", str(make(tmp_path)), "--out", str(tmp_path / "page.html")])
    assert not (tmp_path / "page.html").exists()


def test_the_command_writes_the_page(logs, html, tmp_path, capsys):
    main(["report", str(logs), "--out", str(tmp_path / "mine.html")])
    assert (tmp_path / "mine.html").read_text(encoding="utf-8") == html
    assert str(tmp_path / "mine.html") in capsys.readouterr().out


def test_the_command_opens_the_page(logs, tmp_path, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or False)
    main(["report", str(logs), "--out", str(tmp_path / "mine.html"), "--open"])
    assert opened == [(tmp_path / "mine.html").as_uri()]
    assert "no browser" in capsys.readouterr().out


def test_layers_are_told_apart_by_what_differs(tmp_path):
    front = "model.backbone.encoder.layers"
    layers = [f"{front}.{i}.attention.output.dense_of_a_long_name_{side}" for i in range(3) for side in "ab"]
    curves = {f"collapse/{layer}/effective_rank": [3.0, 2.0] for layer in layers}
    curves |= {"spectral_alignment/all/median": [0.1, 0.2], "guard/complete_collapse": [0, 0]}
    html = page_of(write(tmp_path / "run", curves), tmp_path)
    assert "in 6 layers over 2 points" in Page(html).text
    [raster] = [svg for svg in re.findall("<svg.*?</svg>", html) if "<image" in svg]
    named = [name for name in re.findall(r'class="y"[^>]*>([^<]+)', raster) if name != "step"]
    assert len(set(named)) == 6
    assert all(name in html for name in ("layers.0.attention.output.dense_of_a_long_name_a</li>",))
    assert f"<li>{front}" not in html
