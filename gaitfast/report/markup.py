"""The report's HTML, piece by piece. Every text that comes from the run passes through `text` before it is markup."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image  # a dependency of matplotlib

from gaitfast.report.headline import Change
from gaitfast.report.sheets import Sheet

# The browser itself is told to fetch nothing and run nothing, whatever may have slipped into the page.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
ARROW = "\N{RIGHTWARDS ARROW}"
DASH = "\N{EN DASH}"


def text(value: Any) -> str:
    """`value` as text, safe between tags and inside double-quoted attributes."""
    return html.escape(str(value), quote=True)


def document(title: str, body: str) -> str:
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{text(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str, lead: str = "") -> str:
    """A section of the page; `lead` is text that says what the section is about."""
    intro = f'<p class="lead">{text(lead)}</p>\n' if lead else ""
    return f"<section>\n<h2>{text(title)}</h2>\n{intro}{''.join(parts)}</section>\n"


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def curve(light: bytes, dark: bytes, caption: str) -> str:
    """A figure in both colour modes; the browser shows the one that fits."""
    return (
        f'<figure class="curve"><picture><source media="(prefers-color-scheme: dark)" srcset="{data_uri(dark)}">'
        f'<img src="{data_uri(light)}" alt="{text(caption)}"></picture>'
        f"<figcaption>{text(caption)}</figcaption></figure>\n"
    )


def missing(what: str) -> str:
    """Stands where a figure would."""
    return f'<div class="missing"><p>{text(what)}</p></div>\n'


def pair(*figures: str) -> str:
    return f'<div class="pair">\n{"".join(figures)}</div>\n'


def encode(picture: np.ndarray) -> bytes:
    """uint8 (H, W) or (H, W, 3) as PNG."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return out.getvalue()


def sheet(content: Sheet, caption: str = "") -> str:
    """A sheet as a grid of tiles under its column labels, or as film strips under their row labels."""
    columns = max(len(row.tiles) for row in content.rows)
    rows = []
    if content.columns:
        rows.append("".join(f'<span class="column">{text(label)}</span>' for label in content.columns))
    for row in content.rows:
        if row.label:
            rows.append(f'<span class="row"><b>{text(row.label)}</b> {text(row.note)}</span>')
        tiles = []
        for tile in row.tiles:
            kind = ' class="latent"' if tile.ndim == 3 else ""
            height, width = tile.shape[:2]
            tiles.append(f'<img{kind} src="{data_uri(encode(tile))}" alt="" width="{width}" height="{height}">')
        rows.append("".join(tiles))
    style = "tiles labelled" if content.columns else "tiles strip"
    words, title = " ".join(part for part in (caption, content.facts) if part), text(content.title)
    return (
        f'<figure class="sheet"><h3>{title}</h3>'
        f'<div class="{style}" style="--columns:{columns}" role="img" aria-label="{title}">{"".join(rows)}</div>'
        f"<figcaption>{text(words)}</figcaption></figure>\n"
    )


def tile(label: str, change: Change, note: str, difference: str = "") -> str:
    """A headline figure: first value, arrow, last value."""

    def value(number: float | None, style: str, when: str) -> str:
        shown = DASH if number is None else text(_signed(change.text(number)))
        return f'<span class="{style}" title="{text(when)}">{shown}</span>'

    if not change.known:
        figures = f'<span class="value none">{DASH}</span>'
    elif change.first is None:
        figures = value(change.last, "value", change.last_label)
    else:
        arrow = f'<span class="arrow">{ARROW}</span>'
        figures = (
            value(change.first, "from", change.first_label) + arrow + value(change.last, "value", change.last_label)
        )
    moved = f'<span class="difference">{text(_signed(difference))}</span>' if difference else ""
    return (
        f'<div class="tile"><h3>{text(label)}</h3><p class="figures">{figures}</p>'
        f'<p class="note">{moved}{text(note)}</p></div>\n'
    )


def _signed(figure: str) -> str:
    """With a minus sign in place of the hyphen."""
    return figure.replace("-", "\N{MINUS SIGN}")


def facts(rows: Iterable[tuple[str, Any]]) -> str:
    """A table of names and values."""
    cells = "".join(f'<tr><th scope="row">{text(key)}</th><td>{text(value)}</td></tr>\n' for key, value in rows)
    return f'<div class="scroll"><table class="facts"><tbody>\n{cells}</tbody></table></div>\n'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of figures, right-aligned."""
    heads = "".join(f'<th scope="col">{text(cell)}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return (
        f'<div class="scroll"><table class="numbers"><thead><tr>{heads}</tr></thead>'
        f"<tbody>\n{body}</tbody></table></div>\n"
    )


def details(title: str, content: str, note: str = "", *, opened: bool = False) -> str:
    """A part that can be folded away, and is unless `opened`."""
    aside = f' <span class="aside">{text(note)}</span>' if note else ""
    return f"<details{' open' * opened}><summary>{text(title)}{aside}</summary>\n{content}</details>\n"
