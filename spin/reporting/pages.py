"""Rendering of the page templates in `assets`."""

from pathlib import Path
from statistics import mean
from typing import Any

import jinja2

from spin.evaluation.measure_table import is_known, known_measures, missing_prompts, ranking_measures, show
from spin.reporting.text import code_block, escape, inline_code, plain_number
from spin.runtime.progress import format_seconds

ASSETS = Path(__file__).parent / "assets"
PAGES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(ASSETS, "utf-8"), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
)
PAGES.filters.update(escape=escape, code=inline_code, block=code_block)
PAGES.filters.update(number=plain_number, thousands="{:,}".format, duration=format_seconds, mean=mean)
FUNCTIONS = (is_known, known_measures, missing_prompts, ranking_measures, show)
PAGES.globals.update({function.__name__: function for function in FUNCTIONS})


def render(template: str, **values: Any) -> str:
    """Return the page rendered from a template in `assets`, which must escape texts of users and models."""
    return PAGES.get_template(template).render(values)
