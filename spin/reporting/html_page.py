"""Self-contained HTML pages, report.html and sweep.html, from Markdown and data."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from typing import Any

from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from spin.reporting.charts import chart_data
from spin.reporting.pages import ASSETS, render
from spin.runtime.tracking import to_json_types


def html_page(title: str, head: str, body: str, figures: Mapping[str, Figure | None], **data: Any) -> str:
    """Return the page: `head` in Markdown, the samples in `data["sets"]`, then `body`.

    The page's script draws the figures that the Markdown shows, identified by file name. Texts are escaped, in Markdown
    as for report.md, and in data as JSON without "<". The page may run only its own script.
    """
    script, style = ((ASSETS / f"page.{kind}").read_text(encoding="utf-8") for kind in ("js", "css"))
    data["charts"] = {name: chart_data(figure) for name, figure in figures.items() if figure is not None}
    return render(
        "page.html",
        title=html.escape(title),
        policy=f"default-src 'none'; img-src data:; script-src {_hash(script)}; style-src {_hash(style)}",
        head=_render(head),
        body=_render(body),
        data=json.dumps(to_json_types(data), separators=(",", ":")).replace("<", "\\u003c"),
        script=script,
        style=style,
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _render(text: str) -> str:
    """Render Markdown as HTML. Every "<" in the result comes from the renderer, because those in texts are escaped."""
    page = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    heading = ""

    def with_names(match: re.Match[str]) -> str:
        nonlocal heading
        if match[1]:
            heading = match[2]
            return f'<{match[1]} id="s-{re.sub(r"[^a-z0-9]+", "-", heading.lower())}">{heading}</{match[1]}>'
        region = f'<div class="table" role="region" tabindex="0" aria-label="{heading}">'
        return f"{region}<table><caption>{heading}</caption>"

    page = re.sub(r"<(h[23])>(.*?)</h[23]>|<table>", with_names, page).replace("</table>", "</table></div>")
    page = re.sub(r"<tr>\n<td>(.*?)</td>", r'<tr>\n<th scope="row">\1</th>', page).replace("<th>", '<th scope="col">')
    page = re.sub(r"<td>(better|worse)</td>", r'<td class="\1">\1</td>', page)
    figure = r'<figure><div class="charts" data-figure="\1"></div><figcaption>\2</figcaption></figure>'
    return re.sub(r'<p><img src="figures/(\w+)\.png"[^>]*></p>\n<p>(.*?)</p>', figure, page, flags=re.DOTALL)
