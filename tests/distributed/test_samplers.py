"""Batches of P classes x K items: what holds for every data set, and for one or several processes.

The rank is given to most tests in place of processes; one starts two real ones.
"""

import json
from collections import Counter, defaultdict
from itertools import chain, combinations
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from processes import run
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from nearfar.distributed import over, samplers
from nearfar.distributed.samplers import ClassBatches, StreamedClassBatches

laws = hypothesis_settings(max_examples=60, derandomize=True, deadline=None, database=None)
# More workers than cores are no fault here.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def on_processes(w, make):
    """What `make` makes on each of w processes."""
    made = []
    for rank in range(w):
        with patch.object(samplers, "_place", return_value=(rank, w)):
            made.append(make())
    return made


def joined(shares, split="classes"):
    """The batches of all processes, from those of each."""
    batches = list(zip(*shares, strict=True))
    if split == "classes":
        return [list(chain(*batch)) for batch in batches]
    whole = []
    for batch in batches:
        rows = [None] * sum(map(len, batch))
        for rank, share in enumerate(batch):
            rows[rank :: len(batch)] = share
        whole.append(rows)
    return whole


def by_class(batch, labels):
    found = defaultdict(list)
    for item in batch:
        found[labels[item]].append(item)
    return found


# -- a data set -----------------------------------------------------------------------------------


@st.composite
def data(draw, short=("keep", "repeat", "drop")):
    """Labels and settings that fit them; a few classes may be much larger than the others."""
    sizes = draw(st.lists(st.integers(1, 9) | st.integers(1, 60), min_size=1, max_size=12))
    labels = np.repeat(draw(st.permutations(range(-3, len(sizes) - 3))), sizes)
    labels = np.random.default_rng(draw(st.integers(0, 99))).permutation(labels)
    short, items = draw(st.sampled_from(short)), draw(st.integers(1, 5))
    drawable = sum(size >= items or short != "drop" for size in sizes)
    if not drawable:
        items, drawable = 1, len(sizes)
    settings = {
        "classes": draw(st.integers(1, drawable)),
        "items": items,
        "short": short,
        "drop_last": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }
    return labels, settings


def chunks_of(labels, settings):
    """The chunks of each class that is drawn."""
    k = settings["items"]
    sizes = Counter(labels.tolist())
    return {c: -(-n // k) for c, n in sizes.items() if n >= k or settings["short"] != "drop"}


@laws
@given(data(), st.integers(0, 3))
def test_every_batch_has_p_classes_of_k_items(given, epoch):
    labels, settings = given
    sizes = Counter(labels.tolist())
    batches = ClassBatches(labels, **settings)
    batches.set_epoch(epoch)
    drawn = list(batches)
    assert len(drawn) == len(batches) > 0
    for batch in drawn:
        found = by_class(batch, labels)
        assert len(found) == settings["classes"]
        for c, items in found.items():
            if settings["short"] == "repeat":
                assert len(items) == settings["items"]
            else:
                assert len(items) == min(settings["items"], sizes[c])
            assert len(set(items)) == min(settings["items"], sizes[c])


@laws
@given(data())
def test_an_epoch_draws_every_item_and_repeats_no_more_than_is_said(given):
    labels, settings = given
    settings["drop_last"] = False
    chunks = chunks_of(labels, settings)
    p, k, total = settings["classes"], settings["items"], sum(chunks.values())
    batches = ClassBatches(labels, **settings)
    assert len(batches) == max(-(-total // p), *chunks.values(), 0)
    times = Counter(chain(*batches))
    assert set(times) == {i for i, c in enumerate(labels.tolist()) if c in chunks}
    again, below = {}, {}
    for c, n in chunks.items():
        items = np.flatnonzero(labels == c).tolist()
        counts = [times[i] for i in items]
        assert max(counts) - min(counts) <= 1
        per_chunk = k if settings["short"] == "repeat" else min(k, len(items))
        drawn, rest = divmod(sum(counts), per_chunk)
        assert rest == 0
        again[c], below[c] = drawn - n, drawn < len(batches)
    assert sum(again.values()) == len(batches) * p - total
    if len(batches) == -(-total // p):
        assert sum(again.values()) < p
    # Evenly: only a class that is in every batch is repeated less than others.
    assert all(again[a] - again[b] <= 1 for a in again for b in again if below[b])


def most_full_batches(chunks, p):
    """How many batches of p different classes there are: take from those with the most left."""
    left, n = sorted(chunks), 0
    while len(left) >= p:
        for i in range(p):
            left[-1 - i] -= 1
        left = sorted(c for c in left if c)
        n += 1
    return n


@laws
@given(data())
def test_drop_last_draws_no_chunk_twice_and_fills_as_many_batches_as_there_are(given):
    labels, settings = given
    settings["drop_last"] = True
    chunks = chunks_of(labels, settings)
    batches = ClassBatches(labels, **settings)
    assert len(batches) == most_full_batches(chunks.values(), settings["classes"])
    drawn = Counter(labels[item] for batch in batches for item in set(batch))
    for c, n in chunks.items():
        size = int((labels == c).sum())
        assert drawn[c] <= n * min(settings["items"], size)
    times = Counter(chain(*batches))
    for c in chunks:
        counts = [times[i] for i in np.flatnonzero(labels == c)]
        assert max(counts) - min(counts) <= 1


def test_what_is_left_out_is_another_item_in_another_epoch():
    labels = np.arange(40) // 4
    batches = ClassBatches(labels, classes=4, items=4, drop_last=True)
    assert len(batches) == 2
    left = []
    for epoch in range(60):
        batches.set_epoch(epoch)
        left.append(frozenset(range(40)) - set(chain(*batches)))
        assert len(left[-1]) == 8
    assert len(set(left)) > 20
    assert frozenset.union(*left) == frozenset(range(40))


@pytest.mark.parametrize("split", ["classes", "items"])
@laws
@given(given=data(), epoch=st.integers(0, 3))
def test_processes_share_the_batches_of_one(split, given, epoch):
    labels, settings = given
    one = ClassBatches(labels, **settings)
    one.set_epoch(epoch)
    whole = list(one)
    for w in range(1, min(4, settings["classes"]) + 1):
        shares = on_processes(w, lambda: ClassBatches(labels, **settings, split=split))
        for share in shares:
            share.set_epoch(epoch)
        parts = [list(share) for share in shares]
        assert joined(parts, split) == whole
        assert all(all(part) for part in parts)
        for batch in zip(*parts, strict=True):
            classes = [set(labels[part]) for part in batch]
            if split == "classes":
                assert sum(map(len, classes)) == settings["classes"]
                assert max(map(len, classes)) - min(map(len, classes)) <= 1
            else:
                assert max(map(len, batch)) - min(map(len, batch)) <= 1


@laws
@given(given=data(), at=st.floats(0, 1), before=st.integers(1, 3), after=st.integers(1, 3))
def test_a_run_goes_on_in_the_middle_of_an_epoch_on_any_number_of_processes(
    given, at, before, after
):
    labels, settings = given
    p = settings["classes"]
    one = ClassBatches(labels, **settings)
    one.set_epoch(5)
    whole = list(one)
    done = round(at * len(whole))

    states = []
    for share in on_processes(min(before, p), lambda: ClassBatches(labels, **settings)):
        share.set_epoch(5)
        drawn = iter(share)
        for _ in range(done):
            next(drawn)
        states += [share.state_dict(), share.state_dict(done)]
    assert all(state == states[0] for state in states)
    (state,) = json.loads(json.dumps(states[:1]))

    shares = on_processes(min(after, p), lambda: ClassBatches(labels, **settings))
    for share in shares:
        share.load_state_dict(state)
        assert share.state_dict() == state
        share.set_epoch(5)
    assert joined([list(share) for share in shares]) == whole[done:]
    # The next iteration is a whole epoch.
    assert joined([list(share) for share in shares]) == whole
    # Another epoch begins at its start.
    one.set_epoch(6)
    for share in shares:
        share.load_state_dict(state)
        share.set_epoch(6)
    assert joined([list(share) for share in shares]) == list(one)


def partners(batches, labels):
    """Which items of a class are in a batch together."""
    return {frozenset(items) for batch in batches for items in by_class(batch, labels).values()}


def test_epochs_and_seeds_have_batches_of_their_own():
    labels = np.arange(60) % 12

    def drawn(epoch, **settings):
        batches = ClassBatches(labels, classes=4, items=2, **settings)
        batches.set_epoch(epoch)
        return list(batches)

    found = [drawn(0), drawn(1), drawn(2), drawn(0, seed=1), drawn(1, seed=1)]
    assert drawn(1) == found[1]
    for a, b in combinations(found, 2):
        assert a != b
        assert len(partners(a, labels) & partners(b, labels)) < 24


def test_a_class_meets_all_others_in_an_epoch_and_is_on_every_process():
    """20 classes of 40 chunks: a class is in 40 batches, each time with 3 others of 19."""
    labels = np.repeat(np.arange(20), 80)
    shares = on_processes(2, lambda: ClassBatches(labels, classes=4, items=2))
    parts = [list(share) for share in shares]
    on = [Counter(labels[i] for batch in part for i in batch) for part in parts]
    assert all(20 <= counts[c] <= 60 for counts in on for c in range(20))

    def pairs(batches):
        found = (sorted(set(labels[batch].tolist())) for batch in batches)
        return Counter(chain(*(combinations(classes, 2) for classes in found)))

    with_others = pairs(joined(parts))
    # Up to 5 others lie in the same row of the table, and are not met in this epoch.
    assert min(Counter(chain(*with_others)).values()) >= 19 - 5
    assert max(with_others.values()) <= 20
    one, ever = ClassBatches(labels, classes=4, items=2), set()
    for epoch in range(6):
        one.set_epoch(epoch)
        ever |= set(pairs(one))
    assert len(ever) == 20 * 19 // 2


def test_labels_may_be_tensors_of_any_integer_dtype():
    labels = torch.arange(24, dtype=torch.uint8) % 6
    first = list(ClassBatches(labels, classes=3, items=2))
    assert first == list(ClassBatches(labels.tolist(), classes=3, items=2))
    assert first == list(ClassBatches(labels.long().numpy() * 1000 - 7, classes=3, items=2))


class Pairs(Dataset):
    """Items that are their own position, with a label."""

    def __init__(self, labels):
        self.labels = labels

    def __getitem__(self, i):
        return i, self.labels[i]

    def __len__(self):
        return len(self.labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_yields_the_batches_and_a_run_goes_on_where_it_was(workers):
    labels = np.arange(40) // 3
    batches = ClassBatches(labels, classes=4, items=2)
    loader = DataLoader(Pairs(labels), batch_sampler=batches, num_workers=workers)
    whole = list(batches)
    assert len(loader) == len(whole)
    seen = []
    for done, (rows, ids) in enumerate(loader, start=1):
        assert ids.tolist() == labels[rows].tolist()
        seen.append(rows.tolist())
        if done == 2:
            state = batches.state_dict(done)
            break
    batches.load_state_dict(state)
    seen += [rows.tolist() for rows, _ in loader]
    assert seen == whole


# -- a stream -------------------------------------------------------------------------------------


class Stream(IterableDataset):
    """Items with labels; the order depends on the epoch if there is one."""

    def __init__(self, labels):
        self.labels = labels
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        n = len(self.labels)
        for i in np.random.default_rng(self.epoch).permutation(n).tolist():
            yield i, torch.tensor(self.labels[i])


@st.composite
def streams(draw):
    chance = np.random.default_rng(draw(st.integers(0, 999)))
    share = chance.dirichlet(np.full(draw(st.integers(1, 12)), draw(st.sampled_from([0.3, 5.0]))))
    labels = chance.choice(len(share), draw(st.integers(0, 80)), p=share).tolist()
    classes, items = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    buffer = classes * items + draw(st.integers(0, 40))
    settings = {"classes": classes, "items": items, "buffer": buffer, "seed": draw(st.integers(0))}
    return labels, settings | {"drop_last": draw(st.booleans())}


def positions(batches):
    return [[i for i, _ in batch] for batch in batches]


@laws
@given(streams(), st.integers(0, 3))
def test_a_stream_yields_each_item_once_in_batches_of_at_most_p_classes_of_k_items(given, epoch):
    labels, settings = given
    p, k = settings["classes"], settings["items"]
    batches = StreamedClassBatches(Stream(labels), **settings)
    batches.set_epoch(epoch)
    drawn = positions(batches)
    once = list(chain(*drawn))
    assert len(once) == len(set(once))
    order = np.random.default_rng(epoch).permutation(len(labels)).tolist()
    held: set[int] = set()
    for batch in drawn:
        more = settings["buffer"] - len(held)
        held |= set(order[:more])
        order = order[more:]
        assert set(batch) <= held
        # As full as the buffer allows: P classes, and of these those with the most items.
        counts = Counter(labels[i] for i in held)
        possible = sorted((min(n, k) for n in counts.values()), reverse=True)[:p]
        found = Counter(labels[i] for i in batch)
        assert sorted(found.values(), reverse=True) == possible
        held -= set(batch)
    left = Counter(labels[i] for i in {*held, *order})
    if settings["drop_last"]:
        assert sum(n >= k for n in left.values()) < p
    else:
        assert set(once) == set(range(len(labels)))


@pytest.mark.parametrize("split", ["classes", "items"])
@laws
@given(given=streams(), epoch=st.integers(0, 3))
def test_processes_share_the_batches_of_a_stream(split, given, epoch):
    labels, settings = given
    one = StreamedClassBatches(Stream(labels), **settings)
    one.set_epoch(epoch)
    whole = positions(one)
    for w in range(1, min(4, settings["classes"]) + 1):
        make = lambda: StreamedClassBatches(Stream(labels), **settings, split=split)  # noqa: E731
        shares = on_processes(w, make)
        for share in shares:
            share.set_epoch(epoch)
        parts = [positions(share) for share in shares]
        kept = [batch for batch in whole if len(batch) >= w]
        assert [sorted(batch) for batch in joined(parts)] == [sorted(batch) for batch in kept]
        assert all(all(part) for part in parts)
        for k, batch in enumerate(kept):
            if split == "classes" and len({labels[i] for i in batch}) >= w:
                on = [{labels[i] for i in part[k]} for part in parts]
                assert sum(map(len, on)) == len(set().union(*on))


def labels_of_a_stream(n=300):
    return np.random.default_rng(0).integers(0, 15, n).tolist()


def make_stream(labels):
    return StreamedClassBatches(Stream(labels), classes=4, items=3, buffer=60)


def collate(items):
    return [i for i, _ in items]


def test_workers_of_a_loader_share_the_batches_of_a_stream_in_order():
    labels = labels_of_a_stream()
    whole = positions(make_stream(labels))
    for workers in (0, 1, 2, 3):
        batches = make_stream(labels)
        loader = DataLoader(batches, batch_size=None, collate_fn=collate, num_workers=workers)
        assert list(loader) == whole
        done = 7
        batches.load_state_dict(json.loads(json.dumps(make_stream(labels).state_dict(done))))
        assert list(loader) == whole[done:]
        batches.set_epoch(0)
        assert list(loader) == whole[done:]


def test_workers_that_live_on_see_the_epoch():
    labels = labels_of_a_stream(100)
    batches = make_stream(labels)
    loader = DataLoader(
        batches, batch_size=None, collate_fn=collate, num_workers=2, persistent_workers=True
    )
    other = make_stream(labels)
    found = []
    for epoch in (0, 1, 2):
        batches.set_epoch(epoch)
        other.set_epoch(epoch)
        found.append(list(loader))
        assert found[-1] == positions(other)
    assert all(a != b for a, b in combinations(found, 2))


def test_a_state_of_a_stream_says_the_epoch():
    batches = make_stream(labels_of_a_stream())
    batches.set_epoch(3)
    state, whole = batches.state_dict(2), positions(batches)
    other = make_stream(labels_of_a_stream())
    other.load_state_dict(state)
    assert positions(other) == whole[2:]
    other.set_epoch(4)
    assert other.state_dict(0)["epoch"] == 4
    assert len(positions(other)) >= len(whole) - 1


def test_the_seed_and_the_epoch_of_a_stream_count():
    """Also for a stream that is the same in every epoch."""
    labels = [i % 6 for i in range(60)]
    found = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1)):
        batches = StreamedClassBatches(
            list(enumerate(labels)), classes=3, items=2, buffer=24, seed=seed
        )
        batches.set_epoch(epoch)
        found.append(positions(batches))
    for a, b in combinations(found, 2):
        assert len(partners(a, labels) & partners(b, labels)) < 15


def test_the_items_of_a_class_are_drawn_at_random_from_the_buffer():
    stream = [(i, 0) for i in range(20)]
    whole = [
        positions(StreamedClassBatches(stream, classes=1, items=2, buffer=20, seed=seed))
        for seed in (0, 1)
    ]
    assert whole[0] != whole[1]


@pytest.mark.parametrize(
    ("label", "item"),
    [
        (1, lambda i: (i, i % 4)),
        (1, lambda i: (i, torch.tensor(i % 4))),
        ("id", lambda i: {"x": i, "id": np.int64(i % 4)}),
        ("id", lambda i: {"x": i, "id": "abcd"[i % 4]}),
        (lambda item: item % 4, lambda i: i),
    ],
    ids=["index", "tensor", "key", "text", "function"],
)
def test_a_label_is_read_by_its_value(label, item):
    stream = [item(i) for i in range(24)]
    batches = list(
        StreamedClassBatches(stream, classes=4, items=3, buffer=24, label=label, drop_last=True)
    )
    assert [len(batch) for batch in batches] == [12, 12]


def test_a_dataset_that_splits_itself_needs_no_more_than_one_worker():
    class Splits(IterableDataset):
        def __iter__(self):
            worker = get_worker_info()
            first, step = (worker.id, worker.num_workers) if worker else (0, 1)
            yield from ((i, i % 4) for i in range(first, 48, step))

    batches = StreamedClassBatches(Splits(), classes=4, items=2, buffer=16)
    loader = DataLoader(batches, batch_size=None, collate_fn=collate, num_workers=1)
    assert sorted(chain(*loader)) == list(range(48))


# -- real processes -------------------------------------------------------------------------------


def shares() -> dict[str, Any]:
    """What each process draws with every kind of group, and the error of a group of others."""
    rank, labels = dist.get_rank(), [i % 9 for i in range(70)]
    alone = [dist.new_group([r]) for r in (0, 1)]
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))
    groups = {
        "world": "world",
        "group": dist.group.WORLD,
        "mesh": mesh["b"],
        "over": over(mesh["b"]),
        "alone": alone[rank],
        "mesh alone": mesh["a"],
        "none": None,
    }
    found: dict[str, Any] = {}
    for name, group in groups.items():
        found[name] = list(ClassBatches(labels, classes=4, items=2, group=group))
        stream = StreamedClassBatches(
            list(enumerate(labels)), classes=4, items=2, buffer=30, group=group
        )
        found[f"{name} stream"] = [[i for i, _ in batch] for batch in stream]
    with pytest.raises(ValueError, match="group must be one that this process belongs to"):
        ClassBatches(labels, classes=4, items=2, group=alone[1 - rank])
    return found


def test_two_processes_share_the_batches_of_one():
    found = run(2, shares)
    labels = [i % 9 for i in range(70)]
    whole = list(ClassBatches(labels, classes=4, items=2))
    stream = StreamedClassBatches(list(enumerate(labels)), classes=4, items=2, buffer=30)
    for name in ("world", "group", "mesh", "over"):
        assert joined([each[name] for each in found]) == whole
        assert joined([each[f"{name} stream"] for each in found]) == positions(stream)
    for name in ("alone", "mesh alone", "none"):
        assert found[0][name] == found[1][name] == whole


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"classes": 0}, ValueError, "classes must be an integer of at least 1"),
        ({"items": 2.0}, ValueError, "items must be an integer"),
        ({"classes": 5}, ValueError, "classes must be at most .* in labels, 4; got 5"),
        ({"short": "drop"}, ValueError, "of at least 2 items in labels, 1; got 2"),
        ({"short": "never"}, ValueError, "short must be one of 'keep', 'repeat', 'drop'"),
        ({"split": "rows"}, ValueError, "split must be one of"),
        ({"drop_last": "no"}, TypeError, "drop_last must be True or False"),
        ({"seed": -1}, ValueError, "seed must be an integer of at least 0, got -1"),
        ({"group": "world"}, RuntimeError, "init_process_group"),
        ({"labels": [0.5, 1.5]}, TypeError, "labels must be class ids of an integer dtype"),
        ({"labels": [[1, 2]]}, ValueError, "labels must have shape"),
        ({"labels": ["a", "b"]}, TypeError, "np.unique"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_named(settings, error, said):
    settings = {"labels": [0, 0, 1, 2, 3], "classes": 2, "items": 2} | settings
    with pytest.raises(error, match=said):
        ClassBatches(settings.pop("labels"), **settings)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"classes": 0}, ValueError, "classes must be"),
        ({"buffer": 3}, ValueError, "classes x items = 4; got 3"),
        ({"split": "rows"}, ValueError, "split must be one of"),
        ({"seed": None}, ValueError, "seed must be"),
        ({"group": "world"}, RuntimeError, "init_process_group"),
    ],
    ids=str,
)
def test_a_wrong_argument_of_a_stream_is_named(settings, error, said):
    with pytest.raises(error, match=said):
        StreamedClassBatches([], **{"classes": 2, "items": 2, "buffer": 9} | settings)


def test_more_processes_than_classes_are_refused():
    with pytest.raises(ValueError, match="at least the number of processes, 3"):
        on_processes(3, lambda: ClassBatches([0, 1], classes=2, items=1))


@pytest.mark.parametrize("label", [[1], torch.tensor([1, 2]), np.array([1])], ids=str)
def test_a_label_that_is_no_value_is_refused(label):
    with pytest.raises(TypeError, match="label must lead to the class of an item"):
        list(StreamedClassBatches([(0, label)], classes=1, items=1, buffer=1))


def test_a_state_of_other_batches_is_refused():
    batches = ClassBatches([0, 0, 1, 1], classes=2, items=2)
    with pytest.raises(ValueError, match="items was 1 and is 2"):
        batches.load_state_dict(ClassBatches([0, 0, 1, 1], classes=2, items=1).state_dict())
    with pytest.raises(ValueError, match="labels was '4 with checksum"):
        batches.load_state_dict(ClassBatches([0, 1, 1, 1], classes=2, items=2).state_dict())
    with pytest.raises(ValueError, match="done must be at most 1"):
        batches.state_dict(2)
    for wrong in (-1, 0.5, None):
        with pytest.raises(ValueError, match="epoch must be"):
            batches.set_epoch(wrong)
    stream = StreamedClassBatches([], classes=2, items=2, buffer=9)
    with pytest.raises(ValueError, match="buffer was 8 and is 9"):
        stream.load_state_dict(StreamedClassBatches([], classes=2, items=2, buffer=8).state_dict(0))
