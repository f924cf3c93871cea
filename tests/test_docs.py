"""The docs: all settings, files and links on a page exist, and every page can be reached by links."""

import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from spin.config.hydra import LAUNCHERS, compose
from spin.config.schema import CONF, Config, settings, validate
from spin.runtime.errors import UserError

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(DOCS.glob("*.md"))]
PAGES = [
    *GUIDES,
    ROOT / "CHANGELOG.md",
    *sorted(DOCS.glob("notebooks/*.md")),
    *sorted(ROOT.glob("experiments/**/*.md")),
]
GROUPS = {path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra"}
FOLDERS = "spin conf docs tests experiments notebooks benchmarks hydra_plugins .ci".split()
OTHER_SETTINGS = {"coming_from.md"}  # pages that also name settings of other projects
# Files of the authors' repository and of llama.cpp.
OTHER_FILES = {"spin/convert_data.py", "generate_vllm.sh", "reformat.py", "convert_hf_to_gguf.py"}
NEW = re.compile(r"conf/[\w/]+/(mine|squared_hinge)\.yaml")  # files that the reader is told to write


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def codes(text: str) -> Iterator[str]:
    """Yield the lines of a page's code blocks, with continuation lines joined, and its code spans."""
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield from () if kind == "python" else block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))


def assignments(code: str) -> Iterator[tuple[str, str]]:
    """Yield the keys and values of the `key=value` words in a command or in a span that names settings."""
    try:
        words = shlex.split(code, comments=True)
    except ValueError:  # the span is prose
        return
    for word in words:
        if match := re.fullmatch(r"[+]*([a-z_0-9]+(?:[./][a-z_0-9]+)*)=(?!=)(.*)", word):
            yield match[1], match[2]


@functools.cache
def defaults() -> dict:
    values = OmegaConf.to_container(compose(), resolve=True)
    assert isinstance(values, dict)
    return values


@functools.cache
def hydra_keys(launcher: str) -> set[str]:
    """Return Hydra's own settings that exist with a launcher."""
    choice = [f"hydra/launcher={launcher}"] if launcher else []
    return set(flat(OmegaConf.to_container(compose(*choice, return_hydra_config=True).hydra, resolve=False), "hydra"))


def flat(values: object, key: str) -> Iterator[str]:
    yield key
    for name, value in values.items() if isinstance(values, dict) else ():
        yield from flat(value, f"{key}.{name}")


def problem(key: str, value: str, code: str, page: str) -> str | None:
    """Return what is wrong with a setting on a page, or None. "", "..." and capitals are placeholders for a value."""
    is_placeholder = not value or value == "..." or value.isupper()
    if key == "hydra/launcher" or key in GROUPS:
        for option in value.split(","):
            file = f"conf/{key}/{option}.yaml"
            if not (is_placeholder or (CONF.parent / file).is_file() or file in page or option in LAUNCHERS):
                return f"{key}={option}: no such choice"
        return None
    if key.startswith("hydra."):
        launcher = dict(assignments(code)).get("hydra/launcher", "")
        return None if key in hydra_keys(launcher) else f"{key}: no such setting of Hydra"
    if key not in settings() and not key.startswith("data.template_options"):
        return f"{key}: no such setting"
    for part in value.split(",") if value[:1] != "[" else [value]:
        try:
            if not is_placeholder:
                ((group, new),) = OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}={part}"])).items()
                validate(Config, defaults() | {group: defaults()[group] | new if isinstance(new, dict) else new})
        except UserError as error:
            return str(error)
    return None


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_settings_exist(page):
    text = page.read_text(encoding="utf-8")
    problems = []
    for code in codes(text):
        is_command = re.search(r"\brun\.py\b", code)
        for key, value in assignments(code):
            is_ours = is_command or "." in key or "/" in key or key in GROUPS | defaults().keys()
            if is_ours or page.name not in OTHER_SETTINGS:
                problems.append(problem(key, value, code, text))
        if re.fullmatch(rf"({'|'.join(GROUPS)})\.[a-z_0-9]+", code):
            problems.append(problem(code, "", code, text))
    assert [text for text in problems if text] == []


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_files_exist(page):
    missing = []
    for code in codes(page.read_text(encoding="utf-8")):
        for path in re.findall(rf"(?<![\w./<>-])(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*", code):
            if not NEW.fullmatch(path) and not (ROOT / path).exists():
                missing.append(path)
        for module in re.findall(r"python -m ((?:spin|experiments|notebooks|benchmarks)[\w.]*)", code):
            file = ROOT / module.replace(".", "/")
            if not file.with_suffix(".py").is_file() and not (file / "__main__.py").is_file():
                missing.append(module)
        for path, test in re.findall(r"([\w/]+\.py)(?:::(test_\w+))?", code) if "test_" in code else ():
            file = next((file for file in (ROOT / path, ROOT / "tests" / path) if file.is_file()), None)
            if file is None or (test and f"def {test}(" not in file.read_text()):
                missing.append(f"{path}::{test}")
        if re.fullmatch(r"[\w.-]+\.(py|toml|txt|lock|cff|sh)", code) and not (ROOT / code).is_file():
            missing.append(code)
    assert set(missing) <= OTHER_FILES


def links(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$|`[^`\n]+`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [
        link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link and not link.startswith("mailto:")
    ]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub generates for a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page):
    broken = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_page_is_reached_from_the_docs_page():
    reached, queue = set(), [DOCS / "README.md"]
    while queue:
        page = queue.pop().resolve()
        if page.is_dir():
            page = page / "README.md"
        if page not in reached and page.suffix == ".md":
            reached.add(page)
            queue += [page.parent / link.partition("#")[0] for link in links(page) if link[:1] != "#"]
    assert sorted(set(PAGES) - reached) == []


@pytest.mark.parametrize(
    ("code", "page", "expected"),
    [
        ("loss.betta=1", "", "loss.betta: no such setting"),
        ("loss=hinges", "", "loss=hinges: no such choice"),
        ("loss=logistic,hinge", "", None),
        ("model=mine", "conf/model/mine.yaml", None),
        ("loss.reference=nobody", "", "loss.reference=nobody"),
        (
            "python run.py -m hydra/launcher=joblib hydra.launcher.n_jobz=2",
            "",
            "hydra.launcher.n_jobz: no such setting",
        ),
        ("'optimizer.lr=[5e-7,1e-7]' optimizer.lr=1e-7,5e-7 model.path=PATH iter= data.size=null", "", None),
    ],
)
def test_wrong_setting_is_reported(code, page, expected):
    problems = [line for key, value in assignments(code) if (line := problem(key, value, code, page))]
    assert (expected is None and problems == []) or (problems and str(expected) in problems[0])
