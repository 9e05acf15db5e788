"""The report in a real browser: it loads without the network, sorts, shows its figures, and fits a phone."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from analysis import Group, load
from analysis.figures import FIGURES
from analysis.predictions import Predictions
from analysis.report import Section, page
from analysis.tables import make_tables
from benchmarks.analysis import make_up
from dwf_cluster.presets import build
from dwf_cluster.store.tables import SCHEMAS

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SWITCHES = (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "disable-dev-shm-usage",
    "window-size=1280,900",
)
"""These keep the browser itself from using the network."""


@pytest.fixture(scope="module")
def html(storage: Path) -> str:
    return page([str(storage)])


@pytest.fixture(scope="module")
def browser(html: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """The page, open."""
    if not CHROMIUM or not DRIVER:
        pytest.skip("needs Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for switch in SWITCHES:
        options.add_argument(f"--{switch}")
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(html, encoding="utf-8")
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        driver.get(file.as_uri())
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def section(cifar10: Group, predictions: Predictions) -> Section:
    return Section(cifar10, predictions, *make_tables(cifar10, predictions))


def _heading(table: WebElement, text: str) -> WebElement:
    (button,) = (b for b in table.find_elements(By.CSS_SELECTOR, "thead button") if b.text.split() == text.split())
    return button


def _column(table: WebElement, column: int) -> list[str]:
    return [row.find_elements(By.XPATH, "./*")[column].text for row in table.find_elements(By.CSS_SELECTOR, "tbody tr")]


def test_the_page_loads_without_a_message_on_the_console(browser: webdriver.Chrome) -> None:
    assert browser.get_log("browser") == []
    assert browser.title == "dwf_cluster: cifar10; digits"


def test_the_page_loads_no_external_resource(browser: webdriver.Chrome, html: str) -> None:
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", html)
    assert "@import" not in html


def test_every_figure_is_shown_and_described(browser: webdriver.Chrome) -> None:
    shown = browser.execute_script(
        "return [...document.images].map(image => [image.complete && image.naturalWidth, image.alt.length])"
    )
    of_suites = {"transfer", "gate_and_accuracy", "expert_transfer", "dropped_expert"}  # that digits does not have
    figures_of_digits = {name for name in set(FIGURES) - of_suites if not name.startswith("curve")}
    assert len(shown) == len(FIGURES) + len(figures_of_digits)
    assert all(width > 400 and described > 20 for width, described in shown)


def test_a_table_sorts_by_click_and_by_keyboard(browser: webdriver.Chrome) -> None:
    table = browser.find_element(By.CSS_SELECTOR, "section table.sortable")
    clean = _heading(table, "clean")
    clean.click()
    values = [float(cell.split()[0]) for cell in _column(table, 1)]
    assert values == sorted(values, reverse=True)
    assert not table.find_elements(By.CSS_SELECTOR, "tr.group")
    assert clean.find_element(By.XPATH, "..").get_attribute("aria-sort") == "descending"
    clean.send_keys(Keys.ENTER)
    values = [float(cell.split()[0]) for cell in _column(table, 1)]
    assert values == sorted(values)
    assert clean.find_element(By.XPATH, "..").get_attribute("aria-sort") == "ascending"
    model = _heading(table, "model")
    model.send_keys(Keys.SPACE)
    assert _column(table, 0) == sorted(_column(table, 0))
    assert clean.find_element(By.XPATH, "..").get_attribute("aria-sort") is None


def test_a_table_has_a_line_above_each_group_of_rows(html: str, section: Section) -> None:
    first_table = html[html.index("accuracy in percent, the paper&#39;s table 3") :].partition("</table>")[0]
    headings = re.findall(r'<tr class="group"><th scope="rowgroup" colspan="\d+">([^<]*)</th>', first_table)
    assert headings == list(section.group.sections)


def test_the_overview_shows_all_settings(browser: webdriver.Chrome, section: Section) -> None:
    table = browser.find_element(By.CSS_SELECTOR, "header table.sortable")
    assert _column(table, 0) == ["cifar10", "digits"]
    assert _column(table, 1) == ["3", "1"]
    (row,) = (cells for label, cells in section.tables[0].rows if label == "mixture")
    clean = [above for above, _ in section.tables[0].heads].index("clean")
    longest = section.tables[0].heads.index(("pgd", "50"))
    heads = [button.text.split() for button in table.find_elements(By.CSS_SELECTOR, "thead button")]
    for head, cell in (["clean"], row[clean]), (["pgd", "longest", "@0.03137"], row[longest]):
        assert _column(table, heads.index(head))[0] == cell


def test_a_group_without_evaluations_is_named_and_the_others_are_shown(storage: Path, tmp_path: Path) -> None:
    shutil.copytree(next(storage.glob("digits-*")), tmp_path / "one")
    early = Path(shutil.copytree(tmp_path / "one", tmp_path / "two"))
    shutil.rmtree(early / "results" / "evaluations")
    fields = json.loads((early / "experiment.json").read_text())
    fields["gate"]["kind"] = "hard"
    (early / "experiment.json").write_text(json.dumps(fields))
    assert "Not evaluated yet: digits, gate.kind=hard." in page([str(tmp_path)])


def test_blank_cells_are_sorted_to_the_end(browser: webdriver.Chrome) -> None:
    table = browser.find_elements(By.CSS_SELECTOR, "section table.sortable")[2]
    for _ in range(2):
        _heading(table, "gate 100").click()
        cells = _column(table, 1)
        assert cells[0] != ""
        assert cells[1:] == [""] * 6


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_the_page_fits_the_screen(browser: webdriver.Chrome, width: int) -> None:
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 700}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.execute_script("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    try:
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_printing_opens_folded_parts(browser: webdriver.Chrome) -> None:
    browser.execute_script("document.querySelectorAll('details').forEach(part => { part.open = false; })")
    assert browser.print_page()
    assert browser.execute_script("return [...document.querySelectorAll('details')].every(part => part.open)")


def test_the_page_has_the_numbers_of_the_tables(browser: webdriver.Chrome, section: Section) -> None:
    table = browser.find_element(By.CSS_SELECTOR, "section table.sortable")
    shown = {row.find_element(By.TAG_NAME, "th").text: row for row in table.find_elements(By.CSS_SELECTOR, "tbody tr")}
    for i, (label, cells) in enumerate(section.tables[0].rows):
        assert [cell.text for cell in shown[label].find_elements(By.TAG_NAME, "td")] == list(cells)
        bold = len(shown[label].find_elements(By.TAG_NAME, "strong"))
        assert bold == sum(row == i for row, _ in section.tables[0].bold)


def test_the_headline_says_established_only_if_every_test_is_significant(section: Section) -> None:
    first, clean, worst, last = section.headline
    mean = section.measured.set_index(["model", "attack"]).loc[("mixture", "clean")]
    assert f"{100 * mean['mean']:.1f} ± {100 * mean['std']:.1f} % on clean images" in first
    assert "3 seeds" in first
    assert clean.startswith("On clean images: that the mixture is ahead of every rival is")
    assert "Against the best rival, benign, the difference is" in clean
    assert "not corrected for choosing this rival" in worst
    assert "over seeds and images" in last

    def with_p(p: float) -> Section:
        tests = section.tests
        return replace(
            section, tests=tests.assign(difference=0.1, p_corrected=tests.p_corrected.where(~tests.primary, p))
        )

    assert "is not established. It is established against 0 of 6." in with_p(0.06).headline[2]
    assert "is established. It is established against 6 of 6: " in with_p(0.04).headline[2]


def test_the_headline_claims_nothing_against_an_incomplete_rival(section: Section) -> None:
    tests = section.tests.assign(
        difference=0.1, p_corrected=section.tests.p_corrected.where(~section.tests.primary, 0.01)
    )
    lacking = tests.primary & (tests.other == "benign") & (tests.attack == "clean")
    tests.loc[lacking, ["incomplete", "difference", "p", "p_corrected"]] = [True, np.nan, np.nan, 1.0]
    clean = replace(section, tests=tests).headline[1]
    assert "is not established. It is established against 5 of 6: " in clean
    assert "no claim is made against: benign." in clean


def test_the_page_names_its_sources_and_the_commands_that_reproduce_it(html: str, storage: Path) -> None:
    for folder in storage.iterdir():
        assert str(folder) in html
    files = [file for folder in storage.glob("cifar10-seed0-*") for file in folder.glob("results/predictions/*")]
    rows = sum(pq.read_metadata(file).num_rows for file in files)
    assert f"{len(files)} files, {rows:,} rows" in html
    assert "python -m dwf_cluster.launch --local --preset cifar10 --seed 0,1,2" in html
    assert "--set experts.fgsm=1 experts.pgd=2 evaluation.beyond=pgd_gate,noise,transfer,experts" in html
    assert "cells of the evaluations agree" in html
    assert "made-up" in html  # the host


def test_the_command_for_own_images_names_their_file(tmp_path: Path) -> None:
    images = {name: np.zeros(size, np.uint8) for name, size in {"x_train": (8, 8, 8), "x_test": (4, 8, 8)}.items()}
    np.savez(tmp_path / "mine.npz", **images, y_train=np.arange(8), y_test=np.arange(4))
    experiment = build(str(tmp_path / "mine.npz"), 3, ["model.width=4"])
    make_up(tmp_path / "runs", experiment, 50)
    (group,) = load(str(tmp_path / "runs")).groups
    command = Section.read(group).command
    preset, assignments = re.fullmatch(r".*--preset (\S+) --seed 3 \\\n    --set (.*)", command, re.S).groups()  # type: ignore[union-attr]
    assert build(preset, 3, assignments.split()) == experiment


def test_evaluations_that_differ_from_their_predictions_are_reported(storage: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(next(storage.glob("digits-*")), tmp_path / "digits"))
    file = folder / "results" / "evaluations" / "evaluate-mixture-paper.parquet"
    rows = pd.read_parquet(file)
    rows.loc[0, "correct"] -= 1
    pq.write_table(pa.Table.from_pandas(rows, SCHEMAS["evaluations"], preserve_index=False), file)
    (group,) = load(str(folder)).groups
    assert (
        Section.read(group).recount
        == "Warning: counted again from the predictions, 1 cells differ: mixture clean (seed 0)."
    )


def test_signs_of_masking_are_a_warning_and_html_in_settings_is_escaped(storage: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(next(storage.glob("digits-*")), tmp_path / "digits"))
    file = folder / "results" / "checks" / "evaluate-benign-checks-000000000.parquet"
    rows = pd.read_parquet(file).assign(fired=[True, False])
    pq.write_table(pa.Table.from_pandas(rows, SCHEMAS["checks"], preserve_index=False), file)
    text = (folder / "experiment.json").read_text().replace('"source": "digits"', '"source": "<script>x.npz"')
    (folder / "experiment.json").write_text(text)
    html = page([str(folder)])
    warning = "Signs of gradient masking: 1 in 8 checks of 4 models; how many of them could fire was not recorded: "
    warning += "benign more_steps (seed 0)."
    assert f'<p class="warning">{warning}</p>' in html
    assert "<details open><summary>All checks" in html
    assert "<script>x" not in html
    assert "&lt;script&gt;x.npz" in html


def test_the_report_counts_the_checks_that_could_fire(section: Section) -> None:
    checks = section.checks.assign(fired=False, could_fire=section.checks.check == section.checks.check.iloc[0])
    counted = replace(section)
    counted.__dict__["checks"] = checks
    could = int(checks.could_fire.sum())
    assert counted.masking == (
        f"Signs of gradient masking: none in {len(checks)} checks of 7 models, {could} of which could fire."
    )
