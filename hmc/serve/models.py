"""The plans behind one server: which is loaded, loads, was unloaded or failed, and who uses it.

A plan is loaded when it is asked for and stays until it is idle for too long or another one needs
its memory: then the one that was unused longest goes, and never one that is in use. One plan is
loaded or unloaded at a time. All of it is the event loop's, but for `drain`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Literal

from hmc.errors import CapacityError, HmcError
from hmc.plan import Plan
from hmc.runtime.batching.stats import SchedulerStats
from hmc.runtime.memory.release import release
from hmc.serve.faults import ApiError, bad_request
from hmc.serve.log import say
from hmc.serve.room import Needs, lacking
from hmc.serve.service import Service, Settings, State

Status = Literal["loaded", "loading", "unloaded"]

_POLL_SECONDS = 0.5
_RETRY_SECONDS = "5"
_ELSE_BYTES = 1 << 20  # of a body besides its prompts: tools, schemas


class Model:
    """A plan under its name. `service` is there while it is loading or loaded, `failure` says why
    it was not the last time, `users` counts requests that use it or wait for it.
    """

    def __init__(self, plan: Plan, settings: Settings) -> None:
        self.plan, self.settings, self.name = plan, settings, settings.name
        self.needs = Needs.of(plan, settings)
        self.created = int(time.time())
        self.service: Service | None = None
        self.failure: HmcError | None = None
        self.opening: asyncio.Task[None] | None = None
        self.waits_for = ""
        self.users = self.loads = self.unloads = 0
        self.used = time.monotonic()

    @property
    def loaded(self) -> bool:
        """Whether it is; it need not be healthy."""
        return self.service is not None and self.service.scheduler is not None

    @property
    def status(self) -> Status:
        """As llama-server's router has it."""
        if self.loaded:
            return "loaded"
        return "unloaded" if self.opening is None else "loading"

    @property
    def reason(self) -> str:
        """Why it does not answer; "" where it does, or would once it is asked."""
        if self.service is not None:
            return self.service.reason
        if self.opening is not None:
            return self.waits_for or f"{self.name} waits for another plan to be loaded"
        return "" if self.failure is None else str(self.failure)

    def stats(self) -> SchedulerStats | None:
        """The scheduler's figures now; None while it is not loaded."""
        scheduler = None if self.service is None else self.service.scheduler
        return None if scheduler is None else scheduler.stats()

    def described(self) -> dict[str, Any]:
        """Its status, with the progress while it loads, and the reason where it failed."""
        found: dict[str, Any] = {"value": self.status}
        if self.status == "loading":
            progress = 0.0 if self.service is None else self.service.progress
            found |= {"progress": round(progress, 3)}
        failed = self.failure is not None and self.status == "unloaded"
        if failed or (self.service is not None and self.service.state == "unhealthy"):
            found["failed"] = True
        return found | ({"reason": self.reason} if self.reason else {})


class Models:
    """Those of a server, in the order in which they were given. `begin` loads the only one, or
    those that `preload` names; `close` ends everything.
    """

    def __init__(self, models: Sequence[Model], preload: Sequence[str] = ()) -> None:
        self.all = tuple(models)
        self.settings = self.all[0].settings
        self.only = self.all[0] if len(self.all) == 1 else None
        self.failure: HmcError | None = None
        self._preload = [self.only] if self.only else [self.find(name) for name in preload]
        self._begun = self.only is None  # the server can serve, whatever is loaded
        self._draining = False
        self._moving = asyncio.Lock()
        self._freed = asyncio.Event()  # a request has ended
        self._tasks: set[asyncio.Task[None]] = set()

    def __iter__(self) -> Iterator[Model]:
        return iter(self.all)

    @property
    def state(self) -> State:
        """Of the server: unhealthy where a step hangs, which only a new process mends, or where the
        only plan fails; loading until the only plan is loaded for the first time.
        """
        if self._unhealthy is not None:
            return "unhealthy"
        if self._draining:
            return "draining"
        return "ready" if self._begun else "loading"

    @property
    def reason(self) -> str:
        """Why it is not ready; "" when it is."""
        if (model := self._unhealthy) is not None:
            return model.reason if self.only else f"{model.name}: {model.reason}"
        if self._draining:
            return "the server is shutting down"
        return "" if self._begun else self.all[0].reason

    @property
    def most_body_bytes(self) -> int:
        """What a body may have: the ids of as many prompts as may wait, each as long as the context
        (a text of one, escaped, has about as many bytes), and what else there is.
        """
        context = max(model.plan.limits.max_context for model in self.all)
        prompts = 8 * self.settings.max_queue * context
        return min(self.settings.max_body_bytes, _ELSE_BYTES + prompts)

    def find(self, name: str | None) -> Model:
        """The model of a name, which may be left out where there is one; else a 404 or a 400."""
        known = [model.name for model in self.all]
        if name is None and self.only is None:
            raise bad_request(f"model: name one of {', '.join(known)}", "model", "model_required")
        for model in self.all:
            if name in (None, model.name):
                return model
        are = f"{known[0]!r} is" if self.only else f"{', '.join(map(repr, known))} are"
        raise ApiError(
            404,
            f"the model {name!r} is not served here; {are}",
            kind="not_found_error",
            param="model",
            code="model_not_found",
        )

    def begin(self) -> asyncio.Task[None]:
        """Load what is loaded from the start, and unload what is idle from now on; the task ends
        when the first is done, and `failure` says why the only plan could not be.
        """
        self._keep(asyncio.create_task(self._tend()))
        return self._keep(asyncio.create_task(self._load_first()))

    def use(self, model: Model) -> Use:
        """Use a model until `Use.end`: it is not unloaded meanwhile. A 503 where the server is not
        ready.
        """
        if self.state in ("loading", "draining"):
            raise _unavailable(self.reason, self.state)
        model.users += 1
        return Use(self, model)

    def let_go(self, model: Model) -> None:
        """A use of a model has ended."""
        model.users -= 1
        model.used = time.monotonic()
        self._freed.set()

    async def wait(self, model: Model, seconds: float) -> bool:
        """Wait until a model is loaded, which begins now where it has not; whether it is. Raises
        a 500 with the reason where that fails, and a 503 when the server shuts down.
        """
        if model.loaded:
            return True
        opening = self._open(model)
        end = time.monotonic() + seconds
        while not opening.done() and (left := end - time.monotonic()) > 0:
            await asyncio.wait({opening}, timeout=min(left, _POLL_SECONDS))
            if self._draining:
                raise _unavailable("the server is shutting down", "draining")
        if opening.done() and not model.loaded:
            why = model.failure or f"{model.name} was unloaded again"
            text = f"{model.name} cannot be loaded: {why}"
            raise ApiError(500, text, kind="server_error", code="load_failed")
        return model.loaded

    def drain(self) -> None:
        """From any thread: refuse new requests; those accepted go on."""
        self._draining = True
        for model in self.all:
            if (service := model.service) is not None:
                service.drain()

    @property
    def answered(self) -> bool:
        """While draining: whether every request that was accepted has ended."""
        return all(model.service is None or model.service.answered for model in self.all)

    async def close(self) -> None:
        """End everything; a step that hangs is the server's `failure`."""
        self.drain()
        for task in self._tasks:
            task.cancel()
        services = [model.service for model in self.all if model.service is not None]
        await asyncio.gather(*(asyncio.to_thread(service.close) for service in services))
        self.failure = self.failure or next((s.failure for s in services if s.failure), None)

    @property
    def _unhealthy(self) -> Model | None:
        """A model that only a new process mends: the only one that has failed, one that hangs."""
        for model in self.all:
            service = model.service
            if service is None or service.state != "unhealthy":
                continue
            if self.only or service.hangs:
                return model
        return None

    def _open(self, model: Model) -> asyncio.Task[None]:
        """The task that loads a model: the one under way, or a new one. It raises nothing."""
        if model.opening is None:
            model.opening = self._keep(asyncio.create_task(self._load(model)))
        return model.opening

    async def _load_first(self) -> None:
        for model in self._preload:
            model.users += 1
            try:
                await asyncio.wait({self._open(model)})
            finally:
                self.let_go(model)
        if self.only is not None and not self.only.loaded:
            self.failure = self.only.failure
        self._begun = True

    async def _load(self, model: Model) -> None:
        """Load it once there is room, for as long as somebody wants it."""
        try:
            while model.users:
                self._freed.clear()
                async with self._moving:
                    if await self._has_room(model):
                        if await self._opened(model):
                            return
                        continue
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._freed.wait(), _POLL_SECONDS)
        finally:
            model.opening, model.waits_for = None, ""

    async def _opened(self, model: Model) -> bool:
        """Load it, or fail; False to try again, since others hold memory that it lacks."""
        model.waits_for = ""
        model.service = service = Service(model.plan, model.settings)
        if self._draining:
            service.drain()
        await asyncio.wrap_future(service.begin())
        if service.failure is None:
            model.failure, model.used = None, time.monotonic()
            model.loads += 1
            return True
        why = service.failure
        await asyncio.to_thread(service.close)
        model.service = None
        del service
        await asyncio.to_thread(release)
        if isinstance(why, CapacityError) and await self._unload_one(model):
            return False
        self._failed(model, why)
        return True

    async def _has_room(self, model: Model) -> bool:
        """Whether there is room beside the others, of which as many as necessary are unloaded if
        nobody uses them. What has no room even alone is for the engine to say.
        """
        if lacking(model.plan, model.needs):
            return True
        while others := [each for each in self.all if each.loaded]:
            why = lacking(model.plan, model.needs, [each.needs for each in others])
            if not why and self.settings.most_loaded == len(others):
                why = f"{len(others)} loaded at a time are the most allowed"
            if not why:
                return True
            if not await self._unload_one(model):
                busy = ", ".join(each.name for each in others)
                model.waits_for = f"{model.name} waits for {busy}, in use: {why}"
                return False
        return True

    def _failed(self, model: Model, why: HmcError) -> None:
        model.failure = why
        if self._begun:
            say(f"{model.name} cannot be loaded: {why}")

    async def _unload_one(self, wanted: Model) -> bool:
        """Unload the one that was unused longest; whether there is one that nobody uses."""
        idle = [
            model
            for model in self.all
            if model.service is not None
            and model.loaded
            and not model.users
            and not model.service.hangs
        ]
        if not idle:
            return False
        longest = min(idle, key=lambda model: model.used)
        await self._unload(longest, f"{wanted.name} takes its place")
        return True

    async def _unload(self, model: Model, why: str) -> None:
        service, model.service = model.service, None
        assert service is not None
        model.unloads += 1
        await asyncio.to_thread(service.close)
        if service.hangs:
            model.service = service  # its memory is still taken
            say(f"{model.name} cannot be unloaded: {service.failure}")
            return
        del service
        await asyncio.to_thread(release)
        say(f"{model.name} is unloaded: {why}")

    async def _tend(self) -> None:
        """Unload what is idle for too long, and what has failed and may be loaded anew."""
        idle = self.settings.idle_seconds
        while True:
            await asyncio.sleep(min(1.0, idle / 4) if idle else 1.0)
            for model in self.all:
                if why := self._unload_for(model):
                    async with self._moving:
                        if why := self._unload_for(model):  # still
                            await self._unload(model, why)

    def _unload_for(self, model: Model) -> str:
        """Why a model is to be unloaded now; "" where it is not."""
        service, idle = model.service, self.settings.idle_seconds
        if service is None or not model.loaded or model.users or self._draining or service.hangs:
            return ""
        if service.state == "unhealthy":
            return "" if self.only else f"it has failed: {service.reason}"
        if idle and time.monotonic() - model.used >= idle:
            return f"it has been idle for {idle:g} s"
        return ""

    def _keep(self, task: asyncio.Task[None]) -> asyncio.Task[None]:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class Use:
    """One request's use of a model, from `Models.use` to `end`."""

    def __init__(self, models: Models, model: Model) -> None:
        self.model = model
        self._models = models
        self._open = True
        self._until = time.monotonic() + models.settings.load_seconds

    async def soon(self, seconds: float) -> bool:
        """Whether the model is loaded within `seconds`; raises as `ready` does."""
        return await self._models.wait(self.model, min(seconds, self.left))

    async def ready(self) -> Service:
        """What answers; waits until it is loaded, `load_seconds` in all, and raises a 503 then, or
        a 500 with the reason where it cannot be.
        """
        model = self.model
        if not await self._models.wait(model, self.left):
            seconds = self._models.settings.load_seconds
            code = "memory_in_use" if model.waits_for else "loading"
            raise _unavailable(f"not loaded within {seconds:g} s: {model.reason}", code)
        assert model.service is not None
        return model.service

    def end(self) -> None:
        """The request has been answered; a second call does nothing."""
        if self._open:
            self._open = False
            self._models.let_go(self.model)

    @property
    def left(self) -> float:
        """Seconds that it still waits for the model."""
        return max(0.0, self._until - time.monotonic())


def _unavailable(reason: str, code: str) -> ApiError:
    return ApiError(
        503, reason, kind="server_error", code=code, headers={"Retry-After": _RETRY_SECONDS}
    )
