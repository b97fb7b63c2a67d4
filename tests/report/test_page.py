"""The page: verdict first, everything escaped, one file; in a notebook, by ``fit.report`` and in a browser."""

import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from fits import quick
from models import conjugate
from report_cases import correlated, draws_of, normal, posterior_with_model

import pyro_flowguides as fg
from pyro_flowguides.diagnostics.posterior import Posterior
from pyro_flowguides.diagnostics.verdicts import Verdict, VerdictKind
from pyro_flowguides.report import fragment, gather, page
from pyro_flowguides.report.page import headline, number

pytest.importorskip("matplotlib")

VOID = {"meta", "link", "br"}


class Balance(html.parser.HTMLParser):
    """Whether every element is closed, and which there are."""

    def __init__(self):
        super().__init__()
        self.open, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(text):
    parser = Balance()
    parser.feed(text)
    assert parser.open == []
    return parser.tags


def test_the_page_is_one_file_that_asks_for_nothing():
    text = page(gather(posterior_with_model()))
    tags = parsed(text)
    assert "script" not in tags
    assert set(re.findall(r'(?:src|href)="([^"]{0,5})', text)) <= {"data:", "#"} | {
        link[:5] for link in re.findall(r'href="(#[^"]*)', text)
    }
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles == [
        "Estimates",
        "Marginals",
        "Pairs",
        "Does the model make data like yours?",
        "Training",
        "Weights",
        "Modes",
        "How it was run",
        "How to make it again",
        "Versions",
    ]
    assert text.index("fg-verdict") < text.index("<table>") < text.index("<svg")


def test_names_are_escaped():
    values = {"<script>alert(1)</script>": normal(50), "b&b": normal(50, seed=1)}
    posterior = Posterior([draws_of(values)], attrs={"guide": "<i>", "name": "<u>", "made_by": "fit(<model>)"})
    text = page(gather(posterior, facts={"<em>": "<em>"}))
    assert not {"script", "i", "u", "model", "em"} & set(parsed(text))
    assert "b&amp;b" in text


@pytest.mark.parametrize("kind", VerdictKind)
def test_every_verdict_has_a_headline(kind):
    tone, sentence = headline(Verdict(kind, 0.1, 0.9, 100, "for a reason"))
    assert sentence.lower().startswith(kind.value.partition(":")[0][:4])
    assert (tone == "good") == (kind in (VerdictKind.EXACT, VerdictKind.GOOD))


def test_a_lost_mode_is_in_the_headline():
    verdict = Verdict(
        VerdictKind.DOUBTFUL, 0.1, 0.9, 100, "a reason", unseen="A mode at x = 3 has gone.", lost_mass=0.4
    )
    text = page(gather(Posterior([draws_of({"x": normal(50)})]), verdict=verdict))
    assert "A mode of the posterior is missing" in text
    assert "A mode at x = 3 has gone." in text


@pytest.mark.parametrize(
    ("value", "sd", "text"),
    [
        (4.5061, 3.3, "4.51"),
        (0.12345, 0.04, "0.1235"),
        (12345.6, 800.0, "12,346"),
        (1.5, 0.0, "1.50"),
        (0.0, 0.0, "0.00"),
        (3e9, 1.0, "3e+09"),
        (2.0, float("nan"), "2.00"),
    ],
)
def test_numbers_have_the_digits_that_are_worth_reading(value, sd, text):
    assert number(value, sd) == text


def test_what_is_too_much_is_marked():
    x = normal(2000)
    draws = draws_of({"x": x}, log_p=torch.as_tensor(1.5 * x))
    assert 'class="off"' in page(gather(Posterior([draws])))
    assert 'class="off"' not in page(gather(Posterior([draws_of({"x": x}, noise=0.01)])))


def test_many_scalars_and_draws_that_are_not_finite_are_said():
    values = {"x": normal(100, 40), "y": np.r_[np.nan, normal(99)]}
    text = page(gather(Posterior([draws_of(values)])))
    assert "The 30 of 41 parameters with the largest expected errors." in text
    assert "Some draws of y are not finite" in text


def test_the_report_of_a_fit(tmp_path):
    fit = quick(conjugate, fg.AutoPlanar(conjugate, num_layers=2), [0.3, 1.4, 2.2])
    path = tmp_path / "report.html"
    fit.report(path, beside={"again": fit.draws})
    text = path.read_text()
    assert "fit(conjugate, AutoPlanar(conjugate, num_layers=2), y, num_steps=20, num_particles=8" in text
    assert "seed=0" in text
    assert ">again</span>" in text
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(FileNotFoundError):
        fit.report(tmp_path / "missing" / "report.html")
    fit.save(tmp_path / "fit.npz")
    assert fg.FitResult.load(tmp_path / "fit.npz").made_by == fit.made_by
    cell = fit._repr_html_()
    assert set(parsed(cell)) >= {"style", "table", "svg"}
    assert "@media (prefers-color-scheme: dark)" in cell


def test_a_notebook_shows_the_head_of_a_long_table():
    text = fragment(gather(Posterior([draws_of({"x": normal(100, 14)})]), with_predictive=False))
    assert "4 more in" in text
    assert text.count("<svg") == 3


# --- in a browser -----------------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]
FLAGS += ["--disable-component-update", "--disable-sync", "--virtual-time-budget=2000"]
# Measures the page, and says what it has found in its title.
PROBE = """<script>
const errors = []; window.onerror = message => errors.push(message);
document.addEventListener("securitypolicyviolation", event => errors.push(event.blockedURI));
window.onload = () => { const root = document.documentElement; document.title = JSON.stringify({
  errors, wide: root.scrollWidth > root.clientWidth, width: window.innerWidth,
  requests: performance.getEntriesByType("resource").map(each => each.name).filter(name => !name.startsWith("data:")),
  pictures: [...document.querySelectorAll("svg")].map(each => each.getBoundingClientRect())
    .every(box => box.width > 50 && box.height > 50),
  bitmaps: [...document.querySelectorAll("svg image")].length,
  paper: getComputedStyle(document.body).backgroundColor}); };
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser(width, tmp_path):
    """No error, no request, nothing wider than the window, every picture there; the same in the dark."""
    path = tmp_path / "report.html"
    text = page(gather(posterior_with_model(), beside={"nuts": correlated()}, reference="nuts"))
    # A window of Chromium is no narrower than 500 pixels; a frame is.
    path.write_text(text.replace("</head>", PROBE + "</head>"))
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="page" src="report.html" style="width:{width}px;height:900px;border:0"></iframe><script>'
        'page.onload = () => { document.title = "x"; document.body.textContent = page.contentDocument.title; };</script>'
    )
    flags = [
        *FLAGS,
        f"--user-data-dir={tmp_path / 'profile'}",
        "--allow-file-access-from-files",
        f"--window-size={width},900",
    ]
    papers = set()
    for dark in ([], ["--blink-settings=preferredColorScheme=0"]):
        command = [CHROMIUM, *flags, *dark, "--enable-logging=stderr", "--dump-dom", frame.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert "CONSOLE" not in done.stderr
        found = json.loads(html.unescape(re.search(r"\{.*\}", done.stdout)[0]))
        papers.add(found.pop("paper"))
        assert found == {
            "errors": [],
            "wide": False,
            "width": width,
            "requests": [],
            "pictures": True,
            "bitmaps": found["bitmaps"],
        }
        assert found["bitmaps"] >= 2
    assert len(papers) == 2
