"""The engine behind the server: loaded in a thread, driven by one scheduler, watched for steps that
hang; hides who starts and ends them.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hmc.errors import ExecutionError, HmcError, WorkerError
from hmc.plan import Plan
from hmc.runtime.batching.scheduler import Scheduler
from hmc.runtime.engine import Engine
from hmc.runtime.phases.choice import Devices
from hmc.runtime.prefill.disaggregation import Decision, Disaggregated
from hmc.runtime.tokens.files import TokenizerFiles
from hmc.runtime.weights.store import Home
from hmc.serve.faults import ApiError, bad_request
from hmc.serve.grammar import Grammars
from hmc.serve.log import Access, say
from hmc.serve.tools import Form, form_of
from hmc.serve.vocabulary import Vocabulary
from hmc.serve.watch import StepWatch

State = Literal["loading", "ready", "unhealthy", "draining"]

_WATCH_SECONDS = 1.0
_RECENT = 128
_CLOSE_SECONDS = 10.0
_POLL_SECONDS = 0.2
_PROGRESS_SECONDS = 5.0
_ELSE_BYTES = 1 << 20  # of a body besides its prompts: tools, schemas
_ONE_PROCESS = Decision(None, "prefill process: off")


@dataclass(frozen=True)
class Settings:
    """How to serve a plan; see `hmc serve --help`."""

    name: str
    checkpoint: str | None = None
    threads: int | None = None
    dummy_weights: bool = False
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    access_log: Access = "off"
    drain_seconds: float = 60.0
    max_queue: int = 64
    watchdog_seconds: float = 300.0
    keep_alive_seconds: float = 15.0
    max_body_bytes: int = 16 << 20
    prefill: Decision = _ONE_PROCESS
    devices: Devices = "auto"
    home: Home = "mapped"
    gpus: int | None = None


class Service:
    """`begin` loads the engine in a thread; `close` ends everything. All else is for the event loop
    and may be called in any state.
    """

    def __init__(self, plan: Plan, settings: Settings) -> None:
        self.plan, self.settings = plan, settings
        self.created = int(time.time())
        self.vocabulary: Vocabulary | None = None
        self.ttft: deque[float] = deque(maxlen=_RECENT)
        self.failure: HmcError | None = None
        self._opened: Disaggregated | None = None
        self._scheduler: Scheduler | None = None
        self._grammars: Grammars | None = None
        self._form: Form | None = None
        self._progress = ("", 0, 1)
        self._hung = ""
        self._told: set[str] = set()
        self._draining = False
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def begin(self, failed: Callable[[], None]) -> None:
        """Load in a thread; `failed` is called there if that fails, and `failure` says why."""
        for name, work in (("load", lambda: self._load(failed)), ("watch", self._watch)):
            thread = threading.Thread(target=work, name=f"hmc-serve-{name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    @property
    def state(self) -> State:
        """Loading, ready, unhealthy (see `reason`), or draining."""
        if self._hung or (self._scheduler is not None and self._scheduler.failure is not None):
            return "unhealthy"
        if self._draining:
            return "draining"
        return "loading" if self._scheduler is None else "ready"

    @property
    def reason(self) -> str:
        """Why it is not ready; "" when it is."""
        scheduler = self._scheduler
        if self._hung:
            return self._hung
        if scheduler is not None and scheduler.failure is not None:
            return str(scheduler.failure)
        if self._draining:
            return "the server is shutting down"
        what, done, total = self._progress
        share = f": {what} {done / max(total, 1):.0%}" if what else ""
        return f"the model is loading{share}" if scheduler is None else ""

    @property
    def progress(self) -> float:
        """The share of the step of loading under way, 0..1; 1 when loaded."""
        _, done, total = self._progress
        return 1.0 if self._scheduler is not None else min(1.0, done / max(total, 1))

    @property
    def most_body_bytes(self) -> int:
        """What a body may have: the ids of as many prompts as may wait, each as long as the context
        (a text of one, escaped, has about as many bytes), and what else there is.
        """
        prompts = 8 * self.settings.max_queue * self.plan.limits.max_context
        return min(self.settings.max_body_bytes, _ELSE_BYTES + prompts)

    @property
    def scheduler(self) -> Scheduler | None:
        """The scheduler, once loaded."""
        return self._scheduler

    def ready(self) -> tuple[Engine, Scheduler]:
        """What answers requests; a 503 when there is none."""
        if self.state != "ready" or self._opened is None or self._scheduler is None:
            raise ApiError(
                503,
                self.reason,
                kind="server_error",
                code=self.state,
                headers={"Retry-After": "5"},
            )
        return self._opened.engine, self._scheduler

    def grammars(self) -> Grammars:
        """Compiles grammars for this model; a 400 when it has no tokenizer."""
        engine, _ = self.ready()
        if self.vocabulary is None:
            raise bad_request("this checkpoint has no tokenizer: answers cannot be constrained")
        with self._lock:
            if self._grammars is None:
                vocab = self.plan.model.vocab
                self._grammars = Grammars(self.vocabulary, vocab, engine.eos_token_ids)
            return self._grammars

    def form(self) -> Form:
        """How this model writes tool calls; `UsageError` when it does not know tools."""
        engine, _ = self.ready()
        if engine.text is None or engine.text.chat is None:
            raise bad_request("this checkpoint has no chat template")
        if self._form is None:
            self._form = form_of(engine.text.chat)
        return self._form

    @property
    def answered(self) -> bool:
        """While draining: whether every request that was accepted has ended."""
        return self._scheduler is None or self._scheduler.drain(0.0)

    def drain(self) -> None:
        """Refuse new requests; those accepted go on."""
        self._draining = True

    def close(self) -> None:
        """End all requests, the scheduler, the prefill process and the engine. A step that hangs is
        left behind with the memory it computes in, and is the server's `failure`.
        """
        self._draining = True
        self._closing.set()
        with self._lock:
            opened, scheduler = self._opened, self._scheduler
        ended = scheduler is None or scheduler.close(0.0 if self._hung else _CLOSE_SECONDS)
        if not ended:
            self.failure = self.failure or WorkerError(
                self._hung or f"a step did not end within {_CLOSE_SECONDS:g} s"
            )
        if opened is not None and ended:
            opened.close()
        elif opened is not None and opened.worker is not None:
            opened.worker.close()

    def _load(self, failed: Callable[[], None]) -> None:
        try:
            with ExitStack() as stack:
                opened, scheduler = self._open(stack)
                stack.pop_all()
        except HmcError as error:
            self.failure = error
            failed()
            return
        except Exception as fault:  # whatever it is, the server must not wait for ever
            self.failure = ExecutionError(f"loading failed: {type(fault).__name__}: {fault}")
            self.failure.__cause__ = fault
            failed()
            return
        with self._lock:
            self._opened, self._scheduler = opened, scheduler
        if self._closing.is_set():  # too late: nobody else will end it
            self.close()

    def _open(self, stack: ExitStack) -> tuple[Disaggregated, Scheduler]:
        """Everything that answers requests; `stack` closes it again."""

        begin = told = time.monotonic()

        def report(what: str, done: int, total: int) -> None:
            nonlocal told
            self._progress = (what, done, total)
            if time.monotonic() - told > _PROGRESS_SECONDS:
                told = time.monotonic()
                say(self.reason)

        opened = stack.enter_context(
            Disaggregated(
                self.plan,
                self.settings.checkpoint,
                division=self.settings.prefill.division,
                silence=self.settings.watchdog_seconds,
                threads=self.settings.threads,
                dummy_weights=self.settings.dummy_weights,
                progress=report,
                devices=self.settings.devices,
                home=self.settings.home,
                gpus=self.settings.gpus,
            )
        )
        self._tell(opened)
        if opened.worker is not None:
            report("starting the prefill process", 0, 1)
            while not (opened.worker.wait_ready(_POLL_SECONDS) or self._closing.is_set()):
                pass
        if opened.engine.text is not None:
            path = self.settings.checkpoint or self.plan.checkpoint.path
            files = TokenizerFiles.read(Path(path))
            self.vocabulary = Vocabulary(files) if files else None
        scheduler = Scheduler(
            opened.engine.executor,
            max_queue=self.settings.max_queue,
            prefill=opened.worker,
        )
        scheduler.start()
        limits = self.plan.limits
        say(
            f"ready after {time.monotonic() - begin:.1f} s: context {limits.max_context}, up to"
            f" {limits.max_batch} requests at a time and {self.settings.max_queue} waiting"
        )
        return opened, scheduler

    def _tell(self, opened: Disaggregated) -> None:
        """Say what is pinned for GPUs and how decode is handed over to them, where that is news."""
        executor = opened.engine.executor
        for told in filter(None, (executor.pinned, executor.handover)):
            if told not in self._told:
                self._told.add(told)
                say(told)

    def _watch(self) -> None:
        """The watchdog: a step that takes too long ends all requests and turns /health."""
        limit = self.settings.watchdog_seconds
        period = min(_WATCH_SECONDS, limit / 4)
        watch, restarts = StepWatch(limit, period), 0
        while not self._closing.wait(period):
            scheduler, opened = self._scheduler, self._opened
            if opened is not None:
                self._tell(opened)
                if opened.worker is not None and opened.worker.restarts > restarts:
                    restarts = opened.worker.restarts
                    say(f"the prefill process was replaced ({restarts} so far)")
            if scheduler is None or not watch.hangs(scheduler.stuck_for, time.monotonic()):
                continue
            self._hung = f"a step has been running for more than {limit:g} s"
            say(f"{self._hung}; what the threads do:")
            faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
            scheduler.abandon(WorkerError(self._hung))
            return
