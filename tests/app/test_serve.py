"""`nearfar serve`: what is answered, what is refused, and that nothing is written."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from base64 import encodebytes
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import serve_requests as wrong
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from serve_requests import RIGHT, image, opened, png, posted, request

from nearfar.app.data.fit import Fit
from nearfar.app.data.pixels import read_picture
from nearfar.app.data.reads import Reads
from nearfar.app.data.upload import Upload
from nearfar.app.errors import InputError
from nearfar.app.gallery.answers import searchable
from nearfar.app.serve import Answers, Door, door
from nearfar.app.serve.items import item_from
from nearfar.app.train.encoders.embedder import Embedder
from nearfar.app.train.run import read_run

OPENED: list[str] = []  # for writing, while WATCHED holds True
WATCHED = [False]
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def _watch(event: str, arguments: tuple) -> None:
    if not WATCHED[0] or threading.current_thread() is threading.main_thread():  # pytest's
        return
    writes = event == "open" and (arguments[2] or 0) & WRITING
    starts = event in ("os.mkdir", "os.rename", "os.remove", "subprocess.Popen", "os.system")
    connects = event in ("socket.getaddrinfo", "urllib.Request")
    if writes or starts or connects:
        OPENED.append(f"{event} {arguments[0]}")


sys.addaudithook(_watch)  # never to be removed, so it can be switched off


@pytest.fixture
def nothing_written(capfd):
    """Nothing is written, started or fetched, and nothing is printed, such as a traceback."""
    OPENED.clear()
    WATCHED[0] = True
    yield
    WATCHED[0] = False
    assert OPENED == []
    said = capfd.readouterr()
    assert said.out + said.err == ""


@pytest.fixture(scope="module")
def vectors_door(vector_run) -> Iterator[Door]:
    with opened(Answers(read_run(vector_run))) as found:
        yield found


@pytest.fixture(scope="module")
def images_door(image_run) -> Iterator[Door]:
    with opened(Answers(read_run(image_run))) as found:
        yield found


@pytest.fixture(scope="module")
def searched_door(vector_run, vector_gallery) -> Iterator[Door]:
    run = read_run(vector_run)
    with opened(Answers(run, searchable(run, vector_gallery, None))) as found:
        yield found


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)


def connected(to: Door) -> socket.socket:
    made = socket.create_connection(to.server_address, timeout=20)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def received(client: socket.socket, got: bytes = b"") -> Answer:
    """All that comes until the server has no more to say, after what has come already."""
    while part := client.recv(65536):
        got += part
    head, _, body = got.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return Answer(int(first.split()[1]), headers, body)


def ask(to: Door, sent: bytes) -> Answer:
    with connected(to) as client:
        client.sendall(sent)
        return received(client)


def refused(answer: Answer, status: int, says: str) -> None:
    assert answer.status == status, answer.body
    assert list(answer.json) == ["error"]
    error = answer.json["error"]
    assert says in error
    assert error.isprintable()
    assert len(error) < 700
    assert "Traceback" not in error
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Content-Length"] == str(len(answer.body))


def verified(nearfar, *arguments) -> dict:
    done = nearfar("verify", *arguments, "--json")
    assert done.status in (0, 1), done.err
    return json.loads(done.out)


def without_words(answer: Answer) -> dict:
    assert answer.status == 200, answer.body
    return {name: value for name, value in answer.json.items() if name != "said"}


# What is answered.


@pytest.mark.parametrize("prior", [None, 0.01])
def test_vectors_are_compared_as_verify_does(nearfar, vectors_door, vector_run, prior):
    a, b = "-0.5 0.2 1 1 1 1 1 1", "0.5 0.2 1 1 1 1 1 1"
    options = [] if prior is None else ["--prior", prior]
    expected = verified(nearfar, vector_run, a, b, *options)
    numbers = [float(word) for word in a.split()]
    for first in (a, numbers):
        asked = {"a": {"vector": first}, "b": {"vector": b}, "prior": prior}
        answer = ask(vectors_door, posted(asked))
        assert without_words(answer) == expected
    assert answer.json["said"] == nearfar("verify", vector_run, a, b, *options).out.splitlines()


def test_images_are_compared_as_verify_does(nearfar, images_door, image_run, folder):
    files = sorted(folder.rglob("*.*g"))[:6]
    for a, b in pairwise(files):
        asked = {
            "a": image(a.read_bytes()),
            "b": {"image": encodebytes(b.read_bytes()).decode()},  # in lines
        }
        expected = verified(nearfar, image_run, a, b)
        assert without_words(ask(images_door, posted(asked))) == expected


@pytest.mark.parametrize(("k", "prior"), [(None, None), (2, 0.3)])
def test_a_gallery_is_searched_as_search_does(
    nearfar, searched_door, vector_run, vector_gallery, vectors, k, prior
):
    options = [*([] if k is None else ["--k", k]), *([] if prior is None else ["--prior", prior])]
    for query in (np.load(vectors)["x"][9].tolist(), [-9.0, 9, -9, 9, 9, -9, 0, 0]):
        text = " ".join(map(repr, query))
        done = nearfar("search", vector_run, vector_gallery, text, *options, "--json")
        (expected,) = json.loads(done.out)["answers"]
        del expected["query"]
        asked = {"query": {"vector": query}, "prior": prior, **({} if k is None else {"k": k})}
        found = ask(searched_door, request(path="/search", body=json.dumps(asked).encode())).json
        assert {name: found[name] for name in expected} == expected
        assert len(found["candidates"]) == (k or 5)
        assert found["said"].startswith(found["found"] or "nobody known")
        assert found["threshold"] == json.loads(done.out)["open_set"]["threshold"]


def test_about_says_what_is_in_the_gallery(searched_door, vectors_door, vector_gallery):
    held = ask(searched_door, request("GET", "/about")).json["gallery"]
    assert (held["name"], held["n_identities"], held["rows"]) == ("vectors.gallery", 40, 320)
    assert str(vector_gallery.parent) not in json.dumps(held)
    assert b"Who is it?" in ask(searched_door, request("GET", "/")).body
    assert ask(vectors_door, request("GET", "/about")).json["gallery"] is None
    assert b"Who is it?" not in ask(vectors_door, request("GET", "/")).body


def test_about_says_what_the_run_the_run_is(vectors_door, vector_run):
    about = ask(vectors_door, request("GET", "/about")).json
    run = read_run(vector_run)
    assert about["run"] == "vectors"
    assert str(vector_run.parent) not in json.dumps(about)
    assert (about["items"], about["shape"]) == ("vector", [8])
    assert (about["threshold"], about["far"]) == (run.thresholds.learned, run.thresholds.far)
    assert about["test"]["eer"] == run.summary["test"]["learned"]["eer"]


def test_the_page_and_its_parts_are_shown(vectors_door):
    kinds = {"/": "text/html", "/style.css": "text/css", "/page.js": "text/javascript"}
    for path, kind in {**kinds, "/about": "application/json", "/?a=1": "text/html"}.items():
        answer = ask(vectors_door, request("GET", path, Content_Length=None))
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith(kind)
        head = ask(vectors_door, request("HEAD", path, Content_Length=None))
        assert head.body == b""
        assert {**head.headers, "Date": ""} == {**answer.headers, "Date": ""}


def test_every_answer_has_the_headers_that_protect(vectors_door):
    for sent in (request("GET", "/"), posted(RIGHT), posted({}), b"x\r\n\r\n"):
        headers = ask(vectors_door, sent).headers
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["Cache-Control"] == "no-store"
        assert headers["Server"] == "nearfar"
        assert not [name for name in headers if name.startswith("Access-Control")]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST:9000", "127.0.0.1:80"])
def test_the_own_page_may_ask(vectors_door, host):
    """Also through a forwarded port."""
    sent = posted(RIGHT, Host=host, Origin=f"http://{host.lower()}")
    assert ask(vectors_door, sent).status == 200
    assert ask(vectors_door, posted(RIGHT, Host=host)).status == 200


def test_only_loopback_is_listened_to(vectors_door):
    assert vectors_door.server_address[0] == "127.0.0.1"
    assert vectors_door.url == f"http://127.0.0.1:{vectors_door.server_address[1]}/"


# What is refused.

OF_VECTORS, OF_IMAGES = wrong.of_vectors(), wrong.of_images()
OF_SEARCHES = wrong.of_searches()


def test_there_are_200_wrong_requests():
    assert len(OF_VECTORS) + len(OF_IMAGES) >= 200
    assert len({one.sent for one in (*OF_VECTORS, *OF_IMAGES)}) == len(OF_VECTORS + OF_IMAGES)


@pytest.mark.parametrize("one", OF_VECTORS, ids=lambda one: one.name)
def test_a_wrong_request_is_told_what_is_wrong(vectors_door, nothing_written, one):
    refused(ask(vectors_door, one.sent), one.status, one.says)


@pytest.mark.parametrize("one", OF_IMAGES, ids=lambda one: one.name)
def test_a_wrong_image_is_told_what_is_wrong(images_door, nothing_written, one):
    refused(ask(images_door, one.sent), one.status, one.says)


@pytest.mark.parametrize("one", OF_SEARCHES, ids=lambda one: one.name)
def test_a_wrong_search_is_told_what_is_wrong(searched_door, nothing_written, one):
    refused(ask(searched_door, one.sent), one.status, one.says)


def test_after_all_that_right_requests_are_answered(vectors_door, images_door):
    assert ask(vectors_door, posted(RIGHT)).status == 200
    assert ask(images_door, posted({"a": image(png()), "b": image(png())})).status == 200


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(["a", "b", "prior", "vector", "image", "text", "path"])
NEAR = st.recursive(ANY, lambda inner: st.dictionaries(KEYS, inner, max_size=4), max_leaves=12)
MANY = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@MANY
@given(body=NEAR.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=300))
def test_any_body_gets_an_answer(vectors_door, nothing_written, body):
    answer = ask(vectors_door, request(body=body))
    refused(answer, 400 if b"must be JSON" in answer.body else 422, "must")


@MANY
@given(content=st.binary(max_size=300), cut=st.integers(0, 60))
def test_any_bytes_for_an_image_get_an_answer(images_door, nothing_written, content, cut):
    sent = {"a": image(png()), "b": image(png()[:cut] + content)}
    answer = ask(images_door, posted(sent))
    if answer.status != 200:  # Pillow forgives some damage
        refused(answer, 422, "image b")


@MANY
@given(sent=st.binary(max_size=300))
def test_any_bytes_for_a_request_get_an_answer_or_none(vectors_door, nothing_written, sent):
    with connected(vectors_door) as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        if first := client.recv(1):
            answer = received(client, first)
            refused(answer, answer.status, "")
            assert 400 <= answer.status < 500 or answer.status == 505


def test_a_request_that_breaks_off_is_told_so(vectors_door, nothing_written):
    whole = posted(RIGHT)
    with connected(vectors_door) as client:
        client.sendall(whole[:-10])
        client.shutdown(socket.SHUT_WR)
        refused(received(client), 408, "broke off after")


def test_clients_that_leave_are_not_spoken_of(vectors_door, nothing_written):
    for sent in (b"", b"POST", posted(RIGHT)[:-10], posted(RIGHT)):
        with connected(vectors_door) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset
            client.sendall(sent)
    assert ask(vectors_door, posted(RIGHT)).status == 200


def test_a_client_that_sends_on_still_gets_its_answer(vectors_door):
    body = bytes(2**22)
    with connected(vectors_door) as client:
        client.sendall(request(Content_Length=str(len(body))) + body)
        refused(received(client), 413, "4,194,304 bytes")


def test_a_second_request_on_a_connection_is_not_read(vectors_door):
    """So nothing that is hidden in a refused body can be taken for a request."""
    answer = ask(vectors_door, posted({}, Content_Length="1") + request("GET", "/about"))
    refused(answer, 400, "JSON")


def test_a_slow_client_is_ended(vectors_door, monkeypatch):
    monkeypatch.setattr(door, "PATIENCE", 0.5)
    start = time.monotonic()
    with connected(vectors_door) as client:
        client.sendall(request(Content_Length="1000"))
        for _ in range(8):
            client.sendall(b" ")
            time.sleep(0.1)
        refused(received(client), 408, "within 0.5 seconds")
    assert time.monotonic() - start < 10


def test_silent_connections_leave_room_in_the_end(vectors_door, monkeypatch):
    monkeypatch.setattr(door, "PATIENCE", 0.5)
    monkeypatch.setattr(door, "LINGER", 0.1)
    silent = [connected(vectors_door) for _ in range(2 * door.CONNECTIONS)]
    assert ask(vectors_door, posted(RIGHT)).status == 200
    for client in silent:
        client.close()


def test_requests_at_once_are_all_answered(vectors_door):
    found = []
    ask_once = lambda: found.append(ask(vectors_door, posted(RIGHT)).json["distance"])  # noqa: E731
    threads = [threading.Thread(target=ask_once) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40
    assert len(set(found)) == 1


def letters_of(texts: list[str]) -> torch.Tensor:
    """(n, 26): how often each letter occurs, plus one."""
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    return torch.tensor([[1.0 + text.lower().count(one) for one in alphabet] for text in texts])


@pytest.fixture(scope="module")
def texts_door(vector_run) -> Iterator[Door]:
    network = torch.nn.Identity()
    embedder = Embedder(network, Reads(texts=True), 26, prepare=letters_of, pretrained=True)
    with opened(Answers(replace(read_run(vector_run), embedder=embedder))) as found:
        yield found


def test_texts_are_compared(texts_door):
    assert ask(texts_door, request("GET", "/about")).json["items"] == "text"
    same = ask(texts_door, posted({"a": {"text": "Listen"}, "b": {"text": " silent\n"}})).json
    assert (same["same"], same["distance"]) == (True, pytest.approx(0, abs=1e-6))
    other = ask(texts_door, posted({"a": {"text": "a" * 99}, "b": {"text": "b" * 99}})).json
    one, two = (row / row.norm() for row in letters_of(["a" * 99, "b" * 99]).double())
    assert (other["same"], other["distance"]) == (False, pytest.approx(1 - (one @ two).item()))


@pytest.mark.parametrize("one", wrong.of_texts(), ids=lambda one: one.name)
def test_a_wrong_text_is_told_what_is_wrong(texts_door, nothing_written, one):
    refused(ask(texts_door, one.sent), one.status, one.says)


def test_a_prior_needs_a_probability(vector_run):
    answers = Answers(replace(read_run(vector_run), probability=None))
    with opened(answers) as older:
        refused(ask(older, posted({**RIGHT, "prior": 0.5})), 422, "Train it again")
        assert ask(older, posted(RIGHT)).json["likelihood_ratio"] is None
        assert b'id="prior"' not in ask(older, request("GET", "/")).body


def test_the_page_says_why_decision_and_probability_may_disagree(searched_door):
    page = " ".join(ask(searched_door, request("GET", "/")).body.decode().split())
    assert "accepts 0.2 of different pairs, whatever their share" in page
    assert "takes 0.2 of strangers for somebody, whatever their share" in page


def test_memory_that_runs_out_is_no_bug(vectors_door, monkeypatch, nothing_written):
    monkeypatch.setitem(vectors_door.questions, "/compare", raises(MemoryError()))
    refused(ask(vectors_door, posted(RIGHT)), 413, "memory ran out")


def test_a_bug_is_called_one_and_printed(vectors_door, monkeypatch, capfd):
    monkeypatch.setitem(vectors_door.questions, "/compare", raises(KeyError("secret")))
    answer = ask(vectors_door, posted(RIGHT))
    refused(answer, 500, "a bug in nearfar")
    assert b"secret" not in answer.body
    assert "KeyError: 'secret'" in capfd.readouterr().err


def raises(error: Exception):
    def question(body):
        raise error

    return question


# Uploads.


def test_an_upload_is_read_as_the_file_is(folder, tmp_path):
    deep = tmp_path / "deep.png"
    random = np.random.default_rng(0)
    deep.write_bytes(wrong.png16(random.integers(0, 65536, (9, 7, 3)).astype(np.uint16), 2))
    floats = tmp_path / "floats.tif"
    Image.fromarray(random.normal(size=(9, 7)).astype(np.float32)).save(floats)
    for file in (*sorted(folder.rglob("*.*g"))[:4], deep, floats):
        one = read_picture(file, Fit(8, 8, 1))
        other = read_picture(Upload("a", file.read_bytes()), Fit(8, 8, 1))
        assert one.depth == other.depth
        assert np.array_equal(one.pixels, other.pixels)


def test_an_upload_is_called_by_its_name(tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing")
    told = []
    for file in (tmp_path / "a.png", Upload("image a", b"nothing")):
        with pytest.raises(InputError) as error:
            read_picture(file, Fit(8, 8, 1))
        told.append(str(error.value).replace(str(file), "FILE"))
    assert told[0] == told[1]


def test_a_network_that_returns_nan_is_told_of(vector_run):
    run = read_run(vector_run)
    with pytest.raises(InputError, match="returns NaN or infinity"):
        item_from({"vector": [3e38] * 8}, run, "a")


# The page of the documentation.

GUIDE = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")


def test_the_code_of_the_guide_asks_and_is_answered(
    images_door, folder, tmp_path, monkeypatch, capsys
):
    (code,) = re.findall(r"^```python\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    (shown,) = re.findall(r"^```text\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    one, other = sorted(folder.rglob("*.png"))[:2]
    shutil.copy(one, tmp_path / "one.png")
    shutil.copy(other, tmp_path / "other.png")
    monkeypatch.chdir(tmp_path)
    exec(code.replace("http://127.0.0.1:8000/", images_door.url), {})
    printed = json.loads(capsys.readouterr().out)
    assert printed.keys() == json.loads(shown).keys()
    assert printed["prior"] == 0.01


def test_the_guide_shows_what_a_path_is_told(images_door):
    (sent,) = re.findall(r"-d '(.*)'$", GUIDE, re.MULTILINE)
    (told,) = re.findall(r'^({"error".*})$', GUIDE, re.MULTILINE)
    assert ask(images_door, request(body=sent.encode())).json == json.loads(told)


def test_the_guide_names_every_status():
    (table,) = re.findall(r"\| status \|.*?\n\n", GUIDE, re.DOTALL)
    named = {
        int(status)
        for row in re.findall(r"^\| (4[\d, ]+)", table, re.MULTILINE)
        for status in row.split(",")
    }
    assert {one.status for one in (*OF_VECTORS, *OF_IMAGES)} - {505} == named - {408}


# The command.


def test_wrong_arguments_are_one_line(nearfar, vector_run, tmp_path):
    for port in (-1, 65536):
        done = nearfar("serve", vector_run, "--port", port)
        assert (done.status, done.out) == (2, "")
        assert f"--port must lie between 0 and 65535, got {port}." in done.error
    done = nearfar("serve", tmp_path)
    assert done.status == 2
    assert "is not a complete run" in done.error
    done = nearfar("serve", vector_run, "--gallery", tmp_path / "none")
    assert (done.status, done.out) == (2, "")
    assert str(tmp_path / "none") in done.error


def test_a_gallery_of_another_run_is_refused(nearfar, image_run, vector_gallery):
    done = nearfar("serve", image_run, "--gallery", vector_gallery)
    assert (done.status, done.out) == (2, "")
    assert "of another network" in done.error


def test_a_port_in_use_is_one_line(nearfar, vectors_door, vector_run):
    port = vectors_door.server_address[1]
    done = nearfar("serve", vector_run, "--port", port)
    assert (done.status, done.out) == (2, "")
    assert f"--port {port} cannot be used" in done.error


def test_a_run_whose_items_cannot_be_sent_is_refused(nearfar, tmp_path):
    x = np.random.default_rng(0).normal(size=(48, 2, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "two.npz", x=x, y=np.arange(48) // 4)
    options = ["--steps", 1, "--far", "0.2", "--no-report"]
    assert nearfar("train", tmp_path / "two.npz", "--out", tmp_path / "run", *options).status == 0
    done = nearfar("serve", tmp_path / "run", "--port", 0)
    assert done.status == 2
    assert "cannot be served: it compares items of shape (2, 8, 8)." in done.error


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_is_stopped_by_signals(vector_run, tmp_path, number):
    command = [sys.executable, "-m", "nearfar", "serve", str(vector_run), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=environment,
    ) as process:
        said = process.stdout.readline()
        assert f"{vector_run} is at http://127.0.0.1:" in said
        port = int(said.split("http://127.0.0.1:")[1].split("/")[0])
        with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
            client.sendall(posted(RIGHT))
            assert received(client).status == 200
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "stopped\n", "")
    assert list(tmp_path.iterdir()) == []
