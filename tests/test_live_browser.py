"""The widget in a real JupyterLab: a click on the map reaches Python."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import needs_browser

SHOW = """
import torch
import lahis_tl as lt
values = torch.rand(2, 6, 5, generator=torch.Generator().manual_seed(0))
view = lt.widget(lt.HeadScores(values, ("en", "fr"), "lahis", "nats per token"))
view
"""
ASK = 'print("head", view.head.label, "selected", view.selected.labels)'


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[str]:
    """The address of a JupyterLab in which a notebook of two cells lies."""
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(source.strip()) for source in (SHOW, ASK)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata["kernelspec"] = kernel
    nbformat.write(notebook, tmp_path / "heads.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}"]
    command += [
        "--IdentityProvider.token=",
        "--ServerApp.port_retries=0",
        f"--notebook-dir={tmp_path}",
    ]
    environment = os.environ | {
        f"JUPYTER_{n}_DIR": str(tmp_path / n) for n in ("CONFIG", "RUNTIME")
    }
    log = (tmp_path / "server.log").open("w")
    server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail(
                f"JupyterLab did not start: {(tmp_path / 'server.log').read_text()[-2000:]}"
            )
        yield address
    finally:
        server.terminate()
        server.wait(20)


@pytest.mark.slow
@needs_browser
def test_a_click_reaches_python(lab: str, browser: Any) -> None:
    context = browser.new_context(viewport={"width": 1300, "height": 1100})
    page = context.new_page()
    page.goto(f"{lab}/lab/tree/heads.ipynb?reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
    page.locator("#jp-main-statusbar").get_by_text("Idle").wait_for(timeout=60_000)
    page.locator(".jp-Notebook .jp-CodeCell .cm-content").first.click()
    page.keyboard.press("Shift+Enter")
    page.wait_for_selector(".js-plotly-plot .heatmaplayer image", timeout=120_000)
    for label, shift in (((2, 3), False), ((4, 1), True), ((0, 2), True)):
        x, y = page.evaluate(
            """([layer, head]) => { const map = document.querySelector('.js-plotly-plot');
                const box = map.getBoundingClientRect(), {xaxis, yaxis} = map._fullLayout;
                return [box.left + xaxis._offset + xaxis.d2p(head), box.top + yaxis._offset + yaxis.d2p(layer)]; }""",
            list(label),
        )
        page.mouse.move(x - 3, y)
        page.mouse.move(x, y)
        page.wait_for_timeout(400)
        if shift:
            page.keyboard.down("Shift")
        page.mouse.click(x, y)
        if shift:
            page.keyboard.up("Shift")
        page.wait_for_timeout(500)
    page.screenshot(path=os.environ.get("LAB_PICTURE", os.devnull), type="png")
    page.locator(".jp-Notebook .jp-CodeCell .cm-content").nth(1).click()
    page.keyboard.press("Shift+Enter")
    said = page.locator(".jp-OutputArea-output pre").last
    said.wait_for(timeout=30_000)
    assert said.inner_text().strip() == "head L0H2 selected ['L4H1', 'L0H2']"
    context.close()
