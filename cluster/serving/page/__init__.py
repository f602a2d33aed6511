"""The page at `/`: files that browsers get as they are. They tell nothing of the model; what the page
shows it asks the other routes for, as any client does."""

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

_ASSETS = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page/chat.js": ("chat.js", "text/javascript; charset=utf-8"),
    "/page/ring.js": ("ring.js", "text/javascript; charset=utf-8"),
    "/page/client.js": ("client.js", "text/javascript; charset=utf-8"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}

PATHS = frozenset(_ASSETS)

_HEADERS = {
    # Nothing from elsewhere, nothing inline, and no page around this one: an answer that a model writes
    # is shown as text, and could do nothing if it were not.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
        " require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class Page:
    """The files, read once."""

    def __init__(self) -> None:
        folder = files(__name__)
        self._files = {
            path: ((folder / name).read_bytes(), kind) for path, (name, kind) in _ASSETS.items()
        }

    async def asset(self, request: Request) -> Response:
        content, kind = self._files[request.url.path]
        return Response(content, media_type=kind, headers=_HEADERS)
