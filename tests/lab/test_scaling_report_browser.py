"""The scaling page in a real browser: it draws, and the planner answers the mouse."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from tests.scaling.synthetic import EPOCH, grid

from manyform.lab.scaling_report import write_report
from manyform.scaling import Chinchilla, fit_archs, load, plan
from manyform.scaling.table import join

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "scaling" / "runs.csv"

webdriver = pytest.importorskip("selenium.webdriver")
BROWSER = next((p for n in ("chromium", "chromium-browser", "google-chrome")
                if (p := shutil.which(n))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium and chromedriver")


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
                 "--window-size=1280,2400",
                 f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield found
    found.quit()


def move(driver, slider, value):
    driver.execute_script("const s = document.getElementById(arguments[0]); s.value = arguments[1];"
                          "s.dispatchEvent(new Event('input'));", slider, value)


def planned(driver):
    return {row[0]: row[1:] for row in driver.execute_script(
        "return [...document.querySelectorAll('#planned tbody tr')].map("
        "r => [...r.cells].map(c => c.textContent));")}


def test_the_page_draws_and_plans(driver, tmp_path):
    other = Chinchilla(1.8172, 100.0, 2085.43, 0.25, 0.3658)
    found = fit_archs(join([grid(EPOCH, sizes=5, ratios=5, noise=0.0, arch="llama"),
                            grid(other, sizes=5, ratios=5, noise=0.002, seed=1, arch="lstm")]),
                      bootstraps=60)
    driver.get(write_report(found, tmp_path / "law.html").as_uri())
    assert not [e for e in driver.get_log("browser") if e["level"] == "SEVERE"]
    plots = driver.execute_script(
        "return [...document.querySelectorAll('.plot')].map(d => [d.id, d.data.length]);")
    assert {p[0] for p in plots} == {"plot-frontier", "plot-residuals", "plot-exponents",
                                     "plot-chances"}
    assert all(n for _, n in plots)

    move(driver, "flops", 21)
    best = EPOCH.optimal(flops=1e21)
    got = planned(driver)
    assert float(got["parameters"][0].rstrip("B")) * 1e9 == pytest.approx(best.params, rel=0.02)
    assert float(got["loss"][0]) == pytest.approx(best.loss, abs=2e-3)
    before = got["training cost against the best size"][0]
    move(driver, "share", -0.5)
    after = planned(driver)["training cost against the best size"][0]
    assert float(after.rstrip("x")) > float(before.rstrip("x"))
    move(driver, "share", -1.2)
    assert planned(driver)["parameters"][0] != got["parameters"][0]
    move(driver, "flops", 40)
    assert "extrapolation" in driver.execute_script(
        "return document.getElementById('far').textContent;")
    driver.execute_script("document.querySelector('.chip').click();"
                          "document.getElementById('theme').click();")
    assert not [e for e in driver.get_log("browser") if e["level"] == "SEVERE"]
    driver.save_screenshot(str(tmp_path / "page.png"))


@pytest.fixture(scope="module")
def example(driver, tmp_path_factory):
    """The page of runs that determine little, and its laws."""
    runs = load(EXAMPLE)
    found = fit_archs(runs.take(np.isin(runs.arch, ["llama", "mamba2", "lstm"])), bootstraps=50)
    driver.get(write_report(found, tmp_path_factory.mktemp("page") / "page.html").as_uri())
    return found


def test_the_planner_agrees_with_python(driver, example):
    """Word for word: values, intervals, what is not determined, and warnings."""
    seen = set()
    for arch, fitted in example.free.items():
        driver.execute_script("const s = document.getElementById('arch'); s.value = arguments[0];"
                              "s.dispatchEvent(new Event('change'));", arch)
        for asked in (10.7, 11.5, 12.5, 13.6, 14.3, 16.0):
            move(driver, "flops", asked)
            flops = 10 ** float(driver.execute_script(
                "return document.getElementById('flops').value;"))
            made = plan(fitted, flops=flops)
            got = planned(driver)
            for what, value, span in made.rows:
                assert got[what] == [value, span or "–"], (arch, flops)
            assert set(got) - {what for what, _, _ in made.rows} == {
                "training cost against the best size"}
            said = driver.execute_script(
                "return [...document.querySelectorAll('#far .notice')].map(p => p.textContent);")
            assert said == [f"{w[0].upper()}{w[1:]}." for w in made.warnings]
            seen |= {value for _, value, _ in made.rows[:1]}
    assert "not determined" in seen
    assert len(seen) > 3


def test_no_false_digits(driver, example):
    """Nowhere a size of 1e-49 parameters, on a phone as on a desk, and nothing runs off the page.
    """
    driver.execute_script("const s = document.getElementById('arch'); s.value = 'lstm';"
                          "s.dispatchEvent(new Event('change'));")
    for asked in (11, 13, 16):
        move(driver, "flops", asked)
        for row in planned(driver).values():
            assert not any(f"e-{n}" in cell for cell in row for n in range(10))
    text = driver.find_element("css selector", "header").text
    assert "the largest budget measured for all" in text
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True})
    try:
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
