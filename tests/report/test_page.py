"""The page stands alone, tells what is missing, escapes what it shows, and looks right in a real browser."""

import argparse
import base64
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gaitfast.config import UserError
from gaitfast.report import page
from gaitfast.report.figures import CURVES
from tests.report.fake_run import fake_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PHONE, DESKTOP = 390, 1200


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> page.Report:
    return page.write_report(fake_run(tmp_path_factory.mktemp("runs") / "walk"))


class Parsed(HTMLParser):
    """Tags with their attributes, the text, and whether every tag that was opened was closed in order."""

    VOID = ("meta", "link", "img", "source", "br")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text += data


def parse(path: Path) -> Parsed:
    parsed = Parsed(path.read_text(encoding="utf-8"))
    assert parsed.open == []
    return parsed


def pictures(parsed: Parsed) -> list[str]:
    return [v for _, attributes in parsed.tags for k, v in attributes.items() if k in ("src", "srcset")]


def test_figures_and_page_are_written(report):
    assert report.page == report.run.path / "report" / "index.html"
    names = {path.stem for path in report.figures}
    assert names == {*CURVES, "augmentation", "autoencoder", "samples"}
    for path in report.figures:
        with Image.open(path) as image:
            assert image.width >= 800 and np.asarray(image.convert("L")).std() > 5
    assert not [p.name for p in report.page.parent.iterdir() if p.name.startswith(".")]


def test_page_needs_nothing_else(report):
    parsed = parse(report.page)
    uris = pictures(parsed)
    assert len(uris) > 2 * len(CURVES) + 48
    for uri in uris:
        assert uri.startswith("data:image/png;base64,")
        Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1], validate=True))).load()
    tags = {tag for tag, _ in parsed.tags}
    assert not tags & {"script", "iframe", "object", "embed", "base", "form"}
    assert [a["href"] for _, a in parsed.tags if "href" in a] == ["data:,"]
    assert not any(k.startswith("on") for _, a in parsed.tags for k in a)
    assert not re.search(r"url\(|@import|https?:", report.page.read_text(encoding="utf-8"))
    policy = next(a["content"] for tag, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "script-src" not in policy


def test_page_tells_the_headline_and_every_section(report):
    text = " ".join(parse(report.page).text.split())
    assert report.headline.sentence() in text and report.headline.sentence()
    for heading in (
        "Training",
        "Recognition of unseen people",
        "What the condition tells the denoiser",
        "Augmentations",
    ):
        assert heading in text
    for part in (
        "Reconstructions",
        "Denoised clips",
        "Throughput",
        "Every option",
        "Files of the run",
        "data.augment.flip",
    ):
        assert part in text
    assert "nothing to draw" not in text and "No pictures" not in text and "Not everything could be read" not in text
    error = report.headline.identity.give_or_take().strip()
    assert re.fullmatch(r"\u00b1 0\.\d+%", error)
    assert f"{error}(other \N{MINUS SIGN} same) / same loss, with its standard error" in text
    assert "identity_error" in text
    assert "backend.denoiser" in text and "4.5 GiB" in text and "17 min 23 s" in text


@pytest.mark.parametrize("steps", [0, 20, 700])
def test_unfinished_run(tmp_path, steps):
    folder = fake_run(tmp_path / "going", steps=steps, finished=False, with_pictures=False)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 720, "lo')
    result = page.write_report(folder)
    text = parse(result.page).text
    assert "unfinished" in text and "cut off, the run may be writing it" in text
    assert "No pictures to show" in text and "nothing to show. They come from summary.json" in text
    assert ("Denoising loss in training: nothing to draw. It needs metrics.jsonl: loss" in text) == (steps == 0)


@pytest.mark.parametrize(
    "kept", ["config.resolved.yaml", "summary.json", "metrics.jsonl", "evaluations.jsonl", "pictures.safetensors"]
)
def test_any_one_file_makes_a_page(tmp_path, kept):
    folder = fake_run(tmp_path / "part")
    for path in folder.iterdir():
        if path.name != kept:
            path.unlink()
    result = page.write_report(folder, tmp_path / "out")
    assert result.page == tmp_path / "out" / "index.html" and result.run.notices == []
    parse(result.page)
    assert not (folder / "report").exists()


def test_text_of_the_run_is_never_markup(tmp_path):
    evil = "<img src=x onerror=alert(1)>\"'&</td><script>alert(2)</script>"
    folder = fake_run(tmp_path / '<b>&"run"', with_pictures=False)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(
        json.dumps({**summary, "backend": {evil: evil}, "seed": evil, "loss_null": evil})
    )
    (folder / "config.resolved.yaml").write_text(
        json.dumps({"backbone": {"name": evil, "variant": evil}, evil: [evil]})
    )
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": evil}) + "\n")
    (folder / "&lt;i&gt;<i>").write_text("")
    parsed = parse(page.write_report(folder).page)
    assert not {"script", "i"} & {tag for tag, _ in parsed.tags}
    assert all(uri.startswith("data:image/png;base64,") for uri in pictures(parsed))
    assert parsed.text.count(evil) >= 4 and '<b>&"run"' in parsed.text and "&lt;i&gt;<i>" in parsed.text


def test_second_report_replaces_the_first(tmp_path):
    folder = fake_run(tmp_path / "walk", steps=20, finished=False, with_pictures=False)
    (folder / "evaluations.jsonl").unlink()
    first = page.write_report(folder).page.read_bytes()
    assert page.write_report(folder).page.read_bytes() == first
    fake_run(folder, steps=40, finished=False, with_pictures=False)
    assert page.write_report(folder).page.read_bytes() != first


def test_unwritable_place_is_the_users_mistake(tmp_path):
    folder = fake_run(tmp_path / "walk", steps=0, finished=False, with_pictures=False)
    (folder / "evaluations.jsonl").unlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written.*--out"):
        page.write_report(folder, tmp_path / "file" / "report")
    assert (tmp_path / "file").read_text() == ""


def test_command_prints_page_and_headline(tmp_path, capsys):
    folder = fake_run(tmp_path / "walk", with_pictures=False)
    (folder / "evaluations.jsonl").open("a").write("nonsense\n")
    parser = argparse.ArgumentParser()
    page.configure(parser)
    assert page.main(parser.parse_args([str(folder), "--out", str(tmp_path / "out")])) == 0
    printed = capsys.readouterr()
    lines = dict(
        line.split(maxsplit=1) for line in printed.out.splitlines() if line.startswith(("rank-1", "gap", "report"))
    )
    assert lines["report"] == str(tmp_path / "out" / "index.html") and Path(lines["report"]).exists()
    assert re.fullmatch(r"[\d.]+% \(before\) -> [\d.]+% \(after\)", lines["rank-1"])
    assert lines["gap"] == "0.007 (before) -> 0.138 (after)"
    assert re.search(r"other over same +0\.0% \(before\) -> [\d.]+% \u00b1 0\.\d+% \(after\)\n", printed.out)
    assert "evaluations.jsonl, line 14: not valid JSON" in printed.err


# What a real browser makes of it: the page in a frame as wide as asked (a headless window is never below 500 pixels),
# looked at from outside, for its own content policy lets no script run inside.
FRAME = """<!doctype html><body style="margin:0">
<iframe style="width:{width}px;height:2400px;border:0" srcdoc="{page}"></iframe>
<script>
addEventListener("load", () => {{
  const inside = document.querySelector("iframe").contentWindow;
  for (const part of inside.document.querySelectorAll("details")) part.open = true;
  const images = [...inside.document.images];
  const resources = inside.performance.getEntriesByType("resource");
  document.body.dataset.probe = JSON.stringify({{
    images: images.length,
    broken: images.filter(image => !image.complete || !image.naturalWidth).length,
    fetched: resources.filter(entry => !entry.name.startsWith("data:")).length,
    width: inside.innerWidth,
    content: inside.document.documentElement.scrollWidth,
    styled: inside.getComputedStyle(inside.document.querySelector("main")).maxWidth,
  }});
}});
</script></body>"""


def browse(tmp_path: Path, path: Path, width: int, *flags: str) -> str:
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
        *(f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2400", *flags, path.as_uri()),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH (apt-get install chromium)")
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_browser_shows_every_picture_within_the_window(report, tmp_path, width):
    framed = tmp_path / "framed.html"
    source = html.escape(report.page.read_text(encoding="utf-8"))
    framed.write_text(FRAME.format(width=width, page=source), encoding="utf-8")
    dom = browse(tmp_path, framed, width, "--dump-dom", "--virtual-time-budget=10000")
    (raw,) = [a["data-probe"] for tag, a in Parsed(dom).tags if tag == "body"]
    probe = json.loads(raw)
    assert probe["images"] > 150 and probe["broken"] == 0 and probe["fetched"] == 0
    assert probe["content"] <= probe["width"] == width and probe["styled"] == "1080px"


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH (apt-get install chromium)")
def test_browser_draws_both_colour_modes(report, tmp_path):
    mean = {}
    for mode, flags in (("light", ()), ("dark", ("--blink-settings=preferredColorScheme=0",))):
        shot = tmp_path / f"{mode}.png"
        browse(tmp_path, report.page, DESKTOP, f"--screenshot={shot}", *flags)
        pixels = np.asarray(Image.open(shot).convert("L"), dtype=float)
        assert pixels.shape == (2400, DESKTOP) and pixels.std() > 15
        mean[mode] = np.median(pixels)
    assert mean["light"] > 230 and mean["dark"] < 50
