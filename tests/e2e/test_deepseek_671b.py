"""The real DeepSeek-V3: 90,427 tensors in 135 shards (headers over sparse files) compile small and
to the same bytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from make_deepseek_v3 import write_deepseek_v3

from hmc.plan import load_plan

_COMPILE = """
import json, resource, sys
from hmc.cli import main
try:
    main(["compile", sys.argv[1], "-o", sys.argv[2], "--json"])
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def checkpoint_671b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("deepseek-v3")
    write_deepseek_v3(directory)
    return directory


def _compile(directory: Path, target: Path) -> tuple[dict[str, object], int]:
    """(what `hmc compile --json` printed, peak memory in bytes) of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE, str(directory), str(target)],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout), int(done.stderr.split()[-1]) * 1024


@pytest.mark.slow
def test_671b_compiles_small_and_deterministically_and_is_refused_before_it_is_mapped(
    checkpoint_671b: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one.hmp", tmp_path / "two.hmp"
    report, peak = _compile(checkpoint_671b, one)
    _compile(checkpoint_671b, two)
    assert one.read_bytes() == two.read_bytes()
    assert one.stat().st_size < 1_000_000
    assert peak < 1_000_000_000
    assert report["fits"] is False
    plan = load_plan(one)
    assert len(plan.checkpoint.shards) == 135
    assert sum(experts.count for experts in plan.experts) == 58 * 3 * 256
    assert abs(plan.model.parameters / 671e9 - 1) < 0.001
    done = subprocess.run(
        [sys.executable, "-m", "hmc", "run", str(one), "--ids", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 5
    assert "routed experts" in done.stderr
    assert done.stderr.count("\n") == 1
