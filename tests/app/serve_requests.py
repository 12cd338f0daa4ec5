"""A door to knock on, and requests that cannot be answered: what is sent, and what comes back."""

import json
import struct
import threading
import zlib
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from image_files import chunk, png16
from PIL import Image

from nearfar.app.serve import Answers, Door, open_door

RIGHT = {"a": {"vector": [1, 2, 3, 4, 5, 6, 7, 8]}, "b": {"vector": "1 2 3 4 5 6 7 9"}}


@contextmanager
def opened(answers: Answers) -> Iterator[Door]:
    """A server in a thread, while the block runs."""
    with open_door(answers, 0) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield found
        finally:
            found.shutdown()
            thread.join()


@dataclass(frozen=True)
class Wrong:
    """A wrong request, and how it must be answered."""

    name: str
    sent: bytes
    status: int
    says: str


def request(
    method: str = "POST", path: str = "/compare", body: bytes = b"", **headers: str | None
) -> bytes:
    """A request as bytes; a header of None is left out."""
    given = {
        "Host": "127.0.0.1",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    lines = [f"{name}: {value}" for name, value in given.items() if value is not None]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode("latin-1") + body


def posted(value, **headers) -> bytes:
    return request(body=json.dumps(value).encode(), **headers)


def image(content: bytes) -> dict:
    return {"image": b64encode(content).decode()}


def png(width: int = 8, height: int = 8) -> bytes:
    file = BytesIO()
    Image.new("L", (width, height), 90).save(file, "PNG")
    return file.getvalue()


def _lines() -> list[Wrong]:
    """What is no request, or is one of an older or a newer HTTP."""
    host = b"Host: 127.0.0.1\r\n\r\n"
    many = b"".join(b"X-%d: 1\r\n" % i for i in range(200))
    return [
        Wrong("one word", b"GET\r\n\r\n", 400, "HTTP/1.1"),
        Wrong("four words", b"GET / / HTTP/1.1\r\n" + host, 400, "HTTP/1.1"),
        Wrong("no version", b"GET / HTTP\r\n" + host, 400, "HTTP/1.1"),
        Wrong("a version of letters", b"GET / HTTP/x.y\r\n" + host, 400, "HTTP/1.1"),
        Wrong("a long version", b"GET / HTTP/11111111111.1\r\n" + host, 400, "HTTP/1.1"),
        Wrong("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "HTTP/1.1"),
        Wrong("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "HTTP/1.1"),
        Wrong("zeros", bytes(64) + b"\r\n\r\n", 400, "HTTP/1.1"),
        Wrong("a long line", b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n" + host, 414, "HTTP/1.1"),
        Wrong("many headers", b"GET / HTTP/1.1\r\n" + many + host, 431, "HTTP/1.1"),
        Wrong(
            "a long header", b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n" + host, 431, "HTTP"
        ),
        Wrong("no headers", b"GET / HTTP/1.1\r\n\r\n", 403, "Host"),
        Wrong("HTTP/1.0 without a host", b"GET / HTTP/1.0\r\n\r\n", 403, "Host"),
        Wrong("two hosts", b"GET / HTTP/1.1\r\nHost: localhost\r\n" + host, 403, "Host"),
    ]


def _methods() -> list[Wrong]:
    others = ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW", "get", "G" * 99)
    found = [
        Wrong(f"{method[:9]} {path}", request(method, path), 405, says)
        for path, says in (("/", "GET and HEAD"), ("/compare", "POST"))
        for method in others
    ]
    found += [Wrong(f"POST {path}", request(path=path), 405, "GET") for path in ("/", "/about")]
    return [*found, Wrong("GET /compare", request("GET", "/compare"), 405, "takes POST")]


def _addresses() -> list[Wrong]:
    paths = (
        *("/nothing", "/./", "/compare/", "/About", "/index.html", "*", "compare", "/%63ompare"),
        *("/../../etc/passwd", "/%2e%2e/etc/passwd", "/..%5c..%5cwindows", "/style.css/..", "/\0"),
        *("/templates/serve.html", "/config.toml", "/threshold.json", "/model.safetensors", "/~"),
        *("http://127.0.0.1/about", "http://evil.example/", "file:///etc/passwd", "/compare;x=1"),
        *("/search", "/caf\xe9", "/" + "a" * 3000),
    )
    return [
        Wrong(f"{method} address {i}", request(method, path), 404, "There are GET /")
        for method in ("GET", "POST")
        for i, path in enumerate(paths)
    ]


def _strangers() -> list[Wrong]:
    """Pages of other sites."""
    hosts = (
        *("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example"),
        *("", "0.0.0.0", "127.0.0.2", "[::1]", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:123456"),
        *(
            "127.0.0.1@evil.example",
            "localhost, evil.example",
            "2130706433",
            "127.1",
            "192.168.0.1",
        ),
        "localhost:\xb2",
    )
    origins = (
        *("http://evil.example", "null", "", "https://127.0.0.1", "http://127.0.0.1:9999"),
        *("http://localhost", "http://127.0.0.1.evil.example", "http://127.0.0.1/", "file://"),
    )
    return [
        *(
            Wrong(f"host {i}", posted(RIGHT, Host=host), 403, "Host")
            for i, host in enumerate(hosts)
        ),
        *(
            Wrong(f"origin {i}", posted(RIGHT, Origin=origin), 403, "other sites")
            for i, origin in enumerate(origins)
        ),
    ]


def _wrappings() -> list[Wrong]:
    """Types and lengths of a body."""
    kinds = (
        *(None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"),
        *("application/jsonx", "application/json; charset=utf-16", "application/json, text/html"),
        "image/png",
    )
    lengths = ("-1", "+5", "1e3", "0x10", "5, 5", "", "five", "\xb2", "1.0", "9" * 30)
    return [
        *(
            Wrong(f"type {i}", posted(RIGHT, Content_Type=kind), 415, "application/json")
            for i, kind in enumerate(kinds)
        ),
        *(
            Wrong(f"compressed by {how}", posted(RIGHT, Content_Encoding=how), 415, "compressed")
            for how in ("gzip", "br", "identity")
        ),
        *(
            Wrong(f"length {i}", posted(RIGHT, Content_Length=length), 400, "Content-Length")
            for i, length in enumerate(lengths)
        ),
        *(
            Wrong(f"too long: {n}", posted(RIGHT, Content_Length=str(n)), 413, "at most 1,048,576")
            for n in (2**20 + 1, 10**12)
        ),
        Wrong("no length", posted(RIGHT, Content_Length=None), 411, "Content-Length"),
        Wrong("chunked", posted(RIGHT, Transfer_Encoding="chunked"), 411, "in one piece"),
        Wrong("two lengths", posted(RIGHT, CONTENT_LENGTH="5"), 400, "Content-Length"),
        Wrong("two types", posted(RIGHT, CONTENT_TYPE="text/plain"), 415, "application/json"),
    ]


def _texts() -> list[Wrong]:
    """Bodies that are not JSON."""
    bodies = {
        "empty": b"",
        "not JSON": b"{",
        "a form": b"a=1&b=2",
        "two values": b"{} {}",
        "NaN": b'{"a": NaN}',
        "infinity": b'{"a": -Infinity}',
        "a key twice": b'{"a": 1, "a": 2, "b": 3}',
        "single quotes": b"{'a': 1}",
        "a comment": b'{"a": 1 /* one */}',
        "a last comma": b'{"a": 1,}',
        "a control character": b'{"a": "\n"}',
        "half an escape": b'{"a": "\\u12"}',
        "Latin-1": '{"a": "caf\xe9"}'.encode("latin-1"),
        "UTF-16": '{"a": 1}'.encode("utf-16"),
        "a byte order mark": b"\xef\xbb\xbf{}",
        "deep lists": b"[" * 100_000,
        "deep objects": b'{"a":' * 100_000,
        "a long number": b'{"a": ' + b"9" * 5000 + b"}",
        "a zero byte": b"{}\0",
        "an image": png(),
    }
    return [
        Wrong(f"body: {name}", request(body=body), 400, "must be JSON")
        for name, body in bodies.items()
    ]


def _shapes() -> list[Wrong]:
    """JSON that is no question."""
    values = {
        **{f"the value {i}": value for i, value in enumerate((None, True, 1, 1.5, "a", [], {}))},
        "a list of both": [RIGHT["a"], RIGHT["b"]],
        "only a": {"a": RIGHT["a"]},
        "a third": {**RIGHT, "c": RIGHT["a"]},
        "another case": {"A": RIGHT["a"], "B": RIGHT["b"]},
        "a path beside": {**RIGHT, "path": "/etc/passwd"},
        "half of a letter": {**RIGHT, "\ud800": 1},
        "many keys": {str(i): i for i in range(1000)},
        "a long key": {"k" * 10_000: 1},
    }
    return [
        Wrong(f"question: {name}", posted(value), 422, "an object with 'a' and 'b'")
        for name, value in values.items()
    ]


def _priors() -> list[Wrong]:
    values = (True, "0.5", [], {}, 0, 1, -0.1, 1.5, 1e-13, 1 - 1e-13, 10**400)
    return [
        Wrong(f"prior {i}", posted({**RIGHT, "prior": value}), 422, "prior must be")
        for i, value in enumerate(values)
    ] + [
        Wrong(
            "prior beyond float",
            request(body=json.dumps(RIGHT)[:-1].encode() + b',"prior":1e999}'),
            422,
            "prior must be",
        )
    ]


def _items() -> list[Wrong]:
    """Things that are no item."""
    values = (
        *(None, True, 0, "", "1 2 3", "/etc/passwd", [], [1, 2], {}, {"Vector": [1]}),
        *({"path": "/etc/passwd"}, {"file": "a.png"}, {"url": "http://127.0.0.1/"}),
        *({"vector": [1] * 8, "image": ""}, {"address": "glyphs:0"}, {"text": "a"}, image(png())),
    )
    return [
        Wrong(f"{which} is {i}", posted({**RIGHT, which: value}), 422, f"{which} must be the item")
        for which in ("a", "b")
        for i, value in enumerate(values)
    ]


def _vectors() -> list[Wrong]:
    eight = [1.0] * 8
    values = {
        "null": (None, "a list of 8 numbers"),
        "true": (True, "a list of 8 numbers"),
        "a number": (8, "a list of 8 numbers"),
        "an object": ({}, "a list of 8 numbers"),
        "empty": ([], "not a vector"),
        "too short": (eight[1:], "got 7 numbers"),
        "too long": ([*eight, 1], "got 9 numbers"),
        "much too long": ([0] * 100_000, "got 100000 numbers"),
        "of text": (["1"] * 8, "holds text"),
        "with null": ([*eight[1:], None], "holds null"),
        "with true": ([*eight[1:], True], "holds true"),
        "of lists": ([eight], "holds a list"),
        "too large": ([*eight[1:], 1e39], "beyond float32"),
        "too small": ([*eight[1:], -1e300], "beyond float32"),
        "a huge whole number": ([*eight[1:], 10**400], "beyond float32"),
        "empty text": ("", "not a vector"),
        "text too short": ("1 2", "got 2 numbers"),
        "words": ("one two", "'one'"),
        "a path": ("/etc/passwd", "not a number"),
        "rows": ("1 2 3 4; 5 6 7 8", "got 2 x 4 numbers"),
        "ragged rows": ("1 2 3; 4", "not a vector"),
        "NaN": ("1 2 3 4 5 6 7 nan", "nan"),
        "infinity": ("1 2 3 4 5 6 7 inf", "inf"),
        "commas": ("0,5 0,25 0,5 0,25 0,5 0,25 0,5", "two ways"),
        "a long word": ("x" * 500_000, "not a number"),
        "half of a letter": ("\ud800", "not a number"),
    }
    return [
        Wrong(f"vector: {name}", posted({**RIGHT, "a": {"vector": value}}), 422, says)
        for name, (value, says) in values.items()
    ]


def of_vectors() -> list[Wrong]:
    """Wrong requests to a run of vectors with 8 numbers."""
    parts = (_lines, _methods, _addresses, _strangers, _wrappings, _texts, _shapes, _priors)
    return [wrong for part in (*parts, _items, _vectors) for wrong in part()]


def _bomb(width: int, height: int) -> bytes:
    """A small PNG that claims to be large."""
    header = struct.pack(">LLBBBBB", width, height, 1, 0, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def of_images() -> list[Wrong]:
    """Wrong requests to a run of images."""
    right = image(png())
    text = b64encode(png()).decode()
    whole = png16(np.zeros((4, 4, 3), np.uint16), 2)
    holds_nan = BytesIO()
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(holds_nan, "TIFF")
    drawing = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    values = {
        "null": (None, "as base64; got null"),
        "a list": ([1, 2], "as base64; got a list"),
        "no base64": ("?!", "as base64"),
        "of a URL": ("-_-_", "as base64"),
        "letters beyond ASCII": ("\xe4\xe4\xe4\xe4", "as base64"),
        "half of a letter": ("\ud800", "as base64"),
        "badly padded": (text.rstrip("=") + "A" * (1 + text.count("=")), "as base64"),
        "with spaces": (f" {text}", "as base64"),
        "a data URL": (f"data:image/png;base64,{text}", 'follows "base64,"'),
        "a path": ("/etc/passwd", "as base64"),
        "empty": (b"", "it is empty"),
        "zeros": (bytes(100), "only zeros"),
        "text": (b"hello", "not an image"),
        "a page": (b"<html></html>", "a web page"),
        "a drawing": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        "a document": (b"%PDF-1.7\n", "a document"),
        "PostScript": (drawing, "not an image"),
        "cut off": (png(64, 64)[:-30], "cannot be read"),
        "a header": (png()[:20], "cannot be read"),
        "damaged": (whole.replace(b"IDAT", b"IDAT\xff\xff\xff\xff"), "cannot be read"),
        "too many pixels": (_bomb(60_000, 60_000), "million pixels"),
        "no pixels": (_bomb(0, 5), "cannot be read"),
        "NaN": (holds_nan.getvalue(), "not finite"),
    }
    return [
        Wrong(
            f"image: {name}",
            posted(
                {"a": right, "b": image(value) if isinstance(value, bytes) else {"image": value}}
            ),
            422,
            says,
        )
        for name, (value, says) in values.items()
    ] + [
        Wrong("image: as a vector", posted({"a": right, "b": {"vector": [1]}}), 422, "base64"),
        Wrong(
            "image: too long", posted({}, Content_Length=str(2**25 + 1)), 413, "at most 33,554,432"
        ),
    ]


QUERY = {"query": RIGHT["a"]}


def of_searches() -> list[Wrong]:
    """Wrong requests to a run of vectors with a gallery."""

    def asked(value) -> bytes:
        return request(path="/search", body=json.dumps(value).encode())

    shapes = (None, [], {}, RIGHT, {**QUERY, "gallery": "/etc"}, {"queries": [RIGHT["a"]]})
    items = (None, "1 2", {"path": "a"}, {"vector": [1], "k": 1}, [RIGHT["a"]])
    counts = (None, 0, -1, 101, 10**400, 1.0, "5", True, [5])
    return [
        *(
            Wrong(f"search {i}", asked(value), 422, "an object with 'query'")
            for i, value in enumerate(shapes)
        ),
        *(
            Wrong(f"query {i}", asked({"query": value}), 422, "query must be the item")
            for i, value in enumerate(items)
        ),
        *(
            Wrong(f"k {i}", asked({**QUERY, "k": k}), 422, "k must be a whole number")
            for i, k in enumerate(counts)
        ),
        *(
            Wrong(
                f"prior of a search: {prior}", asked({**QUERY, "prior": prior}), 422, "prior must"
            )
            for prior in (0, 1, "often")
        ),
        Wrong("GET a search", request("GET", "/search"), 405, "/search takes POST"),
        Wrong("no such address", request(path="/searches"), 404, "POST /compare and POST /search"),
    ]


def of_texts() -> list[Wrong]:
    """Wrong requests to a run of texts."""
    values = {
        "empty": ("", "it must be a text"),
        "blank": (" \n", "it must be a text"),
        "null": (None, "got null"),
        "a number": (1, "got a number"),
        "a list": (["a"], "got a list"),
        "half of a letter": ("a\ud800", "not valid text"),
    }
    return [
        *(
            Wrong(f"text: {name}", posted({"a": {"text": "a"}, "b": {"text": value}}), 422, says)
            for name, (value, says) in values.items()
        ),
        Wrong("text: a path", posted({"a": {"path": "a"}, "b": {"text": "b"}}), 422, '{"text"'),
        Wrong("text: a vector", posted({**RIGHT}), 422, '{"text"'),
    ]
