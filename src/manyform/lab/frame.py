"""What the pages of a comparison and of a scaling law share: their frame, their charts' places and
the look of an architecture.

A page opens anywhere, without a network, and holds its own data: report_assets/frame.html is its
skeleton, frame.css its look, and frame.js draws what the page's own script says.
"""

from __future__ import annotations

import functools
import html
import json
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

# Eight hues, for light and for dark: apart in lightness too, so that they stay apart under
# simulated protanopia and deuteranopia (Machado 2009), and at 3.3 : 1 or more against the page.
PALETTE = (("#276fe7", "#4a96fc"), ("#a03c0c", "#df8a40"), ("#03a05b", "#4ef398"),
           ("#851f92", "#c07fc6"), ("#b2841d", "#e9da4b"), ("#7d2145", "#e97b9f"),
           ("#3c90dc", "#21b9fd"), ("#7e8e98", "#e2d3de"))
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "x", "star")
_STROKES = {"solid": "", "dash": "6 3", "dot": "2 3", "dashdot": "6 3 2 3", "longdash": "10 3"}
_MARKERS = {
    "circle": "M15 2a4 4 0 1 0 .01 0z", "square": "M11.5 2.5h7v7h-7z",
    "diamond": "M15 1l5 5-5 5-5-5z", "triangle-up": "M15 1.5l4.6 8h-9.2z",
    "triangle-down": "M15 10.5l4.6-8h-9.2z",
    "cross": "M13.5 1.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    "x": "M11 3.5L12.8 2 15 4.2 17.2 2 19 3.5 16.6 6 19 8.5 17.2 10 15 7.8 12.8 10 11 8.5 13.4 6z",
    "star": "M15 .8l1.5 3.4 3.7.4-2.8 2.5.8 3.7L15 8.9l-3.2 1.9.8-3.7-2.8-2.5 3.7-.4z"}


def fill(*, kind: str, title: str, question: str, summary: str, facts: Iterable[tuple[str, str]],
          sections: Mapping[str, str], legend: str, charts: str, before: str, after: str,
          footer: str, figures: Any, scripts: Iterable[str], styles: Iterable[str] = (),
          notice: str = "") -> str:
    """The whole page.

    kind: the command it is of. title, question and the facts are text; the rest is markup, and
    figures become JSON. sections: heading by id, for the links at the top. before and after: what
    stands around the charts. scripts, styles: assets of its own.
    """
    first = next(iter(sections))
    parts = {
        "kind": kind, "title": escape(title), "question": escape(question), "summary": summary,
        "notice": notice, "first": first, "skip": f"Skip to the {sections[first].lower()}",
        "links": "".join(f'<a href="#{k}">{name}</a>' for k, name in sections.items()),
        "facts": "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>"
                         for k, v in facts if v),
        "legend": legend, "charts": charts, "before": before, "after": after, "footer": footer,
        "css": "".join(asset(name) for name in ("frame.css", *styles)),
        "js": "".join(asset(name) for name in ("frame.js", *scripts)),
        "plotly": plotly(), "figures": _script_json(figures)}
    return re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], asset("frame.html"))


def chart(key: str, name: str, text: str, shape: str = "", *, above: str = "", under: str = "",
          more: str = "") -> str:
    """The place of a chart, drawn by the script under its key. shape: "wide" for both columns,
    "own" where the chart says its own height. above, under: markup around it. more: said to who
    cannot see it."""
    label = escape(" ".join(t for t in (f"Chart: {name}.", text, more) if t))
    return (f'<figure class="chart {shape}" id="figure-{key}"><figcaption><h3>{escape(name)}</h3>'
            + (f'<p class="note">{escape(text)}</p>' if text else "") + f"</figcaption>{above}"
            f'<div class="plot" id="plot-{key}" role="img" aria-label="{label}"></div>{under}'
            "</figure>")


def looks(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Colour, dash and marker of each architecture, by the order in which they are given, so that
    one added later leaves the others as they were."""
    return {name: {"light": PALETTE[i % 8][0], "dark": PALETTE[i % 8][1],
                   "dash": DASHES[(i + i // 8) % 5], "symbol": SYMBOLS[(i + i // 8) % 8]}
            for i, name in enumerate(names)}


def swatch(look: Mapping[str, str]) -> str:
    """The line and marker of an architecture, as it is drawn in the charts."""
    return (f'<svg class="key" viewBox="0 0 30 12" width="30" height="12" aria-hidden="true" '
            f'style="--light:{look["light"]};--dark:{look["dark"]}"><path d="M1 6H29" '
            f'stroke-width="2" stroke-dasharray="{_STROKES[look["dash"]]}"/>'
            f'<path class="marker" d="{_MARKERS[look["symbol"]]}"/></svg>')


def chip(name: str, look: Mapping[str, str], label: str = "") -> str:
    """The button of the legend that shows and hides an architecture."""
    return (f'<button type="button" class="chip" data-arch="{escape(name)}" aria-pressed="true">'
            f"{swatch(look)}{escape(label or name)}</button>")


def scrolling(label: str, head: str, body: str) -> str:
    """A table that scrolls sideways by itself where it is too wide; head and body are its rows."""
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
            f"<table><thead>{head}</thead><tbody>{body}</tbody></table></div>")


def escape(text: Any) -> str:
    """Text that can stand in markup and in an attribute."""
    return html.escape(str(text), quote=True)


def _script_json(value: Any) -> str:
    """JSON that can stand in a script element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def asset(name: str) -> str:
    """A file of report_assets."""
    return (resources.files("manyform.lab") / "report_assets" / name).read_text(encoding="utf-8")


@functools.cache
def plotly() -> str:
    """The plotting library, as it can stand in a script element."""
    from plotly.offline import get_plotlyjs
    return get_plotlyjs().replace("</script", "<\\/script")
