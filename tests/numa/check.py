"""The NUMA check, one script: `make numa-check`, or `PYTHONPATH=tests python -m numa.check`.

Compiles two plans for a machine of two nodes, runs them here, on whatever machine this is, and once
more by the command that `NUMA_VM` names, which runs what follows it on a machine of several nodes
with the files of this one (a virtual machine will do). Empty: this machine has them itself. What is
checked there is in inside.py; one line a check, exit code 1 where one was wrong.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import hmc
from hmc.machine.detect import detect
from hmc.machine.model import Machine, NumaNode
from numa.inside import MODELS, PROMPT, TOKENS

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "numa"
_SECONDS = 1200

_SIZED = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 16384,
    "hidden_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 1,
}
"""Matrices whose parts hold whole huge pages (the output), hold none (experts), and are less than a
page (the router)."""


def two_nodes() -> Machine:
    """This machine as one of two nodes with two cores each, of the kernel tier that every runner
    has."""
    here = detect()
    return here.model_copy(
        update={
            "flags": tuple(flag for flag in here.flags if not flag.startswith(("avx512", "amx"))),
            "cores": 4,
            "nodes": tuple(
                NumaNode(id=node, cpus=(2 * node, 2 * node + 1), memory_bytes=2 << 30)
                for node in range(2)
            ),
        }
    )


def prepare() -> None:
    """Plans, and what each answers here, in the folder."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    (FOLDER / "sized").mkdir(parents=True)
    (FOLDER / "sized" / "config.json").write_text(json.dumps(_SIZED))
    os.environ["HMC_CACHE"] = str(FOLDER / "cache")
    where = {"tiny": ROOT / "examples" / "tiny-kjv", "sized": FOLDER / "sized"}
    answers = {}
    for name in MODELS:
        dummy = name == "sized"
        plan = hmc.compile(where[name], machine=two_nodes(), max_context=512, dummy_weights=dummy)
        hmc.save_plan(plan, FOLDER / f"{name}.hmp")
        with hmc.Engine(plan, dummy_weights=dummy, threads=2) as engine:
            found = engine.generate(PROMPT, max_new_tokens=TOKENS, temperature=0)
            answers[name] = list(found.token_ids)
    (FOLDER / "answers.json").write_text(json.dumps(answers))


def main() -> int:
    """The exit code."""
    prepare()
    runner = shlex.split(os.environ.get("NUMA_VM", ""))
    return subprocess.run(
        [*runner, sys.executable, "-m", "numa.inside", str(FOLDER)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        cwd=ROOT,
        timeout=_SECONDS,
        check=False,
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
