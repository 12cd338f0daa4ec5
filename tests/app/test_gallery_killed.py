"""A gallery whose process is killed, at any of its file operations, is whole."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")

# A process of its own, which forks the one that is killed, at the n-th operation on a file of the
# gallery.
SCRIPT = """
import os, signal, sys
from pathlib import Path
import numpy as np
from nearfar.app.gallery import change, store
from nearfar.app.gallery.rows import Rows, encoded
from nearfar.app.gallery.store import Gallery, read_gallery, writing

store.Gallery.block_rows = 16
change._LARGE = 40
place, how = Path(sys.argv[1]), sys.argv[2]

def rows(first, n):
    x = np.random.default_rng(first).normal(size=(n, 4)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    names = [f"i{i}" for i in range(first, first + n)]
    return Rows(x, encoded(name + "'s" for name in names), encoded(names))

def held(path):
    gallery = read_gallery(path)
    for block in gallery.blocks:
        if block.indexed:
            assert block.path(store.GRAPH).stat().st_size == block.sizes[store.GRAPH]
    parts = [block.read() for block in gallery.blocks]
    found = {name.decode(): x.tobytes() for part in parts for name, x in zip(part.name, part.x)}
    assert len(found) == gallery.n == gallery.n_identities
    return found

def named(*parts):
    return {name.decode(): x.tobytes() for part in parts for name, x in zip(part.name, part.x)}

def changed(path):
    with writing(path):
        gallery = read_gallery(path) if (path / store.MANIFEST).exists() else empty(path)
        if how == "remove":
            change.remove(gallery, ["i3's", "i20's"])
        else:
            gallery = empty(path) if how == "replace" else gallery
            pieces = range(100, 100 + added, 10)
            change.add(gallery, (rows(i, 10) for i in pieces), lambda text: None)

def empty(path):
    return Gallery(path, "run", "euclidean", 4)

def begin(path):
    if how != "new":
        with writing(path):
            change.add(empty(path), [rows(0, 40)], lambda text: None)

def killed_child(path, arm):
    child = os.fork()
    if not child:
        arm()
        changed(path)
        os._exit(0)
    return os.waitpid(child, 0)[1]

def at_operation(n, path):
    left = [n]
    def hook(event, arguments):
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod") and (
            str(path) in str(arguments[0]) or str(path) in str(arguments[1:2])
        ):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

added = 30
new = [rows(i, 10) for i in range(100, 100 + added, 10)]
before = {} if how == "new" else named(rows(0, 40))
after = named(*new) if how in ("new", "replace") else {**before, **named(*new)}
if how == "remove":
    after = {name: x for name, x in before.items() if name not in ("i3", "i20")}
seen = {"before": 0, "after": 0}
n = 0
while True:
    n += 1
    path = place / f"g{n}"
    begin(path)
    status = killed_child(path, lambda: at_operation(n, path))
    if not status:
        break
    found = held(path) if (path / store.MANIFEST).exists() else {}
    assert found in (before, after), (n, len(found))
    seen["before" if found == before else "after"] += 1
    again = found == after and how == "remove"
    if not again:
        changed(path)  # what was left is no hindrance, and is cleared up
    assert held(path) == after, n
    blocks = read_gallery(path).blocks
    assert again or {file.name for file in path.iterdir()} == set().union(
        {store.MANIFEST, "lock"}, *(block.named() for block in blocks)
    ), n
    assert n < 500
print(seen["before"], seen["after"])
"""


def killed(tmp_path: Path, how: str) -> tuple[int, int]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path, how],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    return before, after


@pytest.mark.slow
@pytest.mark.parametrize("how", ["new", "add", "replace", "remove"])
def test_killed_at_each_operation(tmp_path, how):
    before, after = killed(tmp_path, how)
    assert before >= 5
    assert after >= 1
