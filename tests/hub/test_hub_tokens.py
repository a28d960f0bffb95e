"""From a hub id to tokens, by the command line in a process of its own, which reads HF_ENDPOINT,
HF_HOME and HF_TOKEN as every client of the hub does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_commands import EXAMPLE
from played_hub import PlayedHub

import hmc

_WORDS = "And the king said unto"
_DEADLINE_S = 300


@pytest.mark.slow
def test_the_tokens_are_those_of_the_local_directory(king: PlayedHub, tmp_path: Path) -> None:
    king.token = "hf_mine"
    names = {
        "HF_ENDPOINT": king.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_mine",
        "HMC_CACHE": os.environ.get("HMC_CACHE", str(tmp_path / "cache")),
        "PYTHONPATH": str(Path(hmc.__file__).parents[1]),
    }
    ended = subprocess.run(
        [sys.executable, "-m", "hmc", "run", "king/tiny-kjv", "-p", _WORDS, "-n", "12",
         "--temperature", "0", "--json"],
        env=os.environ | names, capture_output=True, text=True, timeout=_DEADLINE_S, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    for said in ("[compiled king/tiny-kjv@", "host memory", "[fetching 1 file", "hashes checked"):
        assert said in ended.stderr
    assert list((tmp_path / "home" / "hub" / "models--king--tiny-kjv").rglob("model.safetensors"))
    with hmc.Engine(hmc.compile(EXAMPLE)) as engine:
        local = engine.generate(_WORDS, max_new_tokens=12, temperature=0)
    assert json.loads(ended.stdout)["token_ids"] == list(local.token_ids)
