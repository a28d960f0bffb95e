"""A plan that is loaded, or on its way: its engine, opened in a thread, driven by one scheduler,
watched for steps that hang; hides who starts and ends them. models.py says when.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hmc.errors import ExecutionError, HmcError, UsageError, WorkerError
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
from hmc.serve.progress import Progress
from hmc.serve.tools import Form, form_of
from hmc.serve.vocabulary import Vocabulary
from hmc.serve.watch import StepWatch

State = Literal["loading", "ready", "unhealthy", "draining"]

_WATCH_SECONDS = 1.0
_RECENT = 128
_CLOSE_SECONDS = 10.0
_POLL_SECONDS = 0.2
_ONE_PROCESS = Decision(None, "prefill process: off")


@dataclass(frozen=True)
class Settings:
    """How to serve; see `hmc serve --help`. Where there are several plans, each has a copy with its
    own `name` and `prefill`; all else is the same in all of them.
    """

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
    request_seconds: float = 0.0
    watchdog_seconds: float = 300.0
    keep_alive_seconds: float = 15.0
    max_body_bytes: int = 16 << 20
    prefill: Decision = _ONE_PROCESS
    devices: Devices = "auto"
    home: Home = "mapped"
    gpus: int | None = None
    load_seconds: float = 300.0
    idle_seconds: float = 0.0
    most_loaded: int | None = None


class Service:
    """`begin` loads the engine in a thread; `close` ends everything, for good. All else is for the
    event loop and may be called in any state.
    """

    def __init__(self, plan: Plan, settings: Settings) -> None:
        self.plan, self.settings = plan, settings
        self.vocabulary: Vocabulary | None = None
        self.ttft: deque[float] = deque(maxlen=_RECENT)
        self.failure: HmcError | None = None
        self._opened: Disaggregated | None = None
        self._scheduler: Scheduler | None = None
        self._grammars: Grammars | None = None
        self._unconstrained = ""
        self._form: Form | None = None
        self._progress = Progress(settings.name)
        self._hung = ""
        self._told: set[str] = set()
        self._draining = False
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def begin(self) -> Future[None]:
        """Load in a thread; what it returns is done when that has ended, and `failure` says why if
        it has failed.
        """
        loaded: Future[None] = Future()
        loaded.set_running_or_notify_cancel()  # who no longer waits does not end it
        for name, work in (("load", lambda: self._load(loaded)), ("watch", self._watch)):
            thread = threading.Thread(target=work, name=f"hmc-serve-{name}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return loaded

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
        if scheduler is not None:
            return ""
        return self._progress.told

    @property
    def progress(self) -> float:
        """The share of the step of loading under way, 0..1; 1 when loaded."""
        return 1.0 if self._scheduler is not None else self._progress.share

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
        """Compiles grammars for this model; a 400 when it has no tokenizer, or none for that."""
        self.ready()
        if self._grammars is None:
            why = self._unconstrained or "this checkpoint has no tokenizer"
            raise bad_request(f"{why}: answers cannot be constrained")
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

    @property
    def hangs(self) -> bool:
        """Whether a step hangs: what it computes in cannot be given back."""
        return bool(self._hung)

    def drain(self) -> None:
        """Refuse new requests; those accepted go on."""
        self._draining = True

    def close(self) -> None:
        """End all requests, the scheduler, the prefill process and the engine. A step that hangs is
        left behind with the memory it computes in, and is the `failure`.
        """
        self._draining = True
        self._closing.set()
        with self._lock:
            opened, scheduler = self._opened, self._scheduler
        ended = scheduler is None or scheduler.close(0.0 if self._hung else _CLOSE_SECONDS)
        if not ended:
            self._hung = self._hung or f"a step did not end within {_CLOSE_SECONDS:g} s"
            self.failure = self.failure or WorkerError(self._hung)
        self._close_grammars()
        if opened is not None and ended:
            opened.close()
            self._opened = self._grammars = None
            for thread in self._threads:  # which have it, too
                if thread is not threading.current_thread():
                    thread.join(_CLOSE_SECONDS)
        elif opened is not None and opened.worker is not None:
            opened.worker.close()

    def _load(self, loaded: Future[None]) -> None:
        try:
            with ExitStack() as stack:
                opened, scheduler = self._open(stack)
                stack.pop_all()
        except HmcError as error:
            self.failure = error
        except Exception as fault:  # whatever it is, nobody must wait for ever
            self.failure = ExecutionError(f"loading failed: {type(fault).__name__}: {fault}")
            self.failure.__cause__ = fault
        else:
            with self._lock:
                self._opened, self._scheduler = opened, scheduler
            if self._closing.is_set():  # too late: nobody else will end it
                self.close()
        loaded.set_result(None)

    def _open(self, stack: ExitStack) -> tuple[Disaggregated, Scheduler]:
        """Everything that answers requests; `stack` closes it again."""
        begin = time.monotonic()
        opened = stack.enter_context(
            Disaggregated(
                self.plan,
                self.settings.checkpoint,
                division=self.settings.prefill.division,
                silence=self.settings.watchdog_seconds,
                threads=self.settings.threads,
                dummy_weights=self.settings.dummy_weights,
                progress=self._progress,
                devices=self.settings.devices,
                home=self.settings.home,
                gpus=self.settings.gpus,
            )
        )
        self._tell(opened)
        if opened.worker is not None:
            self._progress("starting the prefill process", 0, 1)
            while not (opened.worker.wait_ready(_POLL_SECONDS) or self._closing.is_set()):
                pass
        if opened.engine.text is not None:
            path = self.settings.checkpoint or self.plan.checkpoint.path
            files = TokenizerFiles.read(Path(path))
            self.vocabulary = Vocabulary(files) if files else None
        if self.vocabulary is not None:
            self._progress("reading the vocabulary for constraints", 0, 1)
            self._read_grammars(self.vocabulary, opened.engine)
            stack.callback(self._close_grammars)
        scheduler = Scheduler(
            opened.engine.executor,
            max_queue=self.settings.max_queue,
            request_seconds=self.settings.request_seconds,
            prefill=opened.worker,
        )
        scheduler.start()
        limits = self.plan.limits
        say(
            f"{self.settings.name} is ready after {time.monotonic() - begin:.1f} s: context"
            f" {limits.max_context}, up to {limits.max_batch} requests at a time and"
            f" {self.settings.max_queue} waiting"
        )
        return opened, scheduler

    def _read_grammars(self, vocabulary: Vocabulary, engine: Engine) -> None:
        """Before anybody is served: it keeps the interpreter's lock, with a large vocabulary for
        seconds.
        """
        try:
            vocab = self.plan.model.vocab
            self._grammars = Grammars(vocabulary, vocab, engine.eos_token_ids)
        except (UsageError, ValueError) as fault:  # of a tokenizer that the grammar engine lacks
            self._unconstrained = f"{fault}"
            say(f"answers cannot be constrained: {fault}")

    def _close_grammars(self) -> None:
        if self._grammars is not None:
            self._grammars.close()

    def _tell(self, opened: Disaggregated) -> None:
        """Say what is pinned for GPUs and how decode is handed over to them, where that is news."""
        executor = opened.engine.executor
        for told in filter(None, (executor.placed, executor.pinned, executor.handover)):
            if told not in self._told:
                self._told.add(told)
                say(told)

    def _watch(self) -> None:
        """The watchdog: a step that takes too long ends all requests and turns /health."""
        name, limit = self.settings.name, self.settings.watchdog_seconds
        period = min(_WATCH_SECONDS, limit / 4)
        watch, restarts = StepWatch(limit, period), 0
        while not self._closing.wait(period):
            scheduler, opened = self._scheduler, self._opened
            if opened is not None:
                self._tell(opened)
                if opened.worker is not None and opened.worker.restarts > restarts:
                    restarts = opened.worker.restarts
                    say(f"{name}: the prefill process was replaced ({restarts} so far)")
            if scheduler is None or not watch.hangs(scheduler.stuck_for, time.monotonic()):
                continue
            self._hung = f"a step has been running for more than {limit:g} s"
            say(f"{name}: {self._hung}; what the threads do:")
            faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
            scheduler.abandon(WorkerError(self._hung))
            return
