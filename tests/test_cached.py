"""Cached gradients against a plain step, which encodes the same chunks and keeps their graphs."""

import random
from collections import UserDict
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import normalize

import nearfar as nf
from nearfar.cached.embeddings import cached_embeddings
from nearfar.cached.reductions import modules_of
from nearfar.cached.replay import random_state

LABELS = torch.arange(11) % 3


def mlp(d=5, out=4, dropout=0.1, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    layers = (nn.Linear(d, 16), nn.GELU(), nn.Dropout(dropout), nn.LayerNorm(16))
    return nn.Sequential(*layers, nn.Linear(16, out)).to(dtype)


def rows(n=11, d=5, seed=1, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def in_chunks(encode, x, size):
    return torch.cat([encode(x[i : i + size]) for i in range(0, len(x), size)])


def take_grads(*owners):
    """The gradients of modules and tensors, which are removed."""
    parameters = [
        p
        for owner in owners
        for p in (owner.parameters() if hasattr(owner, "parameters") else [owner])
    ]
    found = [None if p.grad is None else p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    return found


def assert_same(found, expected, tolerance=1e-12):
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def sup_con(z):
    return nf.sup_con_loss(z, LABELS[: len(z)], temperature=0.2)


@pytest.mark.parametrize("size", [1, 4, 5, 11, 100])
@pytest.mark.parametrize("form", ["module", "function", "method", "partial"])
def test_gradients_are_those_of_a_plain_step_with_the_same_dropout(size, form):
    net, x = mlp(), rows()

    def loss(z):
        return sup_con(z + 0.1 * torch.rand_like(z))

    torch.manual_seed(7)
    expected = loss(in_chunks(net, x, size))
    expected.backward()
    reference, after = take_grads(net), torch.rand(3)
    encode = {
        "module": net,
        "function": lambda rows: net(rows),
        "method": net.forward,
        "partial": partial(lambda network, rows: network(rows), net),
    }[form]
    torch.manual_seed(7)
    value = nf.cached_backward(encode, x, loss, chunk_size=size)
    assert value.item() == expected.item()
    assert not value.requires_grad
    assert_same(take_grads(net), reference)
    assert torch.equal(torch.rand(3), after)  # as many random numbers are drawn as in one pass


def test_the_random_numbers_of_numpy_and_python_are_replayed():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 4).double()

        def forward(self, x):
            return self.linear(x * random.random() + float(np.random.rand()))

    torch.manual_seed(0)
    net, x = Noisy(), rows()

    def seeded(step):
        random.seed(3)
        np.random.seed(3)
        step()
        return [*take_grads(net), random.random(), np.random.rand()]

    plain = seeded(lambda: sup_con(in_chunks(net, x, 4)).backward())
    cached = seeded(lambda: nf.cached_backward(net, x, sup_con, chunk_size=4))
    assert_same(cached[:2], plain[:2])
    assert cached[2:] == plain[2:]


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_the_random_numbers_of_an_accelerator_in_use_are_replayed(kind, monkeypatch):
    """CUDA has a state for each device, MPS has one."""
    now, suffix = [1], "_all" if kind == "cuda" else ""
    device = SimpleNamespace(
        **{
            f"get_rng_state{suffix}": lambda: list(now),
            f"set_rng_state{suffix}": lambda state: now.__setitem__(slice(None), state),
        }
    )
    if kind == "cuda":
        device.is_initialized = lambda: now != [0]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch, "get_device_module", lambda found: device)
    restore = random_state()
    now[:] = [5]
    restore()
    assert now == [1]
    if kind == "cuda":  # to read a state would start CUDA
        now[:] = [0]
        restore = random_state()
        now[:] = [5]
        restore()
        assert now == [5]


def test_gradients_accumulate_and_are_scaled():
    net, x, y = mlp(dropout=0.0), rows(), rows(seed=2)
    (sup_con(net(x)) / 2 + sup_con(net(y)) / 2).backward()
    expected = take_grads(net)
    for batch in (x, y):
        loss = nf.cached_backward(net, batch, sup_con, chunk_size=4, scaler=0.5)
    assert loss.item() == pytest.approx(sup_con(net(y)).item(), rel=1e-12)
    assert_same(take_grads(net), expected)


@pytest.mark.parametrize("size", [4, 11])
def test_a_grad_scaler_steps_as_after_a_plain_step(size):
    def trained(step):
        net = mlp(dropout=0.0, dtype=torch.float32)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        step(net, scaler)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        return [p.detach() for p in net.parameters()]

    x = rows(dtype=torch.float32)
    plain = trained(lambda net, scaler: scaler.scale(sup_con(net(x))).backward())
    cached = trained(
        lambda net, scaler: nf.cached_backward(net, x, sup_con, chunk_size=size, scaler=scaler)
    )
    assert_same(cached, plain, 1e-6)


@pytest.mark.parametrize("outside", [True, False], ids=["around both", "in the encoder"])
def test_autocast_is_that_of_the_caller_in_both_passes(outside):
    net, x = mlp(dtype=torch.float32), rows(dtype=torch.float32)
    autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16)

    def encode(x):
        assert torch.is_autocast_enabled("cpu")
        return net(x)

    def inside(x):
        with autocast():
            return encode(x)

    torch.manual_seed(7)
    with autocast():
        plain = sup_con(in_chunks(net, x, 4))
    plain.backward()
    expected = take_grads(net)
    torch.manual_seed(7)
    if outside:
        with autocast():
            with torch.no_grad():
                net(x)  # casts that torch may keep, without a graph
            torch.manual_seed(7)
            loss = nf.cached_backward(encode, x, sup_con, chunk_size=4)
    else:
        loss = nf.cached_backward(inside, x, sup_con, chunk_size=4)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    # A gradient is rounded to bfloat16 where plain torch sums it over chunks.
    for found, exact in zip(take_grads(net), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=2e-2, atol=2e-3 * exact.abs().max().item())


def test_no_product_of_the_backward_is_rounded_by_an_outer_autocast():
    """A layer that refuses autocast in its forward is in float32 in its backward too."""
    net, x = nn.Linear(5, 4), rows(dtype=torch.float32)

    def exact(x):
        with torch.autocast("cpu", enabled=False):
            return net(x)

    sup_con(net(x)).backward()
    expected = take_grads(net)
    for size in (4, 11):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            nf.cached_backward(exact, x, sup_con, chunk_size=size)
        assert_same(take_grads(net), expected, 1e-6)


class Text(nn.Module):
    """The mean of the tokens of a text, without the padding."""

    def __init__(self, dropout=0.1, padding_side="right"):
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(20, 6).double()
        self.out = nn.Linear(6, 4).double()
        self.dropout = nn.Dropout(dropout)
        self.seen = []

    def forward(self, input_ids, attention_mask, **others):
        self.seen.append(tuple(input_ids.shape))
        h = torch.tanh(self.dropout(self.embed(input_ids))) * attention_mask[..., None]
        return self.out(h.sum(1) / attention_mask.sum(1, keepdim=True).clamp(min=1))


def texts(lengths=(3, 9, 1, 4, 4, 8, 2, 2, 6, 1, 5), width=12, left=False):
    ids = torch.randint(1, 20, (len(lengths), width), generator=torch.Generator().manual_seed(4))
    place = torch.arange(width)
    length = torch.tensor(lengths)[:, None]
    mask = place >= width - length if left else place < length
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def test_two_towers_of_different_types_and_a_learned_temperature():
    image, text = mlp(), Text()
    x, tokens = rows(), texts()
    criterion = nf.CLIPLoss(scale=nn.Parameter(torch.tensor(3.0, dtype=torch.float64)))
    torch.manual_seed(7)
    a = in_chunks(image, x, 4)
    b = torch.cat([text(**{k: v[i : i + 3] for k, v in tokens.items()}) for i in range(0, 11, 3)])
    expected = criterion(a, b)
    expected.backward()
    reference = take_grads(image, text, criterion)
    assert all(g is not None for g in reference)
    torch.manual_seed(7)
    loss = nf.cached_backward(
        (image, lambda batch: text(**batch)), (x, tokens), criterion, chunk_size=(4, 3)
    )
    assert loss.item() == expected.item()
    assert_same(take_grads(image, text, criterion), reference)


def test_a_network_shared_by_several_inputs_with_different_numbers_of_rows():
    net, queries, candidates = mlp(dropout=0.0), rows(5), rows(9, seed=3)

    def loss(q, c):
        return nf.info_nce_loss(q, c[:5], temperature=0.3) + c.square().mean()

    loss(net(queries), net(candidates)).backward()
    expected = take_grads(net)
    nf.cached_backward((net, net), (queries, candidates), loss, chunk_size=2)
    assert_same(take_grads(net), expected)


@pytest.mark.parametrize("how", ["no parameter", "no_grad", "loss detaches"])
def test_a_tower_from_which_nothing_is_learned_is_encoded_once(how):
    student, teacher, x = mlp(), mlp(seed=9), rows()
    calls = []

    def taught(x):
        calls.append(len(x))
        with torch.set_grad_enabled(how != "no_grad"):
            return teacher(x)

    if how == "no parameter":
        teacher.requires_grad_(False)

    def loss(s, t):
        return nf.clip_loss(s, t.detach() if how == "loss detaches" else t, scale=2.0)

    torch.manual_seed(7)
    a, b = in_chunks(student, x, 4), in_chunks(taught, x, 4)
    loss(a, b).backward()
    expected = take_grads(student)
    calls.clear()
    torch.manual_seed(7)
    nf.cached_backward((student, taught), (x, x), loss, chunk_size=4)
    assert calls == [4, 4, 3]
    assert_same(take_grads(student), expected)
    assert set(take_grads(teacher)) == {None}


def test_only_chunks_from_which_something_is_learned_are_encoded_again():
    net, x, calls = mlp(dropout=0.0), rows(), []

    def encode(x):
        calls.append(len(x))
        return net(x).detach() if len(calls) % 3 == 1 else net(x)

    nf.cached_backward(encode, x, sup_con, chunk_size=4)
    assert calls == [4, 4, 3, 4, 3]


@pytest.mark.parametrize("form", ["tuple", "dict", "nested"])
def test_several_outputs_of_a_tower_go_to_the_loss_as_they_are(form):
    trunk, head, x = mlp(dropout=0.0), nn.Linear(4, 3).double(), rows()
    index = torch.arange(11)

    def encode(batch):
        z = trunk(batch["x"])
        outputs = {"z": z, "head": head(z), "row": batch["row"]}
        if form == "nested":
            return {"all": [outputs["z"], (outputs["head"], outputs["row"])]}
        return tuple(outputs.values()) if form == "tuple" else outputs

    def loss(outputs):
        if form == "nested":
            z, (h, row) = outputs["all"]
        else:
            z, h, row = outputs.values() if form == "dict" else outputs
        assert torch.equal(row, index)
        return sup_con(z) + nf.siglip_loss(h, h.flip(0), scale=2.0, bias=-1.0)

    inputs = {"x": x, "row": index, "flag": True, "none": None}
    loss(encode(inputs)).backward()
    expected = take_grads(trunk, head)
    nf.cached_backward(encode, inputs, loss, chunk_size=4)
    assert_same(take_grads(trunk, head), expected)


def test_an_output_that_the_loss_leaves_out_is_left_alone():
    trunk, head, x = mlp(dropout=0.0), nn.Linear(4, 3).double(), rows()
    nf.cached_backward(
        lambda x: (trunk(x), head(trunk(x))), x, lambda z: sup_con(z[0]), chunk_size=4
    )
    assert take_grads(head) == [None, None]
    assert None not in take_grads(trunk)


def test_embeddings_hold_no_memory_but_their_own():
    kept = []

    def encode(x):
        assert all(storage.expired() for storage in kept)
        wide = x[:, None].expand(-1, 100, -1) * weight
        kept.append(StorageWeakRef(wide.untyped_storage()))
        return wide[:, 0]

    weight = nn.Parameter(torch.ones(5, dtype=torch.float64))
    nf.cached_backward(encode, rows(), sup_con, chunk_size=4)
    assert len(kept) == 6


def test_inputs_that_are_learned_get_their_gradient():
    net, x = mlp(dropout=0.0), rows().requires_grad_()
    sup_con(net(x)).backward()
    expected = take_grads(net, x)
    nf.cached_backward(net, x, sup_con, chunk_size=4)
    assert_same(take_grads(net, x), expected)


def test_a_list_of_strings_is_collated_chunk_by_chunk():
    words = [f"{'ab' * n} {n}" for n in range(11)]
    net, seen = mlp(d=2, dropout=0.0), []

    def collate(texts):
        seen.append(len(texts))
        return torch.tensor([[len(t), ord(t[-1])] for t in texts], dtype=torch.float64) / 20

    sup_con(net(collate(words))).backward()
    expected = take_grads(net)
    seen.clear()
    nf.cached_backward(net, words, sup_con, chunk_size=4, collate=collate)
    assert seen == [4, 4, 3]
    assert_same(take_grads(net), expected)


class Tokenized(UserDict):
    """Like what a tokenizer returns: a mapping that is no plain dict."""


@pytest.mark.parametrize("left", [False, True], ids=["padded right", "padded left"])
def test_chunks_of_so_many_tokens(left):
    net, tokens = Text(dropout=0.0), texts(left=left)
    sup_con(net(**tokens)).backward()
    expected = take_grads(net)
    net.seen.clear()
    loss = nf.cached_backward(
        lambda batch: net(**batch), Tokenized(tokens), sup_con, chunk_tokens=16
    )
    assert loss.item() == pytest.approx(sup_con(net(**tokens)).item(), rel=1e-12)
    assert_same(take_grads(net), expected)
    first, again = net.seen[: len(net.seen) // 2], net.seen[len(net.seen) // 2 : -1]
    assert first == [(1, 9), (2, 8), (3, 5), (5, 3)]
    assert again == first


def test_tokens_of_collated_strings_and_rows_beyond_the_budget():
    words = ["a b c d e f", "a", "a b", "a b c", "a"]
    net = Text(dropout=0.0)

    def tokenize(texts):
        lengths = [len(t.split()) for t in texts]
        return texts_of(lengths, max(lengths))

    def texts_of(lengths, width):
        return texts(lengths, width)

    nf.cached_backward(lambda batch: net(**batch), words, sup_con, chunk_tokens=4, collate=tokenize)
    assert net.seen[:4] == [(1, 6), (1, 3), (2, 2), (1, 1)]


def test_without_a_mask_every_token_counts():
    net = nn.Embedding(20, 4).double()
    shapes = []

    def encode(batch):
        shapes.append(tuple(batch["input_ids"].shape))
        return net(batch["input_ids"]).mean(1)

    ids = texts()["input_ids"]
    nf.cached_backward(encode, {"input_ids": ids}, sup_con, chunk_tokens=50)
    assert shapes[:3] == [(4, 12), (4, 12), (3, 12)]


def test_one_tower_by_rows_and_one_by_tokens():
    image, text, x, tokens = mlp(dropout=0.0), Text(dropout=0.0), rows(), texts()
    nf.clip_loss(image(x), text(**tokens), scale=3.0).backward()
    expected = take_grads(image, text)
    nf.cached_backward(
        (image, lambda batch: text(**batch)),
        (x, tokens),
        partial(nf.clip_loss, scale=3.0),
        chunk_size=(4, None),
        chunk_tokens=(None, 16),
    )
    assert_same(take_grads(image, text), expected)


@pytest.mark.parametrize("by", ["chunk_size", "chunk_tokens"])
def test_a_batch_without_rows(by):
    net = Text()
    tokens = {name: x[:0] for name, x in texts().items()}
    loss = nf.cached_backward(lambda batch: net(**batch), tokens, sup_con, **{by: 8})
    assert loss.item() == 0
    assert all(not g.any() for g in take_grads(net))


def test_a_batch_of_one_chunk_is_encoded_once():
    net, calls = mlp(), []

    def encode(x):
        calls.append(len(x))
        return net(x)

    nf.cached_backward(encode, rows(), sup_con, chunk_size=11)
    assert calls == [11]


def test_the_loss_is_called_once_whatever_it_is():
    net, x, calls = mlp(dropout=0.0), rows(), []
    proxies = nf.ProxyAnchorLoss(3, 4).double()

    def loss(z):
        calls.append(z.shape)
        return proxies(z, LABELS) + nf.batch_triplet_loss(z, LABELS, margin=0.3)

    loss(net(x)).backward()
    expected = take_grads(net, proxies)
    calls.clear()
    nf.cached_backward(net, x, loss, chunk_size=2)
    assert calls == [(11, 4)]
    assert_same(take_grads(net, proxies), expected)


def peak_of_saved(step):
    """The most bytes that autograd holds at a time for a backward, besides parameters."""
    held = SimpleNamespace(now=0, peak=0)

    class Saved:
        def __init__(self, x):
            self.x, self.size = x, 0 if isinstance(x, nn.Parameter) else x.nbytes
            held.now += self.size
            held.peak = max(held.peak, held.now)

        def __del__(self):
            held.now -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.x):
        step()
    assert held.now == 0
    return held.peak


def test_memory_of_activations_is_that_of_one_chunk():
    net, x = mlp(d=5, out=2), rows(640)
    labels = torch.arange(640) % 7
    chunk = peak_of_saved(lambda: net(x[:16]).sum().backward())

    def loss(z):
        return nf.sup_con_loss(z, labels)

    def peak(rows):
        z = x[:rows]
        return peak_of_saved(
            lambda: nf.cached_backward(
                net, z, lambda z: nf.sup_con_loss(z, labels[: len(z)]), chunk_size=16
            )
        )

    assert 1 <= peak(160) / chunk < 1.3
    of_the_loss = peak_of_saved(lambda: loss(net(x).detach().requires_grad_()).backward())
    assert peak(640) <= max(1.3 * chunk, of_the_loss)
    assert peak_of_saved(lambda: loss(net(x)).backward()) > 30 * chunk


def test_batch_norm_is_warned_of_and_counts_each_chunk_once():
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).double()
    twin = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).double()
    twin.load_state_dict(net.state_dict())
    x = rows()
    sup_con(in_chunks(twin, x, 4)).backward()
    with pytest.warns(UserWarning, match="BatchNorm1d in training mode .*LayerNorm"):
        nf.cached_backward(lambda x: net(x), x, sup_con, chunk_size=4)
    assert_same(list(net.buffers()), list(twin.buffers()))
    assert_same(take_grads(net), take_grads(twin))
    nf.cached_backward(net, x, sup_con, chunk_size=11)  # one chunk: a plain step
    nf.cached_backward(net.eval(), x, sup_con, chunk_size=4)


def test_compiled_encoders_are_compiled_once():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    net, x, counter = mlp(dropout=0.0), rows(12), CompileCounter()
    sup_con(net(x[:11])).backward()
    expected = take_grads(net)
    compiled = torch.compile(net, backend=counter, dynamic=True)
    for _ in range(2):
        nf.cached_backward(compiled, x[:11], sup_con, chunk_size=4)
        assert_same(take_grads(net), expected)
    assert counter.frame_count == 1


# -- modules are found ----------------------------------------------------------------------------

GLOBAL = nn.Linear(5, 4)


def by_global(x):
    return normalize(GLOBAL(x))


def by_another(x):
    return by_global(x) + 1


class Trainer:
    def __init__(self):
        self.model = GLOBAL

    def encode(self, x):
        return self.model(x)


@pytest.mark.parametrize(
    "encode",
    [
        GLOBAL,
        by_global,
        by_another,
        lambda x: GLOBAL(x),
        Trainer().encode,
        partial(by_global),
        partial(nn.Module.__call__, GLOBAL),
        nn.Sequential(GLOBAL).forward,
    ],
    ids=["module", "global", "function", "lambda", "object", "partial", "argument", "method"],
)
def test_the_modules_of_an_encoder_are_found(encode):
    assert GLOBAL in modules_of(encode)


def test_modules_of_variables_around_a_function_are_found():
    nets = [nn.Linear(1, 1), nn.Linear(1, 1)]
    named, trainer = dict(enumerate(nets)), SimpleNamespace(model=nets[0])

    def later(x):
        return nothing_yet(x)

    assert set(modules_of(lambda x: nets[0](x))) == set(nets)
    assert set(modules_of(lambda x: named[0](x))) == set(nets)
    assert modules_of(lambda x: trainer.model(x)) == [nets[0]]
    assert modules_of(lambda x: [GLOBAL(row) for row in x]) == [GLOBAL]
    assert modules_of(torch.no_grad()(by_global)) == [GLOBAL]
    assert modules_of(later) == modules_of(normalize) == []
    nothing_yet = nets[0]
    assert modules_of(later) == [nets[0]]


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"chunk_size": 0}, ValueError, "chunk_size must be an integer of at least 1"),
        ({"chunk_size": 2.5}, ValueError, "chunk_size must be an integer of at least 1"),
        ({"chunk_size": None}, ValueError, "exactly one of chunk_size.*got chunk_size=None"),
        ({"chunk_tokens": 8}, ValueError, "exactly one of chunk_size"),
        ({"chunk_size": None, "chunk_tokens": 8}, TypeError, "must be a dict with an attention_m"),
        ({"inputs": {"a": rows(), "b": rows(3)}}, ValueError, "got 3 rows, 11 rows"),
        ({"inputs": {"a": rows(), "b": torch.tensor(1)}}, ValueError, "got one number, 11 rows"),
        ({"inputs": {}}, ValueError, "got none"),
        ({"inputs": ["a", "b"]}, TypeError, "got str. Pass collate="),
        ({"inputs": 1, "collate": list}, TypeError, "must be a sequence .* got int"),
        ({"inputs": mlp()(rows())}, ValueError, "inside the encode function"),
        ({"encode": 3}, TypeError, "encode must be a module or function, got 3"),
        ({"encode": (mlp(), mlp())}, ValueError, r"inputs must be a tuple .*encode=\(net, net\)"),
        ({"encode": (mlp(),), "inputs": (rows(),), "chunk_size": (1, 2)}, ValueError, "one entry"),
        ({"encode": lambda x: x.sum()}, ValueError, r"one row for each of the 4 rows .*shape \(\)"),
        ({"encode": lambda x: mlp()(x)[:1]}, ValueError, r"4 rows of a chunk, got shape \(1, 4\)"),
        ({"encode": lambda x: (x, 3)}, ValueError, "got int"),
        ({"encode": lambda x: x[:, : len(x)]}, ValueError, "one shape and dtype for every chunk"),
        ({"encode": lambda x: [x] * len(x)}, ValueError, "for a chunk, and"),
        ({"loss": lambda z: z.sum(1)}, ValueError, r'got shape \(11,\); use reduction="mean"'),
        ({"loss": lambda z: 3.0}, ValueError, "got float"),
        ({"loss": lambda z: z.detach().sum()}, ValueError, "the loss needs no gradient"),
        ({"encode": mlp().requires_grad_(False)}, ValueError, "the loss needs no gradient"),
    ],
)
def test_errors_say_what_to_do(changes, error, message):
    arguments = {"encode": mlp(), "inputs": rows(), "loss": sup_con, "chunk_size": 4} | changes
    encode, inputs, loss = (arguments.pop(name) for name in ("encode", "inputs", "loss"))
    with pytest.raises(error, match=message):
        nf.cached_backward(encode, inputs, loss, **arguments)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_off_it_says_so(off):
    with off(), pytest.raises(RuntimeError, match="gradients, which are off"):
        nf.cached_backward(mlp(), rows(), sup_con, chunk_size=4)


def test_an_error_in_the_second_pass_leaves_statistics_as_they_were():
    net, calls = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).double(), []

    def encode(x):
        calls.append([b.clone() for b in net.buffers()])
        if len(calls) > 5:
            raise KeyError("second pass")
        return net(x)

    with pytest.warns(UserWarning, match="BatchNorm"), pytest.raises(KeyError):
        nf.cached_backward(encode, rows(), sup_con, chunk_size=4)
    assert_same(list(net.buffers()), calls[3])


# -- embeddings whose backward encodes again ------------------------------------------------------


@pytest.mark.parametrize("size", [4, 11])
def test_embeddings_have_the_gradients_of_a_plain_step(size):
    """Of two encoders with dropout, for a loss that is scaled and learns a temperature."""
    first, second, x, y = mlp(), mlp(seed=3), rows(), rows(seed=2)
    temperature = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    found = []
    for cached in (True, False):
        torch.manual_seed(5)
        if cached:
            a, b = cached_embeddings([first, second], [x, y], chunk_size=size)
        else:
            a, b = in_chunks(first, x, size), in_chunks(second, y, size)
        (3 * nf.info_nce_loss(a, b, temperature=temperature)).backward()
        found.append(take_grads(first, second, temperature))
    assert_same(*found)


def test_embeddings_are_encoded_again_under_the_autocast_of_the_first_time():
    net, x = mlp(dtype=torch.float32), rows(dtype=torch.float32)
    found = []
    for cached in (True, False):
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            z = cached_embeddings([net], [x], chunk_size=4)[0] if cached else in_chunks(net, x, 4)
            assert z.dtype is torch.bfloat16
        sup_con(z).backward()  # where autocast is off, as trainers call it
        found.append(take_grads(net))
    assert_same(*found, tolerance=1e-6)


def test_no_pass_uses_casts_that_autocast_has_kept(monkeypatch):
    """Those that the caller made without a gradient have no graph in earlier versions of torch."""
    net, seen = mlp(), []
    net.register_forward_hook(lambda *_: seen.append("encode"))
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: seen.append("clear"))
    (z,) = cached_embeddings([net], [rows()], chunk_size=4)
    sup_con(z).backward()
    assert seen == 2 * ["clear", *3 * ["encode"]]


def test_an_encoder_whose_embeddings_the_loss_leaves_out_is_encoded_once():
    used, left_out, calls = mlp(), mlp(seed=3), []
    left_out.register_forward_hook(lambda *_: calls.append(1))
    a, _ = cached_embeddings([used, left_out], [rows(), rows(seed=2)], chunk_size=4)
    sup_con(a).backward()
    assert len(calls) == 3
    assert all(g is not None for g in take_grads(used))
    assert all(g is None for g in take_grads(left_out))


def test_embeddings_have_one_backward():
    (z,) = cached_embeddings([mlp()], [rows()], chunk_size=4)
    loss = sup_con(z)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="have one backward"):
        loss.backward()


def test_embeddings_without_gradients_are_what_the_network_gives():
    net, x = mlp().eval(), rows()
    with torch.no_grad():
        (z,) = cached_embeddings([net], [x], chunk_size=4)
    torch.testing.assert_close(z, net(x).detach())
    assert not z.requires_grad
    net.requires_grad_(False)
    (z,) = cached_embeddings([net], [x], chunk_size=4)
    assert not z.requires_grad


def test_embeddings_leave_randomness_as_a_forward_does():
    net, x = mlp(), rows()
    torch.manual_seed(5)
    in_chunks(net, x, 4)
    expected = torch.rand(3)
    torch.manual_seed(5)
    (z,) = cached_embeddings([net], [x], chunk_size=4)
    sup_con(z).backward()
    assert torch.equal(torch.rand(3), expected)
