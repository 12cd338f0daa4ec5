"""The tool on pretrained networks for images, of timm and torchvision.

torchvision decides on the version of torch. So these tests run in an environment of their own:
pip install '.[app,vision]' pytest pytest-timeout.
"""

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file as load_safetensors
from safetensors.torch import save_file
from torch import nn

pytest.importorskip("timm")
pytest.importorskip("torchvision")

import timm
import torchvision

from nearfar.app.data.content import as_input
from nearfar.app.data.image_files import ImageFiles
from nearfar.app.data.images import read_images
from nearfar.app.errors import InputError
from nearfar.app.train.config import TrainConfig
from nearfar.app.train.encoders import build, reads_of
from nearfar.app.train.objectives import WithProxies
from nearfar.app.train.rates import depths, parameter_groups
from nearfar.app.train.run import read_run
from nearfar.app.train.use import embed_addresses

SMALL = ("--steps", "3", "--identities", "4", "--items", "2", "--far", "0.2", "--no-report")
TINY = "timm:test_resnet.r160_in1k"
SIZES = [(300, 200), (200, 301), (64, 64), (97, 400)]


def config(encoder: str, **more) -> TrainConfig:
    return TrainConfig(data="photos", loss="sup_con", encoder=encoder, weights="random", **more)


def made(encoder: str, *, weights: bool = True, **more):
    asked = config(encoder, **more)
    torch.manual_seed(0)
    return build(asked, reads_of(asked), weights=weights)


def photos(folder: Path, sizes=SIZES, ending="png") -> list[Path]:
    random = np.random.default_rng(0)
    files = []
    for number, (width, height) in enumerate(sizes):
        small = random.integers(0, 256, (max(height // 8, 2), max(width // 8, 2), 3))
        image = Image.fromarray(small.astype(np.uint8)).resize((width, height))
        files.append(folder / f"{number}.{ending}")
        image.save(files[-1])
    return files


@pytest.fixture
def identities(tmp_path) -> Path:
    for identity in range(16):
        folder = tmp_path / "photos" / f"{identity}"
        folder.mkdir(parents=True)
        photos(folder, [(40 + identity, 50)] * 3, "jpg")
    return tmp_path / "photos"


# Of each way to fit an image: centre and squash, bicubic and bilinear, with and without a crop.
OF_TIMM = [
    "resnet18.a1_in1k",
    "resnet18.tv_in1k",
    "mobilenetv3_small_100",
    "vit_base_patch16_siglip_224",
    "convnext_atto",
]


@pytest.mark.parametrize("ending", ["png", "jpg"])
@pytest.mark.parametrize("name", OF_TIMM)
def test_images_are_fitted_as_timm_evaluates(tmp_path, name, ending):
    settings = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    theirs = timm.data.create_transform(**settings, is_training=False)
    _same_as(theirs, f"timm:{name}", photos(tmp_path, ending=ending))


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0", "swin_v2_t", "convnext_tiny"])
def test_images_are_fitted_as_torchvision_evaluates(tmp_path, name):
    theirs = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    _same_as(theirs, f"torchvision:{name}", photos(tmp_path))


def _same_as(theirs, encoder: str, files: list[Path]) -> None:
    asked = config(encoder)
    reads = reads_of(asked)
    described = import_module("nearfar.app.train.encoders.images")
    source, name = described._source(asked)
    network = source.describe(name)
    mean, deviation = (torch.tensor(of).view(3, 1, 1) for of in (network.mean, network.deviation))
    x, _ = read_images(files, reads.fit)
    assert x.dtype is torch.uint8
    expected = torch.stack([theirs(Image.open(file).convert("RGB")) for file in files])
    got = (as_input(x) - mean) / deviation
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("encoder", "trained_on"),
    [(TINY, 0.5), ("torchvision:mobilenet_v3_small", 0.485)],
)
def test_a_network_standardises_as_it_was_trained(encoder, trained_on):
    embedder = made(encoder, image_size=64).eval()
    x = torch.rand(2, 3, 64, 64)
    mean, deviation = embedder.mean, embedder.deviation
    assert mean[0].item() == pytest.approx(trained_on)
    with torch.no_grad():
        features = embedder.encoder((x - mean) / deviation)
        expected = features / features.norm(dim=1, keepdim=True)
        torch.testing.assert_close(embedder(x), expected)


def test_a_new_last_layer_keeps_angles():
    embedder = made(TINY, image_size=64, embedding_dim=16)
    assert isinstance(embedder.head, nn.Linear)
    weight = embedder.head.weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(16), atol=1e-5, rtol=1e-5)
    assert embedder.head.bias is None
    assert isinstance(made(TINY, image_size=64).head, nn.Identity)


@pytest.mark.parametrize(
    ("encoder", "gone"),
    [
        ("torchvision:resnet18", "fc"),
        ("torchvision:mobilenet_v3_small", "classifier.3"),
        ("torchvision:vit_b_32", "heads.head"),
        ("torchvision:swin_t", "head"),
        ("torchvision:convnext_tiny", "classifier.2"),
    ],
)
def test_the_last_layer_of_a_classifier_is_left_out(encoder, gone):
    embedder = made(encoder)
    assert isinstance(embedder.encoder.get_submodule(gone), nn.Identity)
    with torch.no_grad():
        assert embedder.eval()(torch.rand(1, *embedder.reads.shape)).shape == (
            1,
            embedder.embedding_dim,
        )


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@pytest.mark.parametrize("prefix", ["", "module.", "module.model."])
def test_weights_are_read_from_a_file(tmp_path, ending, prefix):
    torch.manual_seed(5)
    whole = timm.create_model("test_resnet", num_classes=7)  # with a classifier, which is dropped
    state = {f"{prefix}{key}": value for key, value in whole.state_dict().items()}
    path = tmp_path / f"weights.{ending}"
    if ending == "safetensors":
        save_file(state, path)
    else:
        torch.save({"epoch": 3, "state_dict": state}, path)
    asked = TrainConfig(data="photos", loss="sup_con", encoder=TINY, weights=str(path))
    embedder = build(asked, reads_of(asked))
    for key, value in embedder.encoder.state_dict().items():
        assert torch.equal(value, whole.state_dict()[key])
    assert embedder.origin["weights"] == str(path)
    assert embedder.origin["licence"] == "not stated"


def test_old_weights_without_counters_are_read(tmp_path):
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    kept = {key: value for key, value in state.items() if "num_batches" not in key}
    torch.save(kept, tmp_path / "old.pth")
    made_of(tmp_path / "old.pth")


def made_of(path: Path):
    asked = TrainConfig(data="photos", loss="sup_con", encoder=TINY, weights=str(path))
    return build(asked, reads_of(asked))


def test_weights_that_do_not_fit_are_refused(tmp_path):
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    first = next(iter(state))
    path = tmp_path / "x.pth"
    torch.save({key: value for key, value in state.items() if key != first}, path)
    with pytest.raises(InputError, match=f"it lacks {first}"):
        made_of(path)
    torch.save({**state, "extra.weight": torch.zeros(2)}, path)
    with pytest.raises(InputError, match=r"it has the unknown extra\.weight"):
        made_of(path)
    torch.save({**state, first: torch.zeros(2, 2)}, path)
    with pytest.raises(InputError, match=rf"{first} has shape \(2, 2\) in place of"):
        made_of(path)
    torch.save(nn.Linear(2, 2), path)  # a pickled object
    with pytest.raises(InputError, match="cannot be read as plain weights"):
        made_of(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="cannot be read as plain weights"):
        made_of(path)
    with pytest.raises(InputError, match="no such file of weights"):
        made_of(tmp_path / "none.pth")


@pytest.mark.parametrize(
    ("encoder", "says"),
    [
        ("timm:resnet_18", "similar names: .*resnet18"),
        ("torchvision:resnet", "similar names: resnet"),
        ("torchvision:squeezenet1_0", "no linear classifier"),
        ("torchvision:inception_v3", "several outputs"),
    ],
)
def test_networks_that_cannot_be_used_are_refused(encoder, says):
    with pytest.raises(InputError, match=says):
        made(encoder)


def test_a_size_that_a_network_does_not_take_is_refused():
    with pytest.raises(InputError, match="cannot make features of images of 100 x 100"):
        made("torchvision:vit_b_32", image_size=100)
    assert made("timm:vit_tiny_patch16_224", image_size=96).reads.shape == (3, 96, 96)


def test_missing_weights_name_the_option(monkeypatch):
    def offline(*_, pretrained, **__):
        raise OSError("no route to the hub")

    monkeypatch.setattr("timm.create_model", offline)
    asked = TrainConfig(data="photos", loss="sup_con", encoder=TINY)
    with pytest.raises(InputError, match=r"no route to the hub\.\)\. Give them .* --weights FILE"):
        build(asked, reads_of(asked))


def test_a_run_needs_neither_weights_nor_library_settings(
    identities, tmp_path, nearfar, monkeypatch
):
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    out = tmp_path / "run"
    options = ("--encoder", TINY, "--weights", tmp_path / "w.safetensors", "--embedding-dim", 8)
    ran = nearfar("train", identities, "--out", out, "--image-size", 64, *options, *SMALL)
    assert ran.status == 0, ran
    assert "embeddings of 8 dimensions, by a new last layer" in " ".join(ran.out.split())
    origin = json.loads((out / "summary.json").read_text())["encoder"]
    assert origin["name"] == TINY
    assert origin["library"] == f"timm {timm.__version__}"
    assert len(origin["weights_sha256"]) == 64
    (tmp_path / "w.safetensors").unlink()
    # Another version of the library may fit images in another way; the run keeps its own.
    found = import_module("nearfar.app.train.encoders.from_timm").describe("test_resnet")
    run = read_run(out)
    assert run.embedder.reads.shape == (3, 64, 64)
    assert run.embedder.reads.fit.resized == 64 * found.resized // found.side
    stored = load_safetensors(out / "model.safetensors")
    assert torch.equal(stored["mean"], run.embedder.mean)
    a, b = (identities / "0" / f"{k}.jpg" for k in range(2))
    assert embed_addresses(run, [str(a), str(b)]).shape == (2, 8)
    assert nearfar("evaluate", out).status == 0
    assert nearfar("verify", out, a, a).status == 0


@pytest.mark.parametrize("encoder", [TINY, "torchvision:mobilenet_v3_small"])
def test_a_run_on_files_is_the_same_run(identities, tmp_path, nearfar, monkeypatch, encoder):
    options = (
        "--encoder",
        encoder,
        "--weights",
        "random",
        "--image-size",
        64,
        *SMALL,
        "--no-augment",
    )
    asked = ("train", identities, *options)
    assert nearfar(*asked, "--out", tmp_path / "memory").status == 0
    monkeypatch.setattr("nearfar.app.data.image_files.IN_MEMORY", 0)
    ran = nearfar(*asked, "--out", tmp_path / "files")
    assert ran.status == 0
    assert "images/s by" in ran.out
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "files" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes()
    digests = [
        json.loads((tmp_path / run / "summary.json").read_text())["data"]["sha256"]
        for run in ("files", "memory")
    ]
    assert digests[0] == digests[1]
    again = nearfar("evaluate", tmp_path / "memory")  # read on demand now
    assert again.status == 0, again


def test_layers_nearer_to_the_input_learn_more_slowly():
    asked = config(TINY, layer_decay=0.5, learning_rate=0.1, embedding_dim=8, image_size=64)
    network = WithProxies(build(asked, reads_of(asked)), 3)
    depth = depths(network.embedder.encoder)
    last = max(depth.values())
    groups = parameter_groups(network, asked)
    rates = {
        id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]
    }
    assert len(rates) == len(list(network.parameters()))
    for name, parameter in network.embedder.encoder.named_parameters():
        rate, decay = rates[id(parameter)]
        assert rate == pytest.approx(0.1 * 0.5 ** (last - depth[name]))
        assert (decay == 0) == (parameter.ndim < 2)
    assert rates[id(network.embedder.head.weight)] == (0.1, asked.weight_decay)
    assert rates[id(network.proxies)] == (0.1, asked.weight_decay)
    assert depth["conv1.0.weight" if "conv1.0.weight" in depth else "conv1.weight"] == 0


# The first and last layers of each, counted by hand.
LAYERS = {
    "resnet18": ("conv1.weight", "layer1.0.conv1.weight", "layer4.1.bn2.weight", 8),
    "vit_b_32": (
        "conv_proj.weight",
        "encoder.layers.encoder_layer_0.ln_1.weight",
        "encoder.ln.bias",
        12,
    ),
    "convnext_tiny": (
        "features.0.0.weight",
        "features.1.0.block.0.weight",
        "classifier.0.weight",
        21,
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_torchvision_are_its_blocks(name):
    first, second, last, count = LAYERS[name]
    depth = depths(made(f"torchvision:{name}").encoder)
    assert depth[first] == 0
    assert depth[second] == 1
    assert depth[last] == max(depth.values()) == count
    assert set(depth.values()) == set(range(count + 1))


def test_files_are_decoded_for_a_large_set(identities, monkeypatch):
    from nearfar.app.data.items import items_of, read_data

    monkeypatch.setattr("nearfar.app.data.image_files.IN_MEMORY", 10**5)
    content = items_of(read_data(str(identities), reads_of(config(TINY, image_size=64)))).content
    assert isinstance(content, ImageFiles)
    assert content.shape == (3, 64, 64)
