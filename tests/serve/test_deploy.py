"""examples/deploy: what its files say of hmc's options, port and metrics is so."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from hmc.cli.serve_command import command as serve

DEPLOY = Path(__file__).parents[2] / "examples" / "deploy"
UNIT = (DEPLOY / "hmc.service").read_text()
ENDINGS = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def _asked_of_serve(words: list[str]) -> dict[str, Any]:
    """The parameters of `hmc serve` that a command line gives; fails for options it lacks."""
    assert words[0] == "serve"
    with serve.make_context("serve", words[1:]) as context:
        return context.params


def _unit(name: str) -> list[str]:
    """What the unit says of a name, with continued lines as one."""
    lines = UNIT.replace("\\\n", " ").splitlines()
    return [line.split("=", 1)[1] for line in lines if line.startswith(f"{name}=")]


def test_the_dashboard_asks_for_metrics_that_there_are(live: Any) -> None:
    text = httpx.get(f"{live.url}/metrics").text
    there = {
        family.name + ending
        for family in text_string_to_metric_families(text)
        for ending in ENDINGS[family.type]
    }
    board = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked += [each["query"] for each in board["templating"]["list"] if each["type"] == "query"]
    for expression in asked:
        names = set(re.findall(r"hmc_\w+", expression))
        assert names and names <= there, expression
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_prometheus_looks_where_serve_listens() -> None:
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    port = next(each.default for each in serve.params if each.name == "port")
    assert job["static_configs"] == [{"targets": [f"127.0.0.1:{port}"]}]


def test_the_units_options_are_serves() -> None:
    (line,) = _unit("ExecStart")
    program, *words = shlex.split(line)
    assert program == "/opt/hmc/bin/hmc"
    given = _asked_of_serve(words)
    assert given["api_key_file"] == "%d/" + _unit("LoadCredential")[0].partition(":")[0]
    assert given["drain_seconds"] < float(_unit("TimeoutStopSec")[0])


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "hmc.service"
    unit.write_text(UNIT.replace("/opt/hmc/bin/hmc", sys.executable))
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_containers_options_are_serves() -> None:
    text = (DEPLOY / "Containerfile").read_text().replace("\\\n", " ")
    steps = dict(re.findall(r"^(ENTRYPOINT|CMD|HEALTHCHECK|EXPOSE) (.*)$", text, re.MULTILINE))
    assert json.loads(steps["ENTRYPOINT"]) == ["hmc"]
    given = _asked_of_serve(json.loads(steps["CMD"]))
    assert str(given["port"]) == steps["EXPOSE"]
    assert f"http://127.0.0.1:{given['port']}/health" in steps["HEALTHCHECK"]
    with pytest.raises(click.NoSuchOption):
        _asked_of_serve(["serve", "plan.hmp", "--no-such-option"])
