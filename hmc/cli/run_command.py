"""`hmc run`: tokens from a plan, for one prompt or a file of prompts; chats are hmc/cli/chat's."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hmc.cli.arguments import CHECKPOINT, DUMMY_WEIGHTS, RATES, THREADS, placed, telling
from hmc.cli.output import JSON, print_json, progress
from hmc.cli.planned import PLAN, planned
from hmc.cli.predicted import Comparison
from hmc.cli.summary import head_line
from hmc.errors import UsageError
from hmc.files import write_file
from hmc.ops import OPS
from hmc.ops.row import PAGED
from hmc.plan import Plan
from hmc.plan.memory import paged

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from hmc.runtime.engine import Engine
    from hmc.runtime.tokens.prompts import Prompt


@click.command("run")
@PLAN
@click.option("-p", "--prompt", help="The prompt; without it, standard input.")
@click.option(
    "--chat",
    is_flag=True,
    help="Use the model's chat template; without -p, talk turn by turn, a line of input each.",
)
@click.option("--system", help="With --chat: the system message.")
@click.option("--ids", help="Token ids instead of text: 1,2,3.")
@click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False),
    help='JSON lines: {"prompt": TEXT}, {"ids": [..]} or {"messages": [..]}.',
)
@click.option(
    "-n",
    "--max-new-tokens",
    type=int,
    metavar="N",
    help="[default: 256; turn by turn as many as fit]",
)
@click.option(
    "--temperature", type=float, metavar="T", help="0 is greedy [default: generation_config.json]."
)
@click.option("--top-k", type=int, metavar="K")
@click.option("--top-p", type=float, metavar="P")
@click.option("--min-p", type=float, metavar="P")
@click.option("--repetition-penalty", type=float, metavar="R")
@click.option("--seed", type=int, metavar="N", help="Same seed, same tokens.")
@click.option(
    "--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated."
)
@CHECKPOINT
@THREADS
@placed
@click.option(
    "--trace", type=click.Path(dir_okay=False), help="Write a Chrome trace of every step."
)
@click.option(
    "--record-routing",
    type=click.Path(dir_okay=False),
    help="Write which experts were chosen how often, for `hmc compile --routing-profile`. Slower.",
)
@RATES
@DUMMY_WEIGHTS
@JSON
def command(
    plan_path: str,
    prompt: str | None,
    chat: bool,
    system: str | None,
    ids: str | None,
    prompts: str | None,
    checkpoint: str | None,
    threads: int | None,
    devices: str,
    gpus: int | None,
    home: str,
    dummy_weights: bool,
    trace: str | None,
    record_routing: str | None,
    machine: str | None,
    as_json: bool,
    stop: tuple[str, ...],
    **sampling: Any,
) -> None:
    """Write tokens from a plan, or from a model (a directory or a .gguf file), which is compiled
    into hmc's cache first: text streams to standard output, the closing figures go to stderr, and
    what the simulator predicted beside what was measured; both are kept in PLAN.measured.json
    (`hmc report` shows it).
    """
    if sum(given is not None for given in (prompt, ids, prompts)) > 1:
        raise UsageError("give one of -p, --ids and --prompts")
    if system is not None and not chat:
        raise UsageError("--system needs --chat")
    for option, path in (("--trace", trace), ("--record-routing", record_routing)):
        if path is not None and not Path(path).parent.is_dir():
            raise UsageError(f"{option} {path}: its folder does not exist")
    found = planned(plan_path, checkpoint, dummy_weights=dummy_weights)
    plan, plan_path, checkpoint = found.plan, found.path, found.checkpoint
    if record_routing is not None and not plan.experts:
        raise UsageError("--record-routing: this model routes nothing, it has no experts")
    from hmc.cli.chat.loop import talk
    from hmc.runtime.engine import Engine
    from hmc.runtime.routing import RoutingRecorder
    from hmc.runtime.tokens.prompts import prompt_ids, sampling_params
    from hmc.runtime.tokens.text import Text
    from hmc.runtime.weights.tensors import check_checkpoint

    # Whatever is wrong with a question is said before weights are opened, which can take minutes;
    # a checkpoint that is not the plan's (only headers are read) before that: its tokenizer is not.
    directory = Path(checkpoint or plan.checkpoint.path)
    if not dummy_weights:
        check_checkpoint(plan, directory)
    text = Text.open(directory)
    given = {name: value for name, value in sampling.items() if value is not None}
    arguments = {**given, "stop": list(stop) or None}
    sampling_params(text, arguments)
    talks = chat and (prompt, ids, prompts) == (None, None, None) and not as_json
    if talks and (text is None or text.chat is None):
        raise UsageError("--chat: this checkpoint has no chat template: give a plain prompt")
    asked = [] if talks else _prompts(prompt, chat, system, ids, prompts)
    waiting = [prompt_ids(each, text, plan) for each in asked]
    routing = RoutingRecorder() if record_routing is not None else None
    with progress(not as_json) as report:
        engine = Engine(
            plan,
            checkpoint,
            threads=threads,
            dummy_weights=dummy_weights,
            progress=report,
            routing=routing,
            devices=devices,  # type: ignore[arg-type]
            gpus=gpus,
            home=home,  # type: ignore[arg-type]
            text=text,
        )
    with engine, telling(engine.executor):
        # counting takes its share of the time: there is nothing to compare then
        workers = engine.executor.pool.workers
        compared = None if routing else Comparison(plan, machine, workers, plan_path)
        with _tracing(engine, trace):
            if talks and text is not None:
                talk(engine, text, arguments, system or "", routing)
            for each in waiting:
                if routing is not None:
                    routing.begin()
                show = _Show(as_json, prompts is not None, as_json and trace is None, compared)
                _answer(engine, each, arguments, show)
        if compared is not None:
            compared.store("hmc run")
    if record_routing is not None and routing is not None:
        write_file(record_routing, json.dumps(routing.as_json()), "the routing", UsageError)


@dataclass(frozen=True)
class _Show:
    """How an answer is shown: as JSON (one line each of `many`), with the seconds of its `steps`,
    and beside what prediction.
    """

    as_json: bool
    many: bool
    steps: bool
    compared: Comparison | None


@contextmanager
def _tracing(engine: Engine, path: str | None) -> Iterator[None]:
    """Write what runs in the `with` block to `path` as a Chrome trace; nothing when it is None."""
    if path is None:
        yield
        return
    from hmc.runtime.host.trace import chrome_trace

    with engine.executor.recorded() as recorder:
        yield
    text = json.dumps(chrome_trace(engine.plan, recorder))
    write_file(path, text, "the trace", UsageError)


def _prompts(
    prompt: str | None, chat: bool, system: str | None, ids: str | None, prompts: str | None
) -> Iterator[Prompt]:
    if prompts is not None:
        yield from _prompt_file(Path(prompts))
    elif ids is not None:
        try:
            yield [int(word) for word in ids.replace(",", " ").split()]
        except ValueError:
            raise UsageError(f"--ids {ids}: not a list of whole numbers") from None
    else:
        text = sys.stdin.read() if prompt is None else prompt
        yield [*_system(system), {"role": "user", "content": text}] if chat else text


def _system(text: str | None) -> list[dict[str, Any]]:
    """What a conversation begins with."""
    return [{"role": "system", "content": text}] if text else []


def _prompt_file(path: Path) -> Iterator[Prompt]:
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            (value,) = (found[key] for key in ("prompt", "ids", "messages") if key in found)
        except (ValueError, TypeError) as error:
            raise UsageError(
                f'{path}, line {number}: not an object with one of "prompt", "ids", "messages"'
            ) from error
        yield value


def _answer(
    engine: Engine, tokens: npt.NDArray[np.int32], arguments: dict[str, Any], show: _Show
) -> None:
    """Stream one answer (or collect it, for JSON) and print the closing lines."""
    compared = show.compared
    before, screened = engine.executor.calls.copy(), engine.executor.screened
    if show.as_json:
        recorded = compared is not None and not compared.reason and show.steps
        with engine.executor.recorded() if recorded else nullcontext() as recorder:
            result = engine.generate(tokens, **arguments)
        record: dict[str, Any] = {
            "text": result.text,
            "token_ids": list(result.token_ids),
            "finish_reason": result.finish_reason,
            "timings": {
                **asdict(result.timings),
                "prompt_tokens_per_second": result.timings.prompt_tokens_per_second,
                "decode_tokens_per_second": result.timings.decode_tokens_per_second,
            },
            "phases": dict(engine.executor.calls - before),
            "kernels": list(engine.executor.kernels_used),
            "lm_head": dict(engine.executor.screened - screened),
        }
        if compared is not None:
            figures = compared.run(result.timings)
            record["prediction"] = {each.kind: each.as_json() for each in figures}
            if not figures:
                record["prediction"] = {"reason": compared.reason}
            elif recorder is not None:
                record["steps"] = compared.steps(result.timings, recorder)
        click.echo(json.dumps(record)) if show.many else print_json(record)
        return
    stream = engine.stream(tokens, **arguments)
    try:
        for piece in stream:
            click.echo(piece.text if engine.text else f"{piece.token_ids[0]} ", nl=False)
            sys.stdout.flush()
    except KeyboardInterrupt:
        stream.close()
    click.echo()
    result = stream.result
    times = result.timings
    click.echo(
        f"[prompt {times.prompt_tokens} tokens, {times.prompt_tokens_per_second:.1f} tok/s |"
        f" TTFT {times.ttft_s:.2f} s | {len(result.token_ids)} tokens,"
        f" {times.decode_tokens_per_second:.1f} tok/s | {result.finish_reason} |"
        f" {_phases(engine.executor.calls - before)} | {_kernels(engine.plan)}"
        f"{head_line(engine.executor.screened - screened, ' | ')}]",
        err=True,
    )
    if result.finish_reason == "cancelled":
        sys.exit(130)
    if compared is not None:
        click.echo(f"[{compared.line(compared.run(times))}]", err=True)


def _kernels(plan: Plan) -> str:
    """What computes the experts (or the linears of a dense model) in decode, and attention where
    another library does: `fp8 experts on avx512_bf16, attention by flashinfer`.
    """
    steps = plan.phase("decode").steps
    native = [s for s in steps if any(key in plan.kernels for key in s.kernels)]
    step = next((s for s in native if OPS[s.op].routed), native[-1])
    kernel = plan.kernels[step.kernels[0]]
    by = f", attention by {PAGED}" if any(map(paged, steps)) else ""
    return f"{kernel.weight} {kernel.op} on {kernel.isa}{by}"


def _phases(calls: Mapping[str, int]) -> str:
    """The phases that ran and how often: `prefill.stream, decode x 12`."""
    return ", ".join(name if count == 1 else f"{name} x {count}" for name, count in calls.items())
