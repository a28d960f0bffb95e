"""The built-in page in a headless Chromium, against a live server."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)


def test_the_page_needs_nothing_from_elsewhere(live: Any) -> None:
    reply = httpx.get(f"{live.url}/")
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert re.findall(r"""(?:src|href)=["']?([^"'\s>]*)""", reply.text) == ["data:,"]


@pytest.mark.skipif(browser is None, reason="no chromium here")
def test_the_page_chats_and_shows_the_plan(live: Any, tmp_path: Path) -> None:
    assert browser is not None
    command = [browser, "--headless=new", "--disable-gpu", "--no-sandbox"]
    command += [f"--user-data-dir={tmp_path}/profile", "--disable-dev-shm-usage"]
    command += [
        "--virtual-time-budget=6000",
        "--dump-dom",
        f"{live.url}/?ask=Who+is+he&temperature=0",
    ]
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    page = result.stdout
    assert result.returncode == 0, result.stderr
    assert re.search(r'id="state"[^>]*data-state="ready"', page)
    assert 'class="turn user">Who is he<' in page
    answer = re.search(r'class="turn assistant">([^<]+)<span class="note">first token', page)
    assert answer, page[page.find('id="log"') :][:500]
    assert "DeepseekV3ForCausalLM" in page and "host: 96 experts" in page
    assert page.count("<rect") == len(live.service.plan.placement)
    assert re.search(r'id="running">\d', page) and "blocks in use" in page
    assert 'class="turn error"' not in page
