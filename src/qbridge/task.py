"""What a user declares: a typed task, callable like its function and sendable to workers."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Concatenate, Generic, Literal, ParamSpec, Protocol, TypeVar, Unpack, cast, overload

from qbridge.calls import Call, Item
from qbridge.context import TaskContext
from qbridge.exceptions import ConfigurationError, DuplicateTaskError
from qbridge.options import SendOptions, TaskOptions, check_names, checked_send_options, checked_task_options
from qbridge.result import TaskResult
from qbridge.serialization.signature import Signature
from qbridge.versions import HEADER_SCHEMA, Stamp, Upcaster

__all__ = ["AsyncTask", "Call", "Declares", "Item", "Sender", "Task", "TaskDefinition", "TaskSet"]

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class TaskDefinition:
    """Everything about a task that does not change: made once, at declaration.

    Args:
        function: the function, sync or async; for a remote task its bodiless declaration.
        options: as given to the decorator.
        context: True if a ``TaskContext`` is injected as first parameter.
        remote: True if the task lives in another code base.
        known: False if nobody has said what its arguments are.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        options: TaskOptions,
        *,
        context: bool = False,
        remote: bool = False,
        known: bool = True,
    ) -> None:
        check_names(options, TaskOptions.__annotations__, "task()")
        self.function = function
        self.context = context
        self.remote = remote
        self.name: str = options.get("name") or default_name(function)
        options = checked_task_options(self.name, options)
        self.options: TaskOptions = options
        self.queue: str | None = options.get("queue")
        self.version: int = options.get("version", 1)
        self.upcasters: dict[int, Upcaster] = {}
        self._known = known
        self.is_async: bool = inspect.iscoroutinefunction(inspect.unwrap(function))
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise ConfigurationError(f"task {self.name} is a generator", "Return a list; a result is one value.")
        self.signature: Signature = Signature(function, self.name, context=context, strict=options.get("strict", True))

    @cached_property
    def stamp(self) -> Stamp | None:
        """What its messages say about its signature; None if nobody has declared one. Made at its first use."""
        return Stamp(self.version, self.signature.fingerprint()) if self._known else None

    @cached_property
    def headers(self) -> Mapping[str, str]:
        """What its messages have as headers, whatever else they have: not to be changed."""
        return {} if self.stamp is None else {HEADER_SCHEMA: str(self.stamp)}

    @property
    def place(self) -> tuple[str, str]:
        """Where the function was written: tells a module imported twice from two different functions."""
        code = getattr(inspect.unwrap(self.function), "__code__", None)
        where = f"{code.co_filename}:{code.co_firstlineno}" if code is not None else repr(self.function)
        return (where, getattr(self.function, "__qualname__", ""))


class Sender(Protocol):
    """What a task asks of the bridge that it belongs to."""

    def send_call(self, definition: TaskDefinition, call: Call, options: Mapping[str, Any]) -> TaskResult[Any]:
        """Send one call."""
        ...

    async def asend_call(self, definition: TaskDefinition, call: Call, options: Mapping[str, Any]) -> TaskResult[Any]:
        """Send one call without blocking the event loop."""
        ...

    def send_all(self, calls: Iterable[tuple[TaskDefinition, Call, Mapping[str, Any]]]) -> list[TaskResult[Any]]:
        """Send many calls."""
        ...

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse a queue that nobody declared, and headers that a worker would refuse."""
        ...

    def queue_of(self, definition: TaskDefinition) -> str:
        """Return the queue that a task goes to."""
        ...


class Task(Generic[P, R_co]):
    """A declared task.

    Made by ``bridge.task``, ``bridge.remote`` or ``TaskSet.task``; never directly.
    """

    def __init__(
        self, definition: TaskDefinition, sender: Sender | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        self._definition = definition
        self._sender = sender
        self._options: Mapping[str, Any] = options or {}
        self.__name__: str = getattr(definition.function, "__name__", definition.name)
        self.__qualname__ = getattr(definition.function, "__qualname__", self.__name__)
        self.__module__ = getattr(definition.function, "__module__", __name__)
        self.__doc__ = definition.function.__doc__
        self.__wrapped__: Callable[..., Any] = definition.function

    @property
    def name(self) -> str:
        """Name on the wire."""
        return self._definition.name

    @property
    def queue(self) -> str:
        """Queue that a call is sent to."""
        return str(self._options.get("queue") or self._bound().queue_of(self._definition))

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Call the function here and now, without a broker; a context is detached.

        Raises:
            ConfigurationError: if the task is declared with ``remote``: its body is elsewhere.
        """
        definition = self._definition
        if definition.remote:
            raise ConfigurationError(
                f"task {self.name} lives in another code base", "Send it with .delay(...), then .get() its result."
            )
        if definition.context:
            return cast(R_co, definition.function(TaskContext(), *args, **kwargs))
        return cast(R_co, definition.function(*args, **kwargs))

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> TaskResult[R_co]:
        """Send a call to the workers.

        Raises:
            ArgumentsError: if the arguments do not fit, before anything is sent.
            PayloadError: if they have no JSON form or are too large.
            BrokerUnavailable: if the broker does not take the message within ``publish_timeout``.
        """
        return self._bound().send_call(self._definition, self._encoded(args, kwargs), self._options)

    async def adelay(self, *args: P.args, **kwargs: P.kwargs) -> TaskResult[R_co]:
        """Send a call without blocking the event loop; else as :meth:`delay`."""
        return await self._bound().asend_call(self._definition, self._encoded(args, kwargs), self._options)

    def using(self, **options: Unpack[SendOptions]) -> Task[P, R_co]:
        """Return the same task with other send options; arguments stay typed.

        Raises:
            TypeError: if an option is unknown; suggests the one that was probably meant.
            UnknownQueueError: if nobody declared the queue.
            ConfigurationError: if a value makes no sense.
            PayloadError: if the headers are more than a worker takes.
        """
        checked = checked_send_options(options)
        merged = {**self._options, **options}
        if self._sender is not None:
            self._sender.check_options(checked)
        return type(self)(self._definition, self._sender, merged)

    def item(self, *args: P.args, **kwargs: P.kwargs) -> Item:
        """Return one call, for ``bridge.send_many`` or from an upcaster; raises as :meth:`delay` for bad arguments."""
        return Item((self._definition, self._encoded(args, kwargs), self._options))

    def send_many(self, calls: Iterable[Sequence[Any]]) -> list[TaskResult[R_co]]:
        """Send many calls at once.

        Args:
            calls: one tuple of positional arguments per call.

        Raises:
            ArgumentsError: if any call does not fit; nothing is sent then.
            BatchError: if the broker did not confirm all; names which ids were and which were not.
        """
        items = [Item((self._definition, self._encoded(tuple(call), {}), self._options)) for call in calls]
        return self._bound().send_all(items)

    def upcast(self, version: int) -> Callable[[Callable[Q, Item]], Callable[Q, Item]]:
        """Declare how calls of an older version are read: ``@render.upcast(1)``.

        The function has the parameters that the task had then, and returns ``render.item(...)``: a call as it is now.
        A worker calls it with what such a message holds, before the task: in each attempt, and where a ``Retry`` with
        ``where="worker"`` tries again in the slot, until it has returned. It gets no context, and the options of the
        item do not count. What it raises is the failure of the attempt.

        Args:
            version: of the calls that it takes; below the current one.

        Raises:
            ConfigurationError: if the version is not below the current one, or has an upcaster; if the function is
                async, or an annotation cannot cross the wire.
        """
        if callable(version):
            raise ConfigurationError(
                f"an upcaster of task {self.name} names no version", "Write parentheses: @task.upcast(1)."
            )

        def declare(function: Callable[Q, Item]) -> Callable[Q, Item]:
            definition = self._definition
            definition.upcasters[version] = Upcaster(definition, version, function)
            return function

        return declare

    def schema(self) -> dict[str, Any]:
        """Return ``{"arguments": …, "result": …}`` as JSON Schema."""
        return self._definition.signature.json_schema()

    @property
    def version(self) -> int:
        """The version of its arguments."""
        return self._definition.version

    @property
    def fingerprint(self) -> str:
        """12 hexadecimal digits that change when other arguments fit; titles, defaults and names of classes do not."""
        stamp = self._definition.stamp
        assert stamp is not None  # whoever holds a task has declared it
        return stamp.fingerprint

    @property
    def signature(self) -> str:
        """The signature that callers see, as text."""
        return str(self._definition.signature)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}{self._definition.signature}>"

    def bind_to(self, sender: Sender) -> None:
        """Attach the task to a bridge: called by the bridge that includes its set.

        Raises:
            ConfigurationError: if it belongs to another bridge already.
        """
        if self._sender is not None and self._sender is not sender:
            raise ConfigurationError(
                f"task {self.name} belongs to another bridge already", "Declare its TaskSet once per bridge."
            )
        self._sender = sender

    @property
    def definition(self) -> TaskDefinition:
        """What was declared: for workers, tools and tests."""
        return self._definition

    def _encoded(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        return Call(self._definition.signature.encode_call(args, kwargs))

    def _bound(self) -> Sender:
        if self._sender is None:
            raise ConfigurationError(
                f"task {self.name} belongs to no bridge yet", "Include its TaskSet: bridge.include(tasks)."
            )
        return self._sender


class AsyncTask(Task[P, R_co]):
    """A task declared with ``async def``: called plainly it is awaited; sent like any other."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R_co]:  # type: ignore[override]  # the one difference
        """Return the coroutine of the function, to be awaited here."""
        return cast("Coroutine[Any, Any, R_co]", super().__call__(*args, **kwargs))

    def using(self, **options: Unpack[SendOptions]) -> AsyncTask[P, R_co]:
        """Return the same task with other send options; see :meth:`Task.using`."""
        return cast("AsyncTask[P, R_co]", super().using(**options))


class Declares:
    """``task`` and ``remote``: the decorators that a bridge and a task set share."""

    def _register(self, definition: TaskDefinition) -> Task[Any, Any]:
        """Keep a new task; bridge and task set do it differently."""
        raise TypeError(f"{type(self).__name__} cannot declare tasks")

    @overload
    def task(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...
    @overload
    def task(self, function: Callable[P, R], /) -> Task[P, R]: ...
    @overload
    def task(self, /, *, context: Literal[True], **options: Unpack[TaskOptions]) -> _ContextDecorator: ...
    @overload
    def task(self, /, *, context: Literal[False] = False, **options: Unpack[TaskOptions]) -> _Decorator: ...

    def task(self, function: Any = None, /, *, context: bool = False, **options: Unpack[TaskOptions]) -> Any:
        """Declare a task: ``@bridge.task`` or ``@bridge.task(queue=…, retry=…)``, on ``def`` or ``async def``.

        Args:
            function: the function, when used without parentheses.
            context: True injects a ``TaskContext`` as first parameter, which callers do not pass.
            options: see ``TaskOptions``.

        Raises:
            TypeError: if an option is unknown.
            ConfigurationError: if an option or an annotation cannot work.
            DuplicateTaskError: if the name is taken by another function.
        """
        check_names(options, TaskOptions.__annotations__, "task()")

        def declare(target: Callable[..., Any]) -> Task[Any, Any]:
            return self._register(TaskDefinition(target, options, context=context))

        return declare if function is None else declare(function)

    def remote(self, /, **options: Unpack[TaskOptions]) -> _Decorator:
        """Declare a task that lives in another code base: typed, without a body; ``.delay`` works, calling it raises.

        Args:
            options: ``name`` on the wire and ``queue`` are usual; see ``TaskOptions``.
        """
        check_names(options, TaskOptions.__annotations__, "remote()")

        def declare(target: Callable[..., Any]) -> Task[Any, Any]:
            return self._register(TaskDefinition(target, options, remote=True))

        return cast(_Decorator, declare)


class _Decorator(Protocol):
    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Task[P, R]: ...


class _ContextDecorator(Protocol):
    @overload
    def __call__(
        self, function: Callable[Concatenate[TaskContext, P], Coroutine[Any, Any, R]], /
    ) -> AsyncTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[TaskContext, P], R], /) -> Task[P, R]: ...


class TaskSet(Declares):
    """Tasks declared before any bridge exists: for reusable apps, and against circular imports.

    ``bridge.include(tasks)`` gives them a home; sending one before that is a ``ConfigurationError``.
    """

    def __init__(self) -> None:
        self.tasks: dict[str, Task[Any, Any]] = {}

    def _register(self, definition: TaskDefinition) -> Task[Any, Any]:
        task = make_task(definition, None)
        self.tasks[definition.name] = keep_unique(self.tasks, task)
        return self.tasks[definition.name]


def make_task(definition: TaskDefinition, sender: Sender | None) -> Task[Any, Any]:
    """Return the right class of task for a definition."""
    kind: type[Task[Any, Any]] = AsyncTask if definition.is_async else Task
    return kind(definition, sender)


def keep_unique(tasks: Mapping[str, Task[Any, Any]], task: Task[Any, Any]) -> Task[Any, Any]:
    """Return the task to keep under its name: the new one, if the name is free or the same function came again.

    Raises:
        DuplicateTaskError: if the name belongs to another function.
    """
    other = tasks.get(task.name)
    if other is not None and other.definition.place != task.definition.place:
        raise DuplicateTaskError(
            f"the task name {task.name!r} is used twice: by {other.definition.place[0]} and {task.definition.place[0]}",
            "Give one of them another name: @bridge.task(name=...).",
        )
    return task


def default_name(function: Callable[..., Any]) -> str:
    """Return ``module.function``; a script run as ``__main__`` counts as the module that workers import."""
    module = function.__module__
    if module == "__main__":
        main: Any = sys.modules["__main__"]
        spec = getattr(main, "__spec__", None)
        if spec is not None and spec.name != "__main__":
            module = spec.name.removesuffix(".__main__")
        elif getattr(main, "__file__", None):
            module = Path(main.__file__).stem
    return f"{module}.{function.__name__}"
