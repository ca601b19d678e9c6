"""HTTP requests to a running TorchServe, with the standard library alone."""

import http.client
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from src.serving.tls import client_context

LOOPBACK = {"127.0.0.1", "localhost", "::1"}
PAUSE = 0.2  # seconds before a request is sent again


class Refused(OSError):
    """The server answered, and said no; ``status`` is the HTTP status, the message holds what the server said."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def call(
    url: str,
    data: bytes | None = None,
    content_type: str = "",
    token: str = "",
    method: str | None = None,
    timeout: float = 10,
    headers: dict[str, str] | None = None,
) -> bytes:
    """GET ``url``, or POST ``data`` to it; return the body.

    Raises Refused when the answer is no 2xx, another OSError when there is none within ``timeout`` seconds.
    """
    known = {"Content-Type": content_type} if content_type else {}
    known |= {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, data=data, headers=known | (headers or {}), method=method)
    try:
        with opener_for(url).open(request, timeout=timeout) as answer:
            status, body = answer.status, answer.read()
    except urllib.error.URLError as error:
        raise ConnectionError(f"{request.get_method()} {url}: {error.reason}") from error
    except TimeoutError as error:
        raise TimeoutError(f"{request.get_method()} {url}: no answer within {timeout:g} s") from error
    except http.client.HTTPException as error:  # the connection ended within an answer
        raise ConnectionError(f"{request.get_method()} {url}: {error!r}") from error
    if not 200 <= status < 300:
        said = " ".join(body.decode(errors="replace").split())
        raise Refused(f"{request.get_method()} {url} answers {status}: {said}", status)
    return body


def opener_for(url: str) -> urllib.request.OpenerDirector:
    """What opens ``url``, and follows no redirect, which would make a GET of a POST.

    Not urllib's ``build_opener``: adding its handler for errors makes and catches a ValueError, which takes the place
    of what a signal's handler raises at that moment (CPython 3.11), and Ctrl-C would do nothing.
    """
    opener = urllib.request.OpenerDirector()
    local = urlsplit(url).hostname in LOOPBACK  # a proxy of http_proxy would ask itself
    opener.add_handler(urllib.request.ProxyHandler({} if local else None))
    opener.add_handler(urllib.request.HTTPHandler())
    if url.startswith("https:"):
        opener.add_handler(urllib.request.HTTPSHandler(context=client_context()))
    opener.add_handler(urllib.request.UnknownHandler())
    return opener


def send(url: str, data: bytes, content_type: str = "application/json", token: str = "", timeout: float = 30) -> bytes:
    """POST ``data``, and once more after a 5xx answer or a broken connection: a prediction may be asked for twice.

    That is enough for a worker that dies: TorchServe answers 5xx to its batch, and what comes then waits for the next
    worker. Raises as ``call`` does.
    """
    try:
        return call(url, data, content_type, token, timeout=timeout)
    except TimeoutError:
        raise
    except OSError as error:
        if isinstance(error, Refused) and error.status < 500:
            raise
    time.sleep(PAUSE)
    return call(url, data, content_type, token, timeout=timeout)
