"""A live server with the example model, whose chat template is given the tools of Hermes and the
thoughts of Qwen.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from hmc.compiler import compile as compile_plan
from hmc.plan import Plan, save_plan
from hmc.serve.models import Model, Models
from hmc.serve.server import Server, listen
from hmc.serve.service import Service, Settings

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-kjv"

TEMPLATE = """{{ bos_token }}
{%- if tools -%}<|user|>Tools:
{%- for tool in tools -%}{{ tool | tojson }}{%- endfor -%}{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}<|assistant|>
{%- if message.reasoning_content -%}<think>{{ message.reasoning_content }}</think>{%- endif -%}
{{ message['content'] | trim }}
{%- for call in message['tool_calls'] or [] -%}
<tool_call>
{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor -%}<|end|>
{%- else -%}<|user|>{{ message['content'] | trim }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>
{%- if enable_thinking is defined and enable_thinking -%}<think>{%- endif -%}
{%- endif -%}
"""


@dataclass
class Live:
    """A server that runs in a thread of this process."""

    server: Server
    url: str

    @property
    def service(self) -> Service:
        """The only plan, which is loading or loaded."""
        assert self.server.models.only is not None
        assert self.server.models.only.service is not None
        return self.server.models.only.service

    @property
    def client(self) -> openai.OpenAI:
        """The official client, without its retries."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def wait_ready(self) -> None:
        """Wait until the model is loaded; cold kernels take minutes to build."""
        for _ in range(6000):
            if httpx.get(f"{self.url}/health").status_code == 200:
                return
            assert self.server.models.failure is None, self.server.models.failure
            threading.Event().wait(0.1)
        raise AssertionError("the server does not become ready")


@contextmanager
def running(plan: Plan, settings: Settings) -> Iterator[Live]:
    """A live server of one plan for the length of a `with`."""
    with serving(Models([Model(plan, settings)])) as live:
        yield live


@contextmanager
def serving(models: Models) -> Iterator[Live]:
    """A live server for the length of a `with`."""
    server = Server(models)
    with listen("127.0.0.1", 0) as socket:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
        thread.start()
        try:
            yield Live(server, f"http://127.0.0.1:{socket.getsockname()[1]}")
        finally:
            server.stop()
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("serve") / "tiny"
    shutil.copytree(EXAMPLE, directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="session")
def plan(model: Path) -> Plan:
    return compile_plan(model, threads=2)


@pytest.fixture(scope="session")
def plan_path(plan: Plan, model: Path) -> Path:
    path = model.parent / "tiny.hmp"
    save_plan(plan, path)
    return path


@pytest.fixture(scope="session")
def live(plan: Plan) -> Iterator[Live]:
    with running(plan, Settings(name="tiny", keep_alive_seconds=0.2)) as found:
        found.wait_ready()
        yield found


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with live.client as found:
        yield found


@pytest.fixture(scope="session")
def start() -> Callable[..., object]:
    """`start(plan, settings)`: another live server, as a context manager."""
    return running


@pytest.fixture(scope="session")
def serve() -> Callable[..., object]:
    """`serve(models)`: the same of several models."""
    return serving
