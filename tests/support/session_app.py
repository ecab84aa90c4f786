"""An application whose users log in with a cookie, and its relay, which asks the application who they are."""

import httpx2 as httpx
from fastapi import FastAPI, Request
from starlette.middleware.sessions import SessionMiddleware

from relay import Relay, UpgradeRequest
from tests.support.keys import SECRET
from tests.support.serving import Served


def session_app() -> tuple[FastAPI, Relay]:
    """The application, with the relay at ``/relay``: each user may join ``user:<name>``."""
    app = FastAPI()
    app.add_middleware(SessionMiddleware, secret_key=SECRET)

    @app.post("/login/{name}")
    async def login(request: Request, name: str) -> None:
        request.session["user"] = name

    async def authenticate(request: UpgradeRequest) -> dict[str, str] | None:
        name = request.session.get("user")
        return {"sub": name} if name else None

    relay = Relay(
        broadcast_url="memory://",
        system_topic=False,
        authenticate=authenticate,
        auth={"authenticated": [{"match": "user:{sub}", "rights": ["join"]}]},
    )
    relay.install(app, path="/relay")
    return app, relay


async def log_in(served: Served, name: str) -> dict[str, str]:
    """The header by which a browser is known as a user from now on."""
    async with httpx.AsyncClient(trust_env=False) as browser:
        _ = await browser.post(f"{served.http.removesuffix('/relay')}/login/{name}")
        return {"Cookie": "; ".join(f"{name}={value}" for name, value in browser.cookies.items())}
