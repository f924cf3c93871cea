"""The notebooks are stored without outputs and run in a kernel, their figures are not empty, and their pages are up to date."""

import io
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from notebooks import render

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
FIGURES = {"01_play": 3, "02_ablation_beta_lr": 2, "03_iterations": 3}


def stored(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def test_names():
    assert sorted(FIGURES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_stored_without_outputs(name):
    code = [cell for cell in stored(name).cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)


@pytest.mark.parametrize("name", NAMES)
def test_has_no_training_code(name):
    code = "\n".join(cell.source for cell in stored(name).cells if cell.cell_type == "code")
    assert not any(word in code for word in ("backward(", "torch.optim", "requires_grad", ".zero_grad("))


@pytest.mark.parametrize("name", NAMES)
def test_uses_the_public_interface(name):
    code = "\n".join(cell.source for cell in stored(name).cells if cell.cell_type == "code")
    assert ("spin.play(" in code) == (name != "02_ablation_beta_lr")  # which plots a study's results and plays nothing
    assert not any(part in code for part in ("spin.pipeline", "spin.game", "spin.config", "spin.method.training"))


@pytest.mark.parametrize("name", NAMES)
def test_runs_and_shows_figures(name):
    figures = render.figures(render.run(name))
    assert len(figures) == FIGURES[name]
    for png in figures:
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
        coloured = pixels.max(2) - pixels.min(2) > 60  # data is blue, orange, ...; axes and text are grey
        dark = pixels.max(2) < 90
        assert coloured.mean() + dark.mean() > 0.01, "an empty figure"
        assert pixels.shape[1] >= 600


@pytest.mark.parametrize("name", NAMES)
def test_page_in_docs_has_the_same_sources(name):
    page = (ROOT / "docs" / "notebooks" / f"{name}.md").read_text()
    end = 0
    for source in render.sources(stored(name)):
        assert source in page[end:], f"run `python -m notebooks.render {name}`"
        end = page.index(source, end) + len(source)
    assert page.count("![") == FIGURES[name]
    assert len(list((ROOT / "docs" / "notebooks").glob(f"{name}-*.png"))) == FIGURES[name]
