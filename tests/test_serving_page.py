"""The page as people meet it: a real browser on a real server."""

from __future__ import annotations

import re
import shutil

import pytest
from serving_process import Server
from serving_run import KEYS, THINK, make_run

from streamctl.config import EvalConfig
from streamctl.evaluation.stage import evaluate_run

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.xdist_group("serving"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]
expect = playwright.expect
SLOW_MS = 40_000  # a busy machine takes its time


# Every piece of text that is seen, with its contrast (WCAG 2) against all that lies behind its
# ends: bars and washes, too.
CONTRASTS = """() => {
  const rgba = (text) => {
    const [r, g, b, a = 1] = text.match(/^rgba?\\((.*)\\)$/)[1].split(/[,/ ]+/).map(Number);
    return [r, g, b, a];
  };
  const over = (top, below) => top.slice(0, 3)
    .map((value, n) => value * top[3] + below[n] * (1 - top[3])).concat(1);
  const light = ([r, g, b]) => [r, g, b].map((value) => value / 255)
    .map((value) => value <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4)
    .reduce((sum, value, n) => sum + value * [.2126, .7152, .0722][n], 0);
  const ratio = (one, other) => {
    const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
    return (high + .05) / (low + .05);
  };
  const behind = (element, x, y) => {
    const stack = document.elementsFromPoint(x, y);
    const own = stack.indexOf(element);
    return stack.slice(Math.max(own, 0)).reverse().filter((one) => !one.closest("svg"))
      .map((one) => rgba(getComputedStyle(one).backgroundColor))
      .reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const found = [];
  const measure = (element, text, colour, box) => {
    for (const x of [box.left + 2, box.right - 2]) {
      const ground = behind(element, x, (box.top + box.bottom) / 2);
      const ink = over(rgba(colour), ground);
      found.push({ text: text.trim().slice(0, 40), ratio: ratio(ink, ground), ink, ground });
    }
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    const range = document.createRange();
    range.selectNodeContents(node);
    const box = range.getBoundingClientRect();
    if (!node.data.trim() || box.width < 5 || box.right < 0 || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    measure(element, node.data, element.closest("svg") ? style.fill : style.color, box);
  }
  for (const input of document.querySelectorAll("input[placeholder]")) {
    if (!input.checkVisibility()) continue;
    const style = getComputedStyle(input, "::placeholder");
    measure(input, input.placeholder, style.color, input.getBoundingClientRect());
  }
  return found;
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("page") / "run")
    evaluate_run(run, EvalConfig(users=20, beam=10, bootstrap=20), device="cpu")
    server = Server(run.path)
    yield server.wait()
    server.kill()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"], timeout=SLOW_MS
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """The page; what it fetched from elsewhere and what its console complained of fail the test."""
    page = browser.new_page()
    page.set_default_timeout(SLOW_MS)
    expect.set_options(timeout=SLOW_MS)
    foreign, complaints = [], []
    page.on("request", lambda one: one.url.startswith(server.url) or foreign.append(one.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(server.url)
    expect(page.locator("#model")).to_contain_text("run, answered by ")
    yield page
    page.close()
    assert not foreign and not complaints


def test_a_history_is_clicked_together_and_gets_fast_and_slow_answers_and_a_thought(page):
    word = page.evaluate("fetch('v1/items?limit=1').then((r) => r.json())")["items"][0]["title"]
    for _ in range(2):
        page.get_by_label("Add an item by its title").fill(word)
        page.get_by_role("option", name=word).first.click()
    expect(page.locator("#history li")).to_have_count(2)
    expect(page.locator("#fast li[data-id]")).to_have_count(10)
    expect(page.locator("#slow li[data-id]")).to_have_count(10)
    page.get_by_label("Answered by").select_option("stream_sft")
    expect(page.locator("#path [role=tab]")).to_have_count(10)  # the history, eight pieces, others
    expect(page.locator("#fast-time")).to_contain_text("ms")
    page.locator("#slow button.title").first.click()
    expect(page.locator("#history li")).to_have_count(3)
    page.get_by_role("button", name="Remove").first.click()
    expect(page.locator("#history li")).to_have_count(2)


def test_the_slider_sets_how_long_it_thinks_and_shows_what_that_costs(page):
    page.get_by_label("Answered by").select_option("stream_sft")
    page.get_by_role("button", name="A real user").click()
    expect(page.locator("#think-value")).to_have_text(str(THINK))
    page.get_by_label("Pieces of evidence", exact=True).focus()
    for key, pieces in {
        "ArrowLeft": "32 pieces",
        "Home": "0 pieces",
        "ArrowRight": "1 piece",
    }.items():
        page.keyboard.press(key)
        expect(page.locator("#think-value")).to_have_text(pieces.split()[0])
        expect(page.locator("#slow-title")).to_contain_text(f"{pieces} of evidence")
    expect(page.locator("#latency")).to_have_text(re.compile(r"\d+ ms with 1 piece of evidence"))


def test_the_thought_is_walked_with_the_arrow_keys_and_each_step_says_why_and_has_its_ranking(page):
    page.get_by_label("Answered by").select_option("stream_sft")
    page.get_by_role("button", name="A real user").click()
    tabs = page.locator("#path [role=tab]")
    expect(tabs.last).to_have_attribute("aria-selected", "true")
    ids = "rows => rows.map(r => r.dataset.id)"
    final = page.locator("#step li[data-id]").evaluate_all(ids)
    assert final == page.locator("#slow li[data-id]").evaluate_all(ids)
    tabs.last.focus()
    page.keyboard.press("Home")
    expect(page.locator("#step")).to_contain_text("The ranking before thinking")
    said, rankings = set(), set()
    for step in range(1, 9):
        page.keyboard.press("ArrowRight")
        expect(tabs.nth(step)).to_be_focused()
        expect(page.locator("#step")).to_contain_text(f"after {step} of 9")
        said.add(page.locator("#step .reason").inner_text())
        rankings.add(tuple(page.locator("#step li[data-id]").evaluate_all(ids)))
    assert len(said) == 8 and len(rankings) > 3
    words = "took|similar to|came|you had|follows"
    assert all(re.search(words, one) for one in said), said


def test_another_method_answers_where_it_is_chosen(page):
    page.get_by_role("button", name="A real user").click()
    expect(page.locator("#note")).to_be_empty()
    for method in ("stream_pt", "stream_sft"):
        asked = lambda one, method=method: (  # noqa: E731
            "/v1/recommend" in one.url and one.request.post_data_json["method"] == method
        )
        with page.expect_response(asked) as answer:
            page.get_by_label("Answered by").select_option(method)
        told = answer.value.json()
        assert told["method"] == method
        for place, item in enumerate(told["items"]):
            row = page.locator("#fast li[data-id]").nth(place)
            expect(row).to_have_attribute("data-id", item["id"])


def test_an_empty_history_gets_the_popular_items_and_is_told_so(page):
    expect(page.locator("#note")).to_contain_text("popular items")
    expect(page.locator("#slow li[data-id]")).to_have_count(10)
    page.get_by_role("button", name="A real user").click()
    expect(page.locator("#note")).to_be_empty()


def test_the_search_works_without_a_mouse(page):
    word = page.evaluate("fetch('v1/items?limit=1').then((r) => r.json())")["items"][0]["title"]
    search = page.get_by_label("Add an item by its title")
    search.fill(word)
    expect(page.get_by_role("option", name=word).first).to_be_visible()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator("#history li")).to_have_count(1)


def test_an_error_of_the_server_is_read_out_and_gone_with_the_next_success(page):
    problem = (
        '{"title": "Too Many Requests", "status": 429, "detail": "too many requests wait already"}'
    )
    page.route(
        "**/v1/recommend",
        lambda route: route.fulfill(
            status=429, body=problem, headers={"Retry-After": "3"}, content_type="application/json"
        ),
    )
    page.get_by_role("button", name="A real user").click()
    alert = page.get_by_role("alert")
    expect(alert).to_have_text("too many requests wait already. Try again in 3 s.")
    page.unroute("**/v1/recommend")
    page.get_by_role("button", name="A real user").click()
    expect(page.locator("#fast li[data-id]")).to_have_count(10)
    expect(alert).to_be_empty()


def test_the_run_has_its_table_its_curves_and_its_codes(page):
    page.get_by_role("link", name="This run").click()
    expect(page.locator("#metrics table")).to_have_count(2)
    expect(page.locator("#metrics")).to_contain_text("stream_sft")
    assert page.locator("#curves svg").count() > 1
    expect(page.locator("#codes svg")).to_have_count(3)
    page.get_by_role("link", name="API").click()
    expect(page.get_by_text("/v1/recommend/batch")).to_be_visible()


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_runs_off_the_side(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.get_by_role("button", name="A real user").click()
    expect(page.locator("#slow li[data-id]")).to_have_count(10)
    for link in ("Recommend", "This run"):
        page.get_by_role("link", name=link).click()
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_from_its_ground_in_both_themes(page, theme):
    page.emulate_media(color_scheme=theme)
    page.set_viewport_size({"width": 1280, "height": 6000})  # all of it is seen, and measured
    seen = {}

    def measure(name):
        seen[name] = page.evaluate(CONTRASTS)
        faint = [one for one in seen[name] if one["ratio"] < 4.5]
        assert not faint, f"{name}, {theme}: {faint}"

    page.get_by_label("Answered by").select_option("stream_sft")
    page.get_by_role("button", name="A real user").click()
    expect(page.locator("#step .reason")).to_be_visible()
    measure("tokens")
    page.get_by_label("Add an item by its title").fill("a")
    expect(page.get_by_role("option").first).to_be_visible()
    measure("search")
    page.keyboard.press("Escape")
    page.route("**/v1/recommend", lambda route: route.abort())
    page.get_by_role("button", name="A real user").click()
    expect(page.get_by_role("alert")).not_to_be_empty()
    measure("error")
    page.get_by_role("link", name="This run").click()
    expect(page.locator("#metrics table")).to_have_count(2)
    measure("run")
    page.get_by_role("link", name="API").click()
    expect(page.get_by_text("/v1/recommend/batch")).to_be_visible()
    measure("API")
    texts = {one["text"] for found in seen.values() for one in found}
    assert {"The thought", "Metrics", "A real user", "Type a word of the title"} <= texts
    (ground,) = {tuple(one["ground"]) for one in seen["tokens"] if one["text"] == "The thought"}
    assert (sum(ground[:3]) > 3 * 128) == (theme == "light")


def test_every_control_has_a_name(page):
    page.get_by_role("button", name="A real user").click()
    expect(page.locator("#slow li[data-id]")).to_have_count(10)
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, [role=tab]")].filter((one) =>
            !one.textContent.trim() && !one.getAttribute("aria-label") && !one.labels?.length)
            .map((one) => one.outerHTML)"""
    )
    assert unnamed == []


def test_a_server_with_keys_asks_for_one(browser, server, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(f"read {KEYS['read']}\n")
    guarded = Server(server.run, "--store", tmp_path, keys=keys).wait()
    try:
        page = browser.new_page()
        page.set_default_timeout(SLOW_MS)
        page.goto(guarded.url)
        page.get_by_label("API key", exact=True).fill(KEYS["read"])
        page.get_by_role("button", name="Use it").click()
        page.get_by_role("button", name="A real user").click()
        expect(page.locator("#history li").first).to_be_visible()
    finally:
        guarded.kill()
