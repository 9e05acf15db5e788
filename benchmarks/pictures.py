"""Make the README's pictures: Ray's dashboard while the demo runs, and the report of its results.

    python benchmarks/pictures.py

Runs the demo in a temporary folder, takes screenshots with Debian's chromium and chromium-driver, writes `docs/*.png`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

DOCS = Path(__file__).parents[1] / "docs"
SWITCHES = ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars")


def browser(width: int, height: int) -> webdriver.Chrome:
    """A headless Chromium; size of the window in CSS pixels."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for switch in (*SWITCHES, f"window-size={width},{height}"):
        options.add_argument(f"--{switch}")
    return webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))


def dashboard(url: str, token: str) -> None:
    """Take a picture of the job's page of the dashboard, with the names of the running tasks."""
    with browser(1280, 1200) as chrome:
        wait = WebDriverWait(chrome, 60)

        def find(tag: str, text: str) -> WebElement:
            element: WebElement = wait.until(lambda c: c.find_element(By.XPATH, f"//{tag}[text()='{text}']"))
            return element

        chrome.get(url)
        field = wait.until(lambda c: c.find_elements(By.CSS_SELECTOR, "[role=dialog] input"))[0]
        field.send_keys(token)
        chrome.find_elements(By.CSS_SELECTOR, "[role=dialog] button")[-1].click()
        wait.until(lambda c: not c.find_elements(By.CSS_SELECTOR, "[role=dialog]"))
        chrome.get(f"{url}/#/jobs/01000000")
        bar = find("span", "Hide finished").find_element(By.XPATH, "./following::*[name()='svg'][1]")
        bar.click()
        find("a", "expert benign")
        chrome.execute_script("window.scrollTo(0, 0)")
        chrome.save_screenshot(str(DOCS / "dashboard.png"))


def report(page: Path) -> None:
    """Take a picture of the beginning of the report."""
    with browser(1280, 1700) as chrome:
        chrome.get(page.as_uri())
        chrome.save_screenshot(str(DOCS / "report.png"))


def main() -> None:
    """Run the demo and take the pictures."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["python", "-m", "dwf_cluster.launch", "--local"]  # the dashboard shows it as it is
        environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
        with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                if match := re.match(r"Ray dashboard: (\S+) .* `cat (\S+)`", line):
                    url, token = match[1], Path(match[2]).read_text()
                elif line.startswith("expert benign: done"):
                    dashboard(url, token)
        page = Path(folder) / "report.html"
        subprocess.run([sys.executable, "-m", "analysis.report", "runs", "--out", page], cwd=folder, check=True)
        report(page)


if __name__ == "__main__":
    main()
