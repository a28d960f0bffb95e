"""Pictures of the built-in page beside stored ones, on a phone and a desk, by day and by night.

Fonts differ between machines, so pictures are compared as a browser shrinks them: places, sizes and
colours count, letters do not. `--update-golden` stores them anew.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import browser as chromium
import pytest
from page_person import READY, needs_browser

STORED = Path(__file__).parents[1] / "golden" / "page"
SIZES = {"phone": (390, 844), "desktop": (1280, 800)}
MEAN, WORST = 3.0, 90.0
"""Difference of a channel, of 255: over the picture, and of one of its small squares."""

TALK = [
    {"role": "user", "content": "What is a plan?"},
    {
        "role": "assistant",
        "content": "# A plan\n\nA **file** that says:\n\n- where every expert lives\n"
        "- which `kernel` computes what\n\n"
        "| device | bytes |\n|---|--:|\n| host | 16.7 MB |\n\n"
        "```sh\nhmc show tiny.hmp\n```\n",
        "reasoning_content": "The user asks for a plan.",
        "note": "first token 12 ms, 80 tokens, 61.5 tok/s, stop",
    },
]
LIVE = {
    "state": "ready",
    "time": 5.0,
    "ttft": {"median": 0.012},
    "scheduler": {
        **{"running": 1, "prefilling": 0, "waiting": 2, "batch": 1, "phase": "decode", "lanes": 1},
        **{"kv_used": 9, "kv_cached": 6, "kv_total": 31, "step_seconds": 0.016},
        **{"tokens_generated": 80, "prompt_tokens": 20, "prefix_tokens": 60},
    },
}
DIFFERENCE = """async ([one, other]) => {
  const small = async text => {
    const image = new Image();
    image.src = "data:image/png;base64," + text;
    await image.decode();
    const width = Math.round(image.width / 10), height = Math.round(image.height / 10);
    const canvas = document.createElement("canvas");
    Object.assign(canvas, { width, height });
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(image, 0, 0, width, height);
    const { data } = context.getImageData(0, 0, width, height);
    return { size: [image.width, image.height], data };
  };
  const [a, b] = [await small(one), await small(other)];
  if (String(a.size) !== String(b.size)) return [255, 255];
  const differences = [...a.data].map((value, i) => Math.abs(value - b.data[i]));
  return [differences.reduce((x, y) => x + y, 0) / differences.length, Math.max(...differences)];
}"""


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_page_looks_as_it_did(
    size: str, scheme: str, browser: chromium.Browser, live: Any, request: pytest.FixtureRequest
) -> None:
    width, height = SIZES[size]
    page = browser.open(live.url, width=width, height=height, dark=scheme == "dark")
    page.wait_for(READY)
    page.run("window.fetch = () => new Promise(() => {})")  # nothing changes any more
    page.run(f"rates.splice(0, Infinity, ...{json.dumps([i % 40 for i in range(100)])})")
    page.run(f"shown.messages.push(...{json.dumps(TALK)})")
    page.run("shown.usage = { total_tokens: 120 }; drawConversation(); $('log').scrollTop = 0")
    page.run(f"before = null; facts.isa = 'avx2'; drawPlan(); drawLive({json.dumps(LIVE)})")
    page.run("document.activeElement.blur()")
    page.run("Promise.all(document.getAnimations().map(each => each.finished))")
    taken = page.picture()
    path = STORED / f"{size}-{scheme}.png"
    if request.config.getoption("--update-golden"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(taken)
    assert path.exists(), f"{path} is missing: run pytest with --update-golden"
    pair = [base64.b64encode(picture).decode() for picture in (taken, path.read_bytes())]
    blank = browser.open("about:blank")
    mean, worst = blank.run(f"({DIFFERENCE})({json.dumps(pair)})")
    assert mean < MEAN and worst < WORST, (mean, worst)
    page.call("Page.close")
    blank.call("Page.close")
