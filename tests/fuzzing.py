"""Requests as no client should send them: hypothesis strategies over bodies, JSON, multipart, headers, image files."""

import http.client
import json
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import strategies as st

from tests.conftest import TIMEOUT
from tests.drawing import encode
from tests.sent_inputs import PICTURE, PNG, as_base64, bad_bodies, json_forms

FORM_TYPES = ("multipart/form-data", "application/x-www-form-urlencoded")
# Real files, large enough that most changes hit the pixels and not the header.
POOLS = {
    "files": [encode(PICTURE.resize((96, 80)), kind) for kind in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP")] + [PNG],
    "bodies": [body for body, _, _ in bad_bodies().values() if len(body) < 50_000] + [*json_forms().values()],
}
PART_HEADERS = (
    *("", "Content-Type: image/png\r\n", "Content-Transfer-Encoding: base64\r\n", "X\r\n", "Content-Length: 3\r\n"),
    *("Content-Type: a/b; charset=no\r\n", "Content-Type: multipart/mixed\r\n", "\xff: \xff\r\n"),
)


@dataclass(frozen=True)
class Sent:
    """One request to the model."""

    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    method: str = "POST"


def whole(pool: str) -> st.SearchStrategy[bytes]:
    """One of the bodies of POOLS[pool]; named, because hypothesis writes out what it is given."""
    return st.integers(0, len(POOLS[pool]) - 1).map(lambda index: POOLS[pool][index])


@st.composite
def mutated(draw, pool: str) -> bytes:
    """One of the bodies of POOLS[pool] with some bytes changed, cut, repeated or put in."""
    data = bytearray(draw(whole(pool)))
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.integers(1, 64))
        match draw(st.sampled_from(("flip", "write", "cut", "repeat", "insert", "truncate"))):
            case "flip" if data:
                data[start] ^= 1 << draw(st.integers(0, 7))
            case "write":
                data[start : start + 4] = draw(st.sampled_from((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff")))
            case "cut":
                del data[start : start + length]
            case "repeat":
                data[start:start] = data[start : start + length]
            case "insert":
                data[start:start] = draw(st.binary(max_size=32))
            case _:
                del data[start:]
    return bytes(data)


def json_bodies() -> st.SearchStrategy[bytes]:
    """JSON of the right and of any other shape, around whole and damaged images."""
    image = st.one_of(mutated("files"), whole("files")).map(as_base64)
    leaf = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), image)
    names = st.one_of(st.sampled_from(("image", "images")), st.text(max_size=8))
    value = st.recursive(
        leaf, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=8
    )
    shaped = st.one_of(
        st.fixed_dictionaries({"image": image}),
        st.fixed_dictionaries({"images": st.lists(st.one_of(image, leaf), max_size=5)}),
        value,
    )
    return shaped.map(lambda content: json.dumps(content).encode())


@st.composite
def multipart(draw) -> Sent:
    """A form whose boundary, part headers and ends are at times wrong."""
    boundary = draw(st.sampled_from(("xx", "x" * 70, "a b", "--", "x;y")))
    lines = []
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(("data", "image", "", "a" * 300, 'q"', "\\", "%00", "body")))
        named = f'form-data; name="{name}"'
        disposition = draw(st.sampled_from((named, f'{named}; filename="x.png"', "form-data", f"x; name={name}")))
        more = draw(st.sampled_from(PART_HEADERS))
        lines.append(f"--{boundary}\r\nContent-Disposition: {disposition}\r\n{more}\r\n".encode())
        lines.append(draw(st.one_of(whole("files"), whole("bodies"), mutated("files"), json_bodies())) + b"\r\n")
    body = b"".join(lines) + draw(st.sampled_from((f"--{boundary}--\r\n".encode(), b"", b"--", b"\r\n")))
    said = draw(st.sampled_from((boundary, f'"{boundary}"', "other", "")))
    return Sent(body, {"Content-Type": f"multipart/form-data; boundary={said}"})


def odd_headers() -> st.SearchStrategy[dict[str, str]]:
    """Headers that TorchServe or the handler read, and others; none that changes where the request ends."""
    visible = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40)
    kinds = ("application/json", "image/png", "text/plain", ";", "application/json; charset=utf-16", *FORM_TYPES)
    return st.fixed_dictionaries(
        {},
        optional={
            "Content-Type": st.one_of(st.sampled_from(kinds), visible),
            "describe": st.sampled_from(("True", "False", "")),
            "hold-until": st.sampled_from(("1e999", "nan", "99999999999", "x", "-1")),
            "refuse": st.sampled_from(("True", "x")),
            "Accept": visible,
            "Authorization": visible,
            "x-request-id": visible,
            "ts_request_sequence_id": visible,
            "X-Any": visible,
        },
    )


def requests_as_nobody_should_send_them() -> st.SearchStrategy[Sent]:
    """All of the above."""
    bodies = st.one_of(mutated("files"), mutated("bodies"), json_bodies())
    plain = st.builds(Sent, bodies, odd_headers(), st.sampled_from(("POST", "PUT")))
    return st.one_of(plain, plain, multipart())


class Sender:
    """Sends to one model over one connection and counts the answers by status."""

    def __init__(self, host: str):
        self.connection, self.seen = http.client.HTTPConnection(host, timeout=TIMEOUT), Counter()

    def send(self, sent: Sent) -> tuple[int, dict]:
        """``(status, answer)``. A connection that the server closed after its last answer is made again."""
        path = "/predictions/fashion_mnist"
        try:
            self.connection.request(sent.method, path, sent.body, sent.headers)
            response = self.connection.getresponse()
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            self.connection.close()
            self.connection.request(sent.method, path, sent.body, sent.headers)
            response = self.connection.getresponse()
        content = response.read()
        answer = json.loads(content) if content else {}
        status = response.status
        self.seen[status] += 1
        return status, answer
