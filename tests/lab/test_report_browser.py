"""The page in a real browser. Skipped where there is none: install chromium and chromedriver."""

import json
import shutil

import pytest
from sample_results import partial, sample_results
from test_report import EVIL

from manyform.lab.report import write_report

webdriver = pytest.importorskip("selenium.webdriver")
BROWSER = next((p for n in ("chromium", "chromium-browser", "google-chrome")
                if (p := shutil.which(n))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium and chromedriver")

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--window-size=1280,1000")


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(DRIVER))
    found.at = None
    yield found
    found.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """file: addresses of a full, a partial, an empty and a hostile report."""
    full = sample_results()
    evil = sample_results(archs=("llama", "lstm"))
    evil["data"]["name"] = EVIL
    evil["archs"][EVIL] = {**evil["archs"].pop("lstm"), "error": f"</script>{EVIL}"}
    made = {}
    for name, results in {"full": full, "partial": partial(full), "empty": {"complete": False},
                          "evil": evil}.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "results.json").write_text(json.dumps(results))
        made[name] = write_report(folder).as_uri()
    return made


def show(driver, address, *, width=1280, dark=False, again=False):
    """Open a page, or stay where it is open already: what a test changes it puts back."""
    if not again and driver.current_url == address and (width, dark) == driver.at:
        return
    driver.at = (width, dark)
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600})
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [
        {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]})
    driver.get("about:blank")
    for kind in ("browser", "performance"):
        driver.get_log(kind)
    driver.get(address)
    driver.execute_script("try { localStorage.clear(); } catch (e) {}")


def drawn(driver):
    """{chart: names of the traces that it shows}"""
    return driver.execute_script(
        "return Object.fromEntries([...document.querySelectorAll('.js-plotly-plot')].map(d => "
        "[d.id.slice(5), [...new Set(d.data.map(t => t.meta).filter(Boolean))].sort()]))")


def click(driver, selector):
    driver.execute_script("document.querySelector(arguments[0]).click()", selector)


@pytest.mark.parametrize("name", ["empty", "evil", "partial", "full"])
def test_it_opens_without_errors_and_without_a_network(driver, pages, name):
    show(driver, pages[name], again=True)
    assert driver.get_log("browser") == []
    asked = [json.loads(e["message"])["message"]["params"]["request"]["url"]
             for e in driver.get_log("performance")
             if "Network.requestWillBeSent\"" in e["message"]]
    assert [u for u in asked if not u.startswith(("data:", "about:", "file:///"))] == []
    assert len([u for u in asked if u.startswith("file:")]) <= 1
    assert driver.execute_script("return window.pwned") is None
    assert driver.execute_script("return document.querySelectorAll('img').length") == 0


def test_a_full_report_draws_every_chart(driver, pages):
    show(driver, pages["full"])
    charts = drawn(driver)
    assert set(charts) == {"curves", "pareto", "latency", "state", "length", "tuning", "probes",
                           "twins", "budget"}
    for chart, names in charts.items():
        if chart != "budget":
            assert len(names) == 6, chart


def test_one_legend_toggles_every_chart_and_the_table(driver, pages):
    show(driver, pages["full"])
    click(driver, '.chip[data-arch="llama"]')
    for chart, names in drawn(driver).items():
        assert "llama" not in names, chart
    rows = driver.execute_script("return [...document.querySelectorAll('tr.off')].map("
                                 "r => r.dataset.arch)")
    assert set(rows) == {"llama"}
    click(driver, '[data-family="linear attention"]')
    assert drawn(driver)["curves"] == ["hyena", "lstm", "mamba2"]
    pressed = driver.execute_script("return document.querySelector('.chip[data-arch=\"rwkv7\"]')"
                                    ".getAttribute('aria-pressed')")
    assert pressed == "false"
    click(driver, '[data-family="linear attention"]')
    click(driver, '.chip[data-arch="llama"]')
    assert len(drawn(driver)["curves"]) == 6


def test_switches_change_axes(driver, pages):
    show(driver, pages["full"])

    def axis():
        return driver.execute_script("const l = document.getElementById('plot-curves').layout;"
                                     "return [l.xaxis.title.text, l.xaxis.type, l.yaxis.type]")
    assert axis() == ["training tokens", "log", "linear"]
    click(driver, '[data-chart="curves"][data-value="seconds"]')
    click(driver, '[data-chart="curves"][data-value="logx"]')
    click(driver, '[data-chart="curves"][data-value="logy"]')
    assert axis() == ["training seconds", "linear", "log"]
    for value in ("tokens", "logx", "logy"):
        click(driver, f'[data-chart="curves"][data-value="{value}"]')
    assert axis() == ["training tokens", "log", "linear"]


def test_tables_sort(driver, pages):
    show(driver, pages["full"])

    def names():
        return driver.execute_script("return [...document.querySelectorAll("
                                     "'#table-results tbody tr')].map(r => r.dataset.arch)")
    click(driver, '#table-results button[data-sort="2"]')
    assert names()[-1] == "lstm"
    click(driver, '#table-results button[data-sort="2"]')
    assert names()[0] == "lstm"


CONTRAST = """
const parse = c => c.match(/[\\d.]+/g).map(Number);
const light = c => { const v = parse(c).slice(0, 3).map(x => x / 255).map(
  x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
const back = e => { while (e) { const c = getComputedStyle(e).backgroundColor;
  if ((parse(c)[3] ?? 1) > 0.99) return c; e = e.parentElement; } return "rgb(255,255,255)"; };
let worst = [99, ""];
for (const e of document.querySelectorAll(
    "p, li, td, th, dt, dd, button, a, code, summary, h1, h2, h3, .tag")) {
  if (!e.offsetParent || !e.textContent.trim() || e.classList.contains("skip")) continue;
  const [a, b] = [light(getComputedStyle(e).color), light(back(e))].sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < worst[0]) worst = [ratio, e.className + " " + e.textContent.slice(0, 40)];
}
return worst;
"""


@pytest.mark.parametrize("dark", [True, False])
def test_text_stands_out_in_both_themes(driver, pages, dark):
    show(driver, pages["full"], dark=dark)
    theme = driver.execute_script("return document.documentElement.dataset.theme")
    assert theme == ("dark" if dark else "light")
    ratio, where = driver.execute_script(CONTRAST)
    assert ratio >= 4.5, where


def test_the_theme_button_turns_the_page_and_its_charts(driver, pages):
    show(driver, pages["full"])

    def colours():
        return driver.execute_script("return [getComputedStyle(document.body).backgroundColor, "
                                     "document.getElementById('plot-state').data[0].line.color]")
    before = colours()
    click(driver, "#theme")
    after = colours()
    assert before[0] != after[0]
    assert before[1] != after[1]
    click(driver, "#theme")
    assert colours() == before
    driver.execute_script("try { localStorage.clear(); } catch (e) {}")


def test_keys_alone_reach_and_press_a_chip(driver, pages):
    from selenium.webdriver.common.keys import Keys
    show(driver, pages["full"])
    driver.execute_script("document.querySelector('.chip').focus()")
    driver.switch_to.active_element.send_keys(Keys.SPACE)
    assert driver.execute_script("return document.activeElement.getAttribute('aria-pressed')") \
        == "false"
    driver.switch_to.active_element.send_keys(Keys.SPACE)


def test_paper_is_light_and_no_chart_is_cut(driver, pages):
    show(driver, pages["full"], dark=True)
    driver.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert driver.execute_script("return document.documentElement.dataset.theme") == "light"
    over = driver.execute_script(
        "return [...document.querySelectorAll('.plot')].filter(d => { const s = d.querySelector("
        "'.main-svg'); return s && s.getBoundingClientRect().height > d.offsetHeight + 1 "
        "|| d.offsetWidth > 670; }).map(d => d.id)")
    assert over == []
    shown = driver.execute_script("return [...document.querySelectorAll('button.copy, .tools, "
                                  ".switches')].filter(e => e.offsetParent).length")
    assert shown == 0
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    driver.execute_script("window.dispatchEvent(new Event('afterprint'))")
    assert driver.execute_script("return document.documentElement.dataset.theme") == "dark"


@pytest.mark.parametrize("name", ["full", "evil"])
def test_a_phone_never_scrolls_sideways(driver, pages, name):
    show(driver, pages[name], width=375)
    assert driver.execute_script("return [document.documentElement.scrollWidth, innerWidth]") \
        == [375, 375]
    wide = driver.execute_script(
        "return [...document.querySelectorAll('.plot')].filter("
        "d => d.getBoundingClientRect().right > 375).map(d => d.id)")
    assert wide == []
