"""The built-in page in a headless Chromium, against a live server."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from hmc.plan import Plan
from hmc.serve.models import Model, Models
from hmc.serve.service import Settings

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)


def test_the_page_needs_nothing_from_elsewhere(live: Any) -> None:
    reply = httpx.get(f"{live.url}/")
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert re.findall(r"""(?:src|href)=["']?([^"'\s>]*)""", reply.text) == ["data:,"]


def shown(url: str, tmp_path: Path) -> str:
    """What a browser has made of the page after half a minute of its own time."""
    assert browser is not None
    command = [browser, "--headless=new", "--disable-gpu", "--no-sandbox"]
    command += [f"--user-data-dir={tmp_path}/profile", "--disable-dev-shm-usage"]
    command += [
        "--virtual-time-budget=30000",
        "--dump-dom",
        url,
    ]
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(browser is None, reason="no chromium here")
def test_the_page_chats_and_shows_the_plan(live: Any, tmp_path: Path) -> None:
    page = shown(f"{live.url}/?ask=Who+is+he&temperature=0", tmp_path)
    assert re.search(r'id="state"[^>]*data-state="ready"', page)
    assert 'class="turn user">Who is he<' in page
    answer = re.search(r'class="turn assistant">([^<]+)<span class="note">first token', page)
    assert answer, page[page.find('id="log"') :][:500]
    assert "DeepseekV3ForCausalLM" in page and "host: 96 experts" in page
    assert page.count("<rect") == len(live.service.plan.placement)
    assert re.search(r'id="running">\d', page) and "blocks in use" in page
    assert 'class="turn error"' not in page


@pytest.mark.slow
@pytest.mark.skipif(browser is None, reason="no chromium here")
def test_the_page_chats_with_the_model_that_is_chosen(
    plan: Plan, serve: Callable[..., Any], tmp_path: Path
) -> None:
    with serve(Models([Model(plan, Settings(name=name)) for name in "ab"])) as found:
        page = shown(f"{found.url}/?model=b&ask=Who+is+he&temperature=0", tmp_path)
        assert [model.loads for model in found.server.models] == [0, 1]
    assert re.search(r'class="turn assistant">([^<]+)<span class="note">first token', page)
    assert '<option value="a">a (unloaded)</option>' in page
    assert "<title>b · hmc</title>" in page and 'class="turn error"' not in page
