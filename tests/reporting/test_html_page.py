"""Tests of report.html and sweep.html in Chromium: layout, search, sorting, votes, and escaping of hostile texts."""

import io
import json
import re
import time

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console
from scipy.stats import binomtest

from spin.evaluation.measures import HeldOut
from spin.method.pairs import Pair
from spin.reporting import samples
from spin.reporting.leaderboard import write_leaderboard
from spin.reporting.report import write_report
from spin.reporting.samples import sample_set
from spin.runtime.tracking import Tracker
from tests.reporting.browser import chromium
from tests.reporting.test_leaderboard import game as point
from tests.reporting.test_leaderboard import points_of
from tests.reporting.test_report import write_fake_run

HARM = """</script><img src=x onerror="document.title='broken'"><script>document.title='broken'</script>&lt;b&gt;"""
PROMPTS = 30


def answers(name: str, count: int = PROMPTS, length: int = 0, seed: int = 0) -> HeldOut:
    """Return a policy's answers to the held-out prompts; answer i has i + 1 tokens."""
    rng = np.random.default_rng(seed)
    pairs = [
        Pair(f"p{i}", f"prompt number {i} {HARM}", f"the human says w{i} here", f"{name} says w{i} {HARM}" + "x" * length,
             "stop", (1,), (2, 3), (4,) * (i + 1))
        for i in range(count)
    ]  # fmt: skip
    logps = {key: rng.normal(-20, 5, count) for key in ("real", "generated", "opponent_generated")}
    return HeldOut(pairs, logps, scores=rng.normal(size=(2, count)))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def policies():
    sft, iter0, iter1 = (answers(name, seed=i) for i, name in enumerate(("sft", "iter0", "iter1")))
    return [("sft", sft, None), ("iter0", iter0, sft), ("iter1", iter1, iter0)]


@pytest.fixture(scope="module")
def page(tmp_path_factory, policies):
    """The address of the report of a fabricated game, written once for all tests."""
    folder = tmp_path_factory.mktemp("run")
    game = write_fake_run(folder)
    game |= {"name": f"a game {HARM}", "command": f"python run.py '{HARM}'"}
    game["data"]["dropped"] = {"prompt | too long": f"User: {HARM}"}
    pairs = sample_set("Training pairs of iteration 0", [("sft", answers("sft", count=300), None)])
    write_report(folder, game, [sample_set("Held-out prompts", policies), pairs])
    return f"file://{folder}/report.html"


@pytest.fixture
def report(browser, page):
    browser.get(page)
    yield browser
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []


def texts(driver, selector):
    return [element.text for element in driver.find_elements("css selector", selector)]


def choose(driver, id, text):
    from selenium.webdriver.support.select import Select

    Select(driver.find_element("id", id)).select_by_visible_text(text)


def shown_indices(driver):
    return [int(title.split()[1]) - 1 for title in texts(driver, "#list h3")]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (400, "light")])
def test_looks(report, width, scheme):
    """A screenshot has the window's size and the scheme's brightness and is not blank; nothing is wider than the window."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    report.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    report.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        image = imread(io.BytesIO(report.get_screenshot_as_png()))[..., :3]
        assert image.shape == (900, width, 3)
        assert image.std() > 0.05 and len(np.unique(image[::9, ::9].reshape(-1, 3), axis=0)) > 20
        assert (image.mean() > 0.5) == (scheme == "light")
        assert report.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        report.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        report.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_result_comes_first(report):
    elements = texts(report, "#main > *")[:5]
    assert elements[2] == "Result"
    assert elements[3].startswith("Better: iter1 against sft. Take iter1")
    assert "iter1 against sft, n=50: better in NLL of human answers (2.000 → 1.900)" in elements[4]
    assert texts(report, "td.better") == ["better"]
    assert "python run.py" in report.find_element("id", "main").text


def test_harm_is_shown_as_text(report):
    assert report.title == f"a game {HARM}"
    for selector in ("h1", "#list .prompt", "#list .text", "#main pre"):
        assert any("onerror=" in text for text in texts(report, selector)), selector
    assert report.execute_script("return document.images.length") == 0
    assert report.execute_script("return document.scripts.length") == 2


def test_search(report):
    report.find_element("id", "search").send_keys("NUMBER 17")
    assert shown_indices(report) == [17]
    assert report.find_element("id", "count").text.startswith("1 of 30 prompts match")
    report.find_element("id", "search").send_keys("0123")
    assert shown_indices(report) == []


@pytest.mark.parametrize(
    ("order", "key", "sign"),
    [
        ("longest answer first", "tokens", -1),
        ("shortest answer first", "tokens", 1),
        ("largest margin first", "margin", -1),
        ("smallest margin first", "margin", 1),
        ("most human first (classifier)", "score", -1),
        ("most machine first (classifier)", "score", 1),
    ],
)
def test_sort(report, policies, order, key, sign):
    choose(report, "of", "iter0")
    choose(report, "sort", order)
    _, held_out, previous = policies[1]
    logps, opponent = held_out.policy_logps, previous.policy_logps
    values = {
        "tokens": [len(pair.generated_ids) for pair in held_out.pairs],
        "margin": logps["real"] - opponent["real"] - logps["opponent_generated"] + opponent["generated"],
        "score": held_out.scores[1],
    }
    assert shown_indices(report) == np.argsort(sign * np.array(values[key]), kind="stable")[:20].tolist()


def test_sets_and_columns(report):
    report.find_element("id", "more").click()
    assert shown_indices(report) == list(range(30))
    assert texts(report, "#list article:first-child h4") == ["human", "sft", "iter0", "iter1"]
    report.find_element("css selector", "#shown input[value='2']").send_keys(" ")
    assert texts(report, "#list article:first-child h4") == ["human", "sft", "iter1"]
    choose(report, "set", "Training pairs of iteration 0")
    assert texts(report, "#list article:first-child h4") == ["human", "sft"]
    assert "The page has 200 of 300" in report.find_element("id", "count").text
    assert "margin" not in report.find_element("id", "sort").text


def test_differences_are_marked(report):
    answer = report.find_element("css selector", "#list article:first-child section[aria-label=iter1] .text")
    marks = [mark.text.strip() for mark in answer.find_elements("tag name", "mark")]
    assert marks == ["iter1", HARM] and answer.text == f"iter1 says w0 {HARM}"
    report.find_element("id", "differences").click()
    assert not report.find_elements("css selector", "#list mark")


def test_values_of_curves(report):
    from selenium.webdriver import ActionChains, Keys

    panel = report.find_element("css selector", "[data-figure=measures] .panel")
    curve, tip = panel.find_element("tag name", "svg"), panel.find_element("class name", "tip")
    assert not tip.is_displayed()
    report.execute_script("arguments[0].scrollIntoView({block: 'center'})", curve)
    ActionChains(report).move_to_element_with_offset(curve, round(-0.045 * curve.size["width"]), 0).perform()
    assert tip.is_displayed() and re.match(r"at sft\n.*: 0\.88 \[0\.87, 0\.89\]", tip.text)
    report.execute_script("arguments[0].focus()", curve)
    for key, policy in ((Keys.HOME, "start"), (Keys.ARROW_RIGHT, "sft"), (Keys.END, "1"), (Keys.ARROW_LEFT, "0")):
        report.switch_to.active_element.send_keys(key)
        assert curve.get_attribute("aria-valuetext").startswith(f"at {policy},")
    lengths = report.find_element("css selector", "svg[aria-label^='model length']")
    assert lengths.get_attribute("aria-valuetext") == "at start, human length: 31, model length: 20 [19.99, 20.01]"
    histogram = report.find_element("css selector", "[data-figure=lengths] svg")
    assert "real: " in histogram.get_attribute("aria-valuetext")


def test_names_and_roles(report):
    """A screen reader finds labels of controls, headers and captions of tables, names of curves, and unique ids."""
    problems = report.execute_script("""
        const all = (selector) => [...document.querySelectorAll(selector)], found = [];
        for (const node of all("input, select")) if (!node.labels.length) found.push(`no label: ${node.id}`);
        for (const node of all("button, a")) if (!node.textContent.trim()) found.push(`no text: ${node.outerHTML}`);
        for (const node of all("table")) if (!node.caption?.textContent) found.push("table without a caption");
        for (const node of all("th")) if (!node.scope) found.push(`th without a scope: ${node.textContent}`);
        for (const node of all("svg")) if (!node.getAttribute("aria-label")) found.push("curve without a name");
        for (const node of all("figure")) if (!node.querySelector("figcaption")) found.push("figure without a caption");
        const ids = all("[id]").map((node) => node.id);
        for (const id of ids) if (ids.indexOf(id) !== ids.lastIndexOf(id)) found.push(`id twice: ${id}`);
        if (all("main:not([hidden]) h1").length !== 1) found.push("not one h1");
        for (const link of all("nav a")) if (!document.querySelector(link.hash)) found.push(`link to nowhere: ${link.hash}`);
        return found;
    """)
    assert problems == []


# --- the blind vote ---------------------------------------------------------------------------------------------------


def press(driver, *keys):
    for key in keys:
        driver.find_element("tag name", "body").send_keys(key)


def tally(driver):
    return driver.execute_script("return document.getElementById('tally').textContent")


def test_vote(report, page, tmp_path):
    report.find_element("id", "to-vote").click()
    assert report.current_url == f"{page}?vote"
    assert report.find_element("class name", "skip").get_property("hidden")  # its target is in the report
    report.find_element("id", "restart").click()
    choices = []  # the numbers of the human answers
    for _ in range(12):
        answer_texts = texts(report, "#ballot .answers .text")
        assert len(answer_texts) == 2
        choices.append("1" if answer_texts[0].startswith("the human") else "2")
        press(report, choices[-1])
    assert set(choices) == {"1", "2"}
    press(report, "0", "u")
    swapped = {"1": "2", "2": "1"}
    human = "1" if texts(report, "#ballot .answers .text")[0].startswith("the human") else "2"
    press(report, swapped[human], "0")
    low, high = binomtest(1, 13).proportion_ci(method="wilson")
    assert tally(report) == (
        f"iter1 1, human 12, ties 1. iter1 is better in 8 % of the decided votes [{low:.0%}, {high:.0%}], a 95 % "
        "interval (Wilson).".replace("%]", " %]").replace("%,", " %,")
    )
    report.refresh()
    assert report.find_element("id", "vote-progress").text == "Prompt 15 of 30" and "human 12, ties 1" in tally(report)
    assert not report.find_element("id", "tally").is_displayed()

    report.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    report.find_element("id", "download").click()
    end = time.monotonic() + 20
    while not (saved := list(tmp_path.glob("*.json"))) and time.monotonic() < end:
        time.sleep(0.1)
    result = json.loads(saved[0].read_text())
    assert result["wins"] == [1, 12] and result["ties"] == 1 and len(result["votes"]) == 14
    assert result["interval"] == pytest.approx([low, high], abs=1e-6)
    assert {vote["winner"] for vote in result["votes"]} == {"human", "iter1", "tie"}
    assert all({vote["first"], vote["second"]} == {"human", "iter1"} for vote in result["votes"])

    choose(report, "vote-b", "sft")
    assert report.find_element("id", "vote-progress").text == "Prompt 1 of 30"
    assert all(re.match(r"iter1|sft", text) for text in texts(report, "#ballot .answers .text"))


def test_vote_to_the_end_without_storage(report, page):
    """If the browser denies storage, voting works, and the votes are lost when the page is reloaded."""
    denied = "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no', 'SecurityError') }})"
    script = report.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": denied})
    try:
        report.get(f"{page}?vote")
        press(report, *"1" * 31)
        assert report.find_element("id", "vote-progress").text == "All 30 prompts are voted on."
        assert report.find_element("id", "tally").is_displayed()
        report.refresh()
        assert report.find_element("id", "vote-progress").text == "Prompt 1 of 30"
    finally:
        report.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


# --- sizes, running games, sweeps -------------------------------------------------------------------------------------


def test_size_is_limited(tmp_path):
    game = write_fake_run(tmp_path)
    pairs = sample_set("Training pairs", [("sft", answers("sft", count=1000, length=10_000), None)])
    write_report(tmp_path, game, [pairs])
    assert pairs["total"] == 1000 and 0 < len(pairs["rows"]) <= samples.MOST_PROMPTS
    assert (tmp_path / "report.html").stat().st_size < 2.5e6
    assert len(sample_set("one", [("sft", answers("sft", count=1, length=10_000_000), None)])["rows"]) == 1


def test_running_game(browser, tmp_path):
    write_report(tmp_path, write_fake_run(tmp_path), status="Running: iter 1: train. Left: train of iter 1.")
    assert not (tmp_path / "report.md").exists() and not (tmp_path / "figures").exists()
    browser.get(f"file://{tmp_path}/report.html")
    assert browser.find_element("tag name", "blockquote").text == "Running: iter 1: train. Left: train of iter 1."
    assert "Take" not in browser.find_element("css selector", "#s-result + p").text
    assert not browser.find_element("id", "samples-section").is_displayed()


def test_sweep(browser, tmp_path):
    values = {"1": 1.5, "2": 1.3, "10": 1.7}
    sample_rows = [{"prompt": HARM, "real": "human", "answers": {"iter0": f"answer {HARM}"}}]
    games = {(("a", a),): point(nll) | {"samples": sample_rows} for a, nll in values.items()}
    tracker = Tracker(tmp_path, name="", config={}, wandb="disabled", console=Console(file=io.StringIO()))
    write_leaderboard(tmp_path / "sweep", points_of(tmp_path, games), tracker)
    browser.get(f"file://{tmp_path}/sweep/sweep.html")
    table = "#s-points ~ .table"
    assert texts(browser, f"{table} tbody tr td:nth-child(2)")[:3] == ["2", "1", "10"]
    assert texts(browser, f"{table} tbody a")[0] == "report"
    header = browser.find_element("css selector", f"{table} th:nth-child(2) button")
    for direction, order in (("ascending", ["1", "2", "10"]), ("descending", ["10", "2", "1"])):
        header.click()
        assert header.find_element("xpath", "..").get_attribute("aria-sort") == direction
        assert [text for text in texts(browser, f"{table} tbody tr td:nth-child(2)") if text] == order
    assert texts(browser, "#list h4") == ["human", "iter0"]
    assert texts(browser, "#set option") == ["a=2", "a=1", "a=10"]
    assert browser.title == "sweep"
    assert (
        browser.find_element("css selector", "#s-command-of-the-best-point ~ pre").text == "python run.py loss.beta=1.3"
    )
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []
