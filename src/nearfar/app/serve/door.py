"""HTTP on loopback, for one run: which requests are answered, and how.

Python's own server reads the requests. Every connection carries one, so that nothing that is left
of a refused request can be taken for the next.
"""

import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socket import SHUT_RD, SHUT_WR, socket
from socketserver import ThreadingTCPServer
from threading import BoundedSemaphore, Timer
from time import monotonic
from typing import Any

from nearfar.app.errors import InputError
from nearfar.app.serve.answers import MIB, Answers
from nearfar.app.serve.page import files
from nearfar.app.serve.refusal import Refusal
from nearfar.app.text import printable
from nearfar.plain import plain

LOOPBACK = "127.0.0.1"
CONNECTIONS = 16  # at once; more wait to be accepted
PATIENCE = 30.0  # seconds in which the head of a request must arrive, and its body
LINGER = 2.0  # seconds in which a client may finish sending what is no longer read
LONGEST = 600  # characters of an error

JSON = "application/json"
HEADERS = {
    "Cache-Control": "no-store",
    "Connection": "close",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_HOST = re.compile(rf"({re.escape(LOOPBACK)}|localhost)(:\d{{1,5}})?", re.IGNORECASE | re.ASCII)
_LENGTH = re.compile(r"\d{1,18}", re.ASCII)


class Door(ThreadingTCPServer):
    """A server on loopback; one thread for each connection."""

    # Elsewhere than on POSIX, this would let two processes listen on one port.
    allow_reuse_address = os.name == "posix"
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, answers: Answers, port: int) -> None:
        self.files = files(answers)
        self.answers = answers
        self.questions: dict[str, Callable[[Any], dict[str, Any]]] = {"/compare": answers.compare}
        if answers.searched is not None:
            self.questions["/search"] = partial(answers.search, answers.searched)
        self._free = BoundedSemaphore(CONNECTIONS)
        super().__init__((LOOPBACK, port), _Handler)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{LOOPBACK}:{self.server_address[1]}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Wait until few enough connections are open."""
        self._free.acquire()
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """As the base class does it, in a thread of its own."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def shutdown_request(self, request: Any) -> None:
        """Read on for a while: a connection closed with bytes unread is reset.

        The client might then not see the answer.
        """
        end = monotonic() + LINGER
        try:
            request.shutdown(SHUT_WR)
            request.settimeout(LINGER)
            while monotonic() < end and request.recv(MIB):
                pass
        except OSError:  # the client is gone, or silent
            pass
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that is gone."""
        if not isinstance(sys.exc_info()[1], OSError):
            traceback.print_exc()


class _Handler(BaseHTTPRequestHandler):
    server: Door
    connection: socket
    protocol_version = "HTTP/1.1"
    timeout = PATIENCE  # of one read or write

    def setup(self) -> None:
        super().setup()
        # The timeout would not end a head that comes byte by byte.
        self._patience = Timer(PATIENCE, self._stop_reading)
        self._patience.daemon = True
        self._patience.start()

    def finish(self) -> None:
        self._patience.cancel()
        super().finish()

    def _stop_reading(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(SHUT_RD)

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET  # noqa: N815 - names that the base class looks for

    def _answer(self) -> None:
        try:
            self._send(HTTPStatus.OK, *self._found())
        except Refusal as refusal:
            self._refuse(refusal.status, str(refusal), refusal.allow)
        except InputError as error:
            self._refuse(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
        except MemoryError:
            self._refuse(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                "memory ran out for this request. Make the images smaller.",
            )
        except OSError:
            raise  # the client is gone
        except Exception:
            traceback.print_exc()
            self._refuse(
                HTTPStatus.INTERNAL_SERVER_ERROR,
                "this is a bug in nearfar, not in what you sent: please report it, with what the "
                "terminal says.",
            )

    def _found(self) -> tuple[str, bytes]:
        """The type and the content of the answer."""
        self._patience.cancel()
        self._check_origin()
        path = self.path.partition("?")[0]
        is_question = path in self.server.questions
        if not is_question and path not in self.server.files:
            raise Refusal(
                HTTPStatus.NOT_FOUND,
                f"there is no such address. There are GET /, GET /about and POST "
                f"{' and POST '.join(self.server.questions)}.",
            )
        allowed = ("POST",) if is_question else ("GET", "HEAD")
        if self.command not in allowed:
            raise Refusal(
                HTTPStatus.METHOD_NOT_ALLOWED,
                f"{path} takes {' and '.join(allowed)}; got {self.command[:40]!r}.",
                ", ".join(allowed),
            )
        if not is_question:
            return self.server.files[path]
        body = _parsed(self._body())
        return JSON, _json(self.server.questions[path](body))

    def _check_origin(self) -> None:
        """Refuse what pages of other sites ask for.

        A page may point a name of its own at this address (DNS rebinding): then the name is in
        Host. Or it may post to this address: then its own is in Origin.
        """
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not _HOST.fullmatch(hosts[0].strip()):
            raise Refusal(
                HTTPStatus.FORBIDDEN,
                f"the header Host must name {LOOPBACK} or localhost, once; open {self.server.url}",
            )
        origin = self.headers.get("Origin")
        if origin is not None and origin.lower() != f"http://{hosts[0].strip().lower()}":
            raise Refusal(
                HTTPStatus.FORBIDDEN,
                f"pages of other sites are not answered; open {self.server.url}",
            )

    def _body(self) -> bytes:
        size, end = self._size(), monotonic() + PATIENCE
        content = bytearray()
        with suppress(TimeoutError):
            while len(content) < size and monotonic() < end:
                part = self.rfile.read1(min(size - len(content), MIB))
                if not part:
                    break
                content += part
        if len(content) < size:
            raise Refusal(
                HTTPStatus.REQUEST_TIMEOUT,
                f"the request broke off after {len(content):,} of {size:,} bytes; it must arrive "
                f"within {PATIENCE:g} seconds.",
            )
        return bytes(content)

    def _size(self) -> int:
        """The length of the body, checked with its type before any of it is read."""
        kinds = self.headers.get_all("Content-Type", [])
        kind, _, charset = (kinds[0] if len(kinds) == 1 else "").partition(";")
        charset = charset.strip().lower().replace('"', "")
        if kind.strip().lower() != JSON or charset not in ("", "charset=utf-8"):
            raise Refusal(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"send JSON in UTF-8, as Content-Type: {JSON}"
            )
        if "Content-Encoding" in self.headers:
            raise Refusal(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send the body as it is, not compressed."
            )
        lengths = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers or not lengths:
            raise Refusal(
                HTTPStatus.LENGTH_REQUIRED,
                "send the body in one piece, and its size in bytes as Content-Length.",
            )
        if len(lengths) != 1 or not _LENGTH.fullmatch(lengths[0].strip()):
            raise Refusal(
                HTTPStatus.BAD_REQUEST,
                "Content-Length must be one whole number, the size of the body in bytes.",
            )
        size, most = int(lengths[0]), self.server.answers.most_bytes
        if size > most:
            raise Refusal(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the body has {size:,} bytes, and at most {most:,} are read. Send less.",
            )
        return size

    def _refuse(self, status: HTTPStatus, message: str, allow: str = "") -> None:
        message = printable(" ".join(message.split()))
        if len(message) > LONGEST:  # it quotes what was sent
            message = f"{message[: LONGEST // 2]} ... {message[-LONGEST // 2 :]}"
        self._send(status, JSON, _json({"error": message}), {"Allow": allow} if allow else {})

    def _send(
        self, status: HTTPStatus, kind: str, content: bytes, more: dict[str, str] | None = None
    ) -> None:
        self.close_connection = True
        self.request_version = self.protocol_version  # or what is no request gets a bare body
        self.send_response(status)
        for name, value in {**HEADERS, **(more or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what the base class cannot read, in the form of the other errors."""
        status = HTTPStatus(code)
        if status == HTTPStatus.NOT_IMPLEMENTED:  # a method without a function here
            self._answer()
        else:
            self._refuse(status, f"this cannot be read as a request in HTTP/1.1: {status.phrase}.")

    def version_string(self) -> str:
        return "nearfar"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Keep no log: what is compared is nobody else's business."""


def open_door(answers: Answers, port: int) -> Door:
    """A server that listens; `serve_forever` answers.

    Args:
        answers: the answers of a run.
        port: 0 for any that is free.

    Raises:
        InputError: the port is taken or may not be used.
    """
    try:
        return Door(answers, port)
    except OSError as error:
        raise InputError(
            f"--port {port} cannot be used: {error.strerror}. Choose another, or 0 for any that is "
            "free."
        ) from None


def _json(value: Any) -> bytes:
    return json.dumps(plain(value), allow_nan=False).encode()


def _parsed(content: bytes) -> Any:
    """The value of a JSON text, strictly."""
    try:
        return json.loads(
            content.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant
        )
    except UnicodeDecodeError:
        problem = "it is not UTF-8"
    except RecursionError:
        problem = "it is nested too deeply"
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at character {error.pos + 1:,}"
    except ValueError as error:  # ours, or a number of thousands of digits
        problem = str(error) if isinstance(error, _Strict) else "a number in it is too long"
    raise Refusal(HTTPStatus.BAD_REQUEST, f"the body must be JSON: {problem}.")


class _Strict(ValueError):  # noqa: N818 - as json's own, it describes the text
    """What Python takes for JSON, and others do not."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Strict("a key occurs twice in an object")
    return found


def _no_constant(name: str) -> Any:
    raise _Strict(f"{name} is not a number in JSON")
