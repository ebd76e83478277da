"""Held calls: an answer that comes later, when all that led to it is gone.

Between the server and an endpoint stand some thirty calls of the framework, and each lives until
the answer is there: 25 kB for every client that waits. So an endpoint that holds its call returns
`Held`, which sends nothing. Everything down to `Holding` ends then, and that waits and answers.
"""

from collections.abc import Awaitable, Callable

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

HELD = "inpaint.held"
OUTER_WANTS = ("route",)
"""What layers farther out read of what the application notes in a request's scope."""


class Held(Response):
    """Stands for the response that `answer` will give. Raises: what `answer` raises, later."""

    def __init__(self, answer: Callable[[], Awaitable[Response]]) -> None:
        super().__init__()
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[HELD] = self._answer


class Holding:
    """ASGI middleware around the application itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A copy, because the application keeps much of its own in it.
        inner = {**scope}
        try:
            await self._app(inner, receive, send)
        finally:
            scope.update({name: inner[name] for name in OUTER_WANTS if name in inner})
        answer: Callable[[], Awaitable[Response]] | None = inner.get(HELD)
        del inner
        if answer is not None:
            response = await answer()
            await response(scope, receive, send)
