"""The example model with a template that takes system messages and thinks aloud."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import hmc

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-kjv"

TEMPLATE = """{{ bos_token }}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}<|assistant|>
{%- if loop.last and message.reasoning_content -%}<think>{{ message.reasoning_content }}</think>
{%- endif -%}{{ message.content | trim }}<|end|>
{%- else -%}<|user|>{{ message.content | trim }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>
{%- if enable_thinking is defined and enable_thinking -%}<think>{%- endif -%}
{%- endif -%}
"""


@pytest.fixture(scope="session")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan, beside its model."""
    directory = tmp_path_factory.mktemp("chat") / "tiny"
    shutil.copytree(EXAMPLE, directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    path = directory.parent / "tiny.hmp"
    hmc.save_plan(hmc.compile(directory, threads=1, max_context=256), path)
    return path


@pytest.fixture(scope="session")
def engine(talking: Path) -> Iterator[hmc.Engine]:
    with hmc.Engine(hmc.load_plan(talking)) as found:
        yield found
