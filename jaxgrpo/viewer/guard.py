"""Who may see the pages: requests to another host's name, from another site or without the token
are refused."""

import hmac
import ipaddress
from collections.abc import Sequence
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    "content-security-policy": "default-src 'self'; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
COOKIE = "jaxgrpo_viewer"


class Guard:
    """Stands before the application. `hosts` are the names by which it may be asked for (a port
    may follow them); empty: any name, as when it listens to all addresses. `token` must come in
    the address once, then in a cookie; empty: none is needed."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str], token: str = ""):
        self.app, self.hosts, self.token = app, {host.lower() for host in hosts}, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *ours]
            await send(message)

        answer = self._refusal(scope) or self.app
        await answer(scope, receive, guarded)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.hosts and host_name(host) not in self.hosts:
            return PlainTextResponse(
                "This address is not the viewer's; open the one that it printed.", 403
            )
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return PlainTextResponse("Requests from other sites are refused.", 403)
        if (
            headers.get("sec-fetch-site") == "cross-site"
            and headers.get("sec-fetch-mode") != "navigate"
        ):
            return PlainTextResponse("Requests from other sites are refused.", 403)
        if scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("The viewer only shows.", 405)
        return self._without_token(scope, headers) if self.token else None

    def _without_token(self, scope: Scope, headers: Headers) -> ASGIApp | None:
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = dict(query).get("token", "")
        if hmac.compare_digest(given.encode("utf-8", "replace"), self.token.encode()):
            rest = urlencode([(key, value) for key, value in query if key != "token"])
            path = "/" + scope.get("raw_path", b"/").decode("latin-1").split("?")[0].lstrip("/")
            answer = RedirectResponse(f"{path}?{rest}" if rest else path)
            answer.set_cookie(COOKIE, self.token, httponly=True, samesite="strict")
            return answer
        if hmac.compare_digest(
            _cookie(headers.get("cookie", "")).encode("utf-8", "replace"), self.token.encode()
        ):
            return None
        return PlainTextResponse(
            "The token is missing; open the address that the viewer printed.", 403
        )


def _cookie(header: str) -> str:
    try:
        found = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""


def host_name(header: str) -> str:
    """The name of a Host header, without its port: `[::1]:80` is `::1`."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
