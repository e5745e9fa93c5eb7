"""`gaitfast report RUN`: PNG figures and one self-contained HTML page out of a run folder.

The page needs nothing but itself: pictures and style are inside, there is no script, and its content policy forbids
the browser to fetch anything. It may be made while the run is going, and again later.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from gaitfast import config
from gaitfast.config import UserError
from gaitfast.report import markup
from gaitfast.report.headline import Headline, digits, duration, headline
from gaitfast.report.run import EVALUATIONS, Run, finite, read_run

ROW_LIMIT = 500
"""Rows of a table on the page; files of a run can be made to hold any number."""
NOTICE_LIMIT = 20


@dataclass(frozen=True)
class Report:
    """What was written: the page, and the figures beside it."""

    page: Path
    figures: list[Path]
    headline: Headline
    run: Run


def write_report(folder: str | Path, out: str | Path | None = None) -> Report:
    """Draw the figures of the run in `folder` and write them and index.html into `out` (default: folder/report).

    UserError where `folder` is no run or `out` cannot be written. Anything else that is absent or unreadable is said
    on the page and in `.run.notices`.
    """
    # Here, not above: `gaitfast --help` need not wait for matplotlib.
    from gaitfast.report import figures, supervised
    from gaitfast.report.sheets import draw, read_sheets
    from gaitfast.report.style import DARK, LIGHT, render

    run = read_run(folder)
    out = run.path / "report" if out is None else Path(out)
    files: dict[str, bytes] = {}
    curves: dict[str, str] = {}
    transfer = run.stage == "transfer"
    for name, curve in (supervised.CURVES if transfer else figures.CURVES).items():
        light = render(partial(curve.draw, run), LIGHT)
        if light is None:
            curves[name] = markup.missing(f"{curve.title}: nothing to draw. It needs {curve.source}.")
        else:
            files[f"{name}.png"] = light
            curves[name] = markup.curve(light, render(partial(curve.draw, run), DARK), curve.caption)
    sheets = read_sheets(run)
    groups = {"augmentation": [sheets.augmentation], "autoencoder": [sheets.autoencoder], "samples": [*sheets.samples]}
    for name, group in groups.items():
        present = [sheet for sheet in group if sheet is not None]
        if present:
            files[f"{name}.png"] = render(lambda theme, g=present: draw(g, theme), LIGHT)
    result = headline(run)
    if transfer:
        tiles = supervised.tiles(run, result)
        sections = [supervised.training(curves), _recognition(run, curves)]
    else:
        tiles = _tiles(result)
        sections = [
            _training(curves),
            _recognition(run, curves),
            _direct_measure(curves),
            _pictures(sheets.augmentation, sheets.autoencoder),
            _samples(sheets.samples),
        ]
    throughput = markup.section("Throughput", markup.pair(curves["throughput"], curves["data_wait"]))
    body = "".join((_header(run, result), tiles, _notices(run), *sections, throughput, _about(run)))
    files["index.html"] = markup.document(f"{run.name} \N{MIDDLE DOT} gaitfast", body).encode("utf-8")
    for name, content in files.items():
        _write(out / name, content)
    return Report(out / "index.html", [out / name for name in files if name.endswith(".png")], result, run)


def _write(path: Path, content: bytes) -> None:
    """All of the file or the file as it was: someone may be looking at the last report."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another folder with --out") from None


def _header(run: Run, result: Headline) -> str:
    status = (
        '<span class="status">finished</span>' if run.finished else '<span class="status unfinished">unfinished</span>'
    )
    verdict = result.sentence()
    return (
        f'<header><p class="eyebrow">gaitfast {run.stage} {status}</p><h1>{markup.text(run.name)}</h1>'
        f'<p class="about">{markup.text(_about_line(run))}</p>'
        + (f'<p class="verdict">{markup.text(verdict)}</p>' if verdict else "")
        + "</header>\n"
    )


def _about_line(run: Run) -> str:
    """The run in one line, of what its folder says about it."""
    option = run.option
    parts = []
    if option("backbone.name"):
        parts.append(f"{option('backbone.name')} ({option('backbone.variant')})")
    if option("denoiser.dim"):
        parts.append(f"denoiser dim {option('denoiser.dim')}")
    if option("train.batch") and option("data.frames"):
        parts.append(f"batch {option('train.batch')} \N{MULTIPLICATION SIGN} {option('data.frames')} frames")
    planned, step = finite(option("train.iterations")), run.step
    if step is not None:
        parts.append(f"step {step:,}" + (f" of {planned:,.0f}" if planned else ""))
    seconds = finite(run.summary.get("seconds"))
    if seconds is not None:
        parts.append(duration(seconds))
    seed = run.summary.get("seed", option("seed"))
    if seed is not None:
        parts.append(f"seed {seed}")
    return " \N{MIDDLE DOT} ".join(parts)


def _tiles(result: Headline) -> str:
    rank1, gap, loss = result.rank1, result.gap, result.loss
    points = "" if rank1.difference is None else f"{rank1.difference:+.1f} points"
    opened = "" if gap.difference is None else f"{'+' * (gap.difference >= 0)}{gap.text(gap.difference)}"
    error = result.identity.give_or_take().strip()
    carried = "(other \N{MINUS SIGN} same) / same loss" + ", with its standard error" * bool(error)
    share = "" if loss.difference is None or loss.first == 0 else f"{100 * loss.difference / loss.first:+.0f}%"
    return (
        '<div class="headline">\n'
        + markup.tile("Rank-1", rank1, "unseen people, cosine", points)
        + markup.tile("Gap", gap, "negative minus positive distance", opened)
        + markup.tile("Identity carried", result.identity, carried, error)
        + markup.tile("Training loss", loss, "first and last logged step", share)
        + "</div>\n"
    )


def _notices(run: Run) -> str:
    if not run.notices:
        return ""
    shown = "".join(f"<li>{markup.text(notice)}</li>" for notice in run.notices[:NOTICE_LIMIT])
    more = len(run.notices) - NOTICE_LIMIT
    rest = f"<li>and {more:,} more</li>" if more > 0 else ""
    return f'<div class="notices"><h3>Not everything could be read</h3><ul>{shown}{rest}</ul></div>\n'


def _training(curves: dict[str, str]) -> str:
    return markup.section("Training", markup.pair(curves["loss"], curves["learning_rate"]))


def _recognition(run: Run, curves: dict[str, str]) -> str:
    keys = [key for key in EVALUATIONS if any(key in row for row in run.evaluations.rows)]
    folded = ""
    if keys:
        rows = [
            (f"{row['step']:,.0f}", *(digits(row[key], 4) if key in row else markup.DASH for key in keys))
            for row in run.evaluations.rows[-ROW_LIMIT:]
        ]
        folded = markup.details(
            "Every evaluation", markup.table(("step", *keys), rows), "rank-k, mAP and mINP in percent"
        )
    figures = [curves[name] for name in ("rank1", "distances") if name in curves]
    matched = "the backbone's raw features: no labels, no" if run.stage == "pretraining" else "what was learned: no"
    lead = f"People of the test partition, matched by {matched} training on them."
    return markup.section("Recognition of unseen people", markup.pair(*figures), folded, lead=lead)


def _direct_measure(curves: dict[str, str]) -> str:
    return markup.section(
        "What the condition tells the denoiser",
        markup.pair(curves["conditions"], curves["identity"]),
        lead="If the feature carries identity, clips of held-out people are denoised better with a feature of the same"
        " person than with another person's; this moves long before rank-1 does.",
    )


def _pictures(augmentation: Any, autoencoder: Any) -> str:
    one = "Each column is one augmentation alone (the paper's Fig. 7); in training a clip may get several of them."
    two = "Silhouettes, their four latent channels and what the frozen decoder makes of these (the paper's Fig. 6)."
    return markup.section(
        "What goes in",
        markup.pair(
            _no_pictures("augment.*") if augmentation is None else markup.sheet(augmentation, one),
            _no_pictures("autoencoder.*") if autoencoder is None else markup.sheet(autoencoder, two),
        ),
    )


def _samples(sheets: tuple) -> str:
    content = [markup.sheet(sheet) for sheet in sheets] or [_no_pictures("samples.*")]
    return markup.section(
        "Denoised clips",
        *content,
        lead="Each strip runs left to right through one clip. What the denoiser made is decoded from its latents.",
    )


def _no_pictures(keys: str) -> str:
    return markup.missing(f"No pictures to show: they come from {keys} in pictures.safetensors.")


def _about(run: Run) -> str:
    parts = []
    shown = ("rank1_", "gap_", "loss_", "before.", "after.")
    environment = [(key, _readable(key, value)) for key, value in _flat(run.summary) if not key.startswith(shown)]
    if environment:
        parts.append(markup.details("Backends and environment", markup.facts(environment[:ROW_LIMIT]), opened=True))
    else:
        parts.append(markup.missing("Backends and environment: nothing to show. They come from summary.json."))
    options, defaults = list(islice(_flat(run.config), ROW_LIMIT)), _defaults(run)
    if options:
        changed = [(key, value) for key, value in options if defaults.get(key) != value]
        note = f"{len(changed)} of {len(options)}; the defaults are the paper's"
        parts.append(markup.details("Options that differ from their defaults", markup.facts(changed), note))
        parts.append(markup.details("Every option", markup.facts(options)))
    else:
        parts.append(markup.missing("Configuration: nothing to show. It comes from config.resolved.yaml."))
    parts.append(markup.details("Files of the run", markup.facts(islice(_files(run.path), ROW_LIMIT))))
    return markup.section("The run", *parts)


def _defaults(run: Run) -> dict[str, Any]:
    stage = config.TransferConfig if run.stage == "transfer" else config.PretrainConfig
    return dict(_flat(config.to_dict(stage())))


def _flat(tree: dict, prefix: str = "", depth: int = 8) -> Iterator[tuple[str, Any]]:
    """Leaves of nested dicts as ("a.b", value)."""
    for key, value in tree.items():
        if isinstance(value, dict) and value and depth:
            yield from _flat(value, f"{prefix}{key}.", depth - 1)
        else:
            yield f"{prefix}{key}", value


def _readable(key: str, value: Any) -> Any:
    """A value of the summary with its unit, where the name of the key says which."""
    number = finite(value)
    if number is not None and key.startswith("seconds"):
        return duration(number)
    return _size(number) if number is not None and key.endswith("_bytes") else value


def _files(folder: Path) -> Iterator[tuple[str, str]]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name != "report" and not entry.name.startswith("."):
            try:
                yield (
                    entry.name + "/" * entry.is_dir(),
                    _entries(entry.path) if entry.is_dir() else _size(entry.stat().st_size),
                )
            except OSError as error:
                yield entry.name, str(error.strerror)


def _entries(folder: str) -> str:
    count = sum(1 for _ in os.scandir(folder))
    return f"{count} {'entry' if count == 1 else 'entries'}"


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    parser.add_argument("--out", metavar="DIR", help="where figures and page go (default: RUN/report)")


def main(args: argparse.Namespace) -> int:
    report = write_report(args.run, args.out)
    for notice in report.run.notices:
        print(f"{args.run}: {notice}", file=sys.stderr)
    for label, figure in _lines(report.headline, report.run.stage):
        print(f"{label:<18}{figure}")
    print(f"{'figures':<18}{len(report.figures)} in {report.page.parent}")
    print(f"{'report':<18}{report.page}")
    return 0


def _lines(result: Headline, stage: str) -> Iterator[tuple[str, str]]:
    unsupervised = (("gap", result.gap), ("other over same", result.identity)) if stage == "pretraining" else ()
    for label, change in (("rank-1", result.rank1), *unsupervised, ("training loss", result.loss)):
        ends = ((change.first, change.first_label), (change.last, change.last_label))
        errors = ("", change.give_or_take())
        values = [f"{change.text(v)}{error} ({when})" for (v, when), error in zip(ends, errors) if v is not None]
        yield label, " -> ".join(values) or "not measured yet"
