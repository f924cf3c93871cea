"""Run the notebooks and write them with their outputs to docs/notebooks/: `python -m notebooks.render [names]`.

The notebooks themselves are stored without outputs.
"""

import base64
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
PAGES = HERE.parent / "docs" / "notebooks"


def run(name: str) -> nbformat.NotebookNode:
    """Run the notebook in a new kernel that starts in its folder, as Jupyter's would. Returns it with its outputs."""
    notebook = nbformat.read(HERE / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=280, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}).execute()
    return notebook


def figures(notebook: nbformat.NotebookNode) -> list[bytes]:
    """Return the PNG images in the notebook's outputs, in order."""
    return [base64.b64decode(data["image/png"]) for data in _shown(notebook) if "image/png" in data]


def sources(notebook: nbformat.NotebookNode) -> list[str]:
    """Return the Markdown of each cell on the notebook's page, without outputs, in order."""
    return [
        cell.source if cell.cell_type == "markdown" else f"```python\n{cell.source}\n```"
        for cell in notebook.cells
        if not cell.source.startswith("%cd")
    ]


def page(notebook: nbformat.NotebookNode, name: str) -> str:
    """Return the executed notebook as Markdown, with links to its figures."""
    parts, count = [f"<!-- written by `python -m notebooks.render` from notebooks/{name}.ipynb -->"], 0
    for cell in notebook.cells:
        if not cell.source.startswith("%cd"):
            parts += sources(nbformat.v4.new_notebook(cells=[cell]))
        for data in _shown(nbformat.v4.new_notebook(cells=[cell])):
            if "image/png" in data:
                parts.append(f"![figure {count + 1}]({name}-{count + 1}.png)")
                count += 1
            elif "text/markdown" in data:
                parts.append(data["text/markdown"])
            else:
                text = re.sub(r"\S*/tmp\w{8}/", "", data["text/plain"])  # tempfile's folders, which change every time
                if parts[-1].startswith("```text"):
                    text = parts.pop().removeprefix("```text\n").removesuffix("```") + text
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _shown(notebook: nbformat.NotebookNode) -> Iterator[dict[str, str]]:
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                if output.name == "stdout":
                    yield {"text/plain": output.text}
            else:
                yield output.data


def main(names: list[str]) -> None:
    PAGES.mkdir(parents=True, exist_ok=True)
    for name in names or sorted(path.stem for path in HERE.glob("*.ipynb")):
        notebook = run(name)
        for figure in PAGES.glob(f"{name}-*.png"):
            figure.unlink()
        for i, image in enumerate(figures(notebook)):
            (PAGES / f"{name}-{i + 1}.png").write_bytes(image)
        (PAGES / f"{name}.md").write_text(page(notebook, name))
        print(PAGES / f"{name}.md")


if __name__ == "__main__":
    main(sys.argv[1:])
