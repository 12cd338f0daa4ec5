"""The tool on texts, with a small encoder of sentence-transformers made here."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("sentence_transformers")

import numpy as np
import torch
from conftest import write_csv
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Normalize,
    Pooling,
    StaticEmbedding,
    Transformer,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import nearfar as nf
from nearfar.app.cli import main
from nearfar.app.data.texts import Texts
from nearfar.app.train.config import TrainConfig
from nearfar.app.train.encoders import build, reads_of
from nearfar.app.train.run import read_run
from nearfar.app.train.use import embed_addresses, embedded

TOPICS, EACH = 40, 6
WORDS = [f"word{i}" for i in range(160)]
COMMON = [f"common{i}" for i in range(20)]
FEW = ("--steps", "6", "--identities", "8", "--items", "4", "--far", "0.2", "--no-report")


def topic_texts() -> list[tuple[str, str]]:
    """Distinct texts of words of one topic and of words that say nothing, with the topic."""
    chance = np.random.default_rng(0)
    rows: dict[str, str] = {}
    for topic in range(TOPICS):
        own = WORDS[4 * topic : 4 * topic + 4]
        while list(rows.values()).count(f"topic {topic}") < EACH:
            chosen = [*chance.choice(own, 3), *chance.choice(COMMON, chance.integers(1, 9))]
            rows.setdefault(" ".join(chance.permutation(chosen)), f"topic {topic}")
    return list(rows.items())


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> Path:
    """A folder of a network of two layers that reads 16 tokens."""
    torch.manual_seed(0)
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *COMMON]
    vocabulary = {word: i for i, word in enumerate(known)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    )
    config = BertConfig(
        vocab_size=len(known),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    folder = tmp_path_factory.mktemp("bert")
    tokenizer.save_pretrained(folder)
    BertModel(config).save_pretrained(folder)
    first = Transformer(str(folder))
    made = SentenceTransformer(modules=[first, Pooling(32, "mean"), Normalize()], device="cpu")
    made.max_seq_length = 16
    out = tmp_path_factory.mktemp("encoders") / "tiny"
    made.save(str(out), create_model_card=False)
    return out


@pytest.fixture(scope="session")
def texts_csv(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.csv"
    return write_csv(path, ("text", "identity"), topic_texts())


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """Pairs of texts; every text has a similar one."""
    rows, chance = topic_texts(), np.random.default_rng(0)
    near = [(rows[i][0], rows[i + 1][0], "true") for i in range(len(rows)) if (i + 1) % EACH]
    drawn = chance.integers(0, len(rows), (800, 2)).tolist()
    far = [(rows[a][0], rows[b][0], "false") for a, b in drawn if rows[a][1] != rows[b][1]]
    path = tmp_path_factory.mktemp("text-pairs") / "pairs.csv"
    return write_csv(path, ("a", "b", "label"), [*near, *far])


def options(encoder: Path) -> tuple[str, ...]:
    return ("--encoder", f"sentence-transformers:{encoder}")


@pytest.fixture(scope="session")
def run(tmp_path_factory, texts_csv, encoder) -> Path:
    """A run with a layer after the encoder, whose original folder is gone."""
    gone = tmp_path_factory.mktemp("gone") / "encoder"
    shutil.copytree(encoder, gone)
    out = tmp_path_factory.mktemp("runs") / "texts"
    dim = ("--embedding-dim", "8")
    assert main(["train", str(texts_csv), "--out", str(out), *options(gone), *FEW, *dim]) == 0
    shutil.rmtree(gone)
    return out


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


# -- a run ----------------------------------------------------------------------------------------


def test_the_folder_of_a_run_opens_in_the_library_with_the_same_embeddings(run, texts_csv):
    items, x = embedded(read_run(run), str(texts_csv))
    assert isinstance(items.content, Texts)
    theirs = SentenceTransformer(str(run / "encoder"), device="cpu")
    found = theirs.encode(items.content.texts, convert_to_tensor=True)
    assert x.shape == (TOPICS * EACH, 8)
    torch.testing.assert_close(x, found, rtol=0, atol=1e-5)


def test_the_same_config_and_data_give_the_same_files(nearfar, encoder, texts_csv, tmp_path):
    for name in "ab":
        done = nearfar("train", texts_csv, "--out", tmp_path / name, *options(encoder), *FEW)
        assert done.status == 0, done.err
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*")]
    assert Path("encoder/modules.json") in files
    assert Path("model.safetensors") not in files
    for file in files:
        if (tmp_path / "a" / file).is_file():
            pair = [(tmp_path / name / file).read_bytes() for name in "ab"]
            assert pair[0] == pair[1], file
    assert not list((tmp_path / "a").rglob("*.bin"))


def test_training_brings_topics_together(nearfar, encoder, texts_csv, tmp_path):
    long = ("--steps", "60", "--learning-rate", "0.003", *FEW[2:])
    done = nearfar("train", texts_csv, "--out", tmp_path / "run", *options(encoder), *long)
    assert done.status == 0, done.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["data"]["input_shape"] == []
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_verify_compares_two_texts(nearfar, run, tmp_path, monkeypatch):
    done = nearfar("verify", run, "word0 word1", "word0 word1", "--json")
    assert done.status == 0
    assert json.loads(done.out)["distance"] == pytest.approx(0, abs=1e-6)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "word0").write_text("a file is a text too")
    assert nearfar("verify", run, "glyphs:1", "word0").status in (0, 1)
    assert "is empty; it must be a text" in nearfar("verify", run, " ", "a").error
    assert "not valid text" in nearfar("verify", run, "caf\udce9", "a").error


def test_evaluate_and_embed(nearfar, run, texts_csv, pairs, tmp_path):
    assert nearfar("evaluate", run).status == 0
    assert "was trained on" in nearfar("evaluate", run, texts_csv).err
    assert nearfar("evaluate", run, pairs).status == 0
    done = nearfar("embed", run, texts_csv, "--out", tmp_path / "e.npz")
    assert done.status == 0, done.err
    with np.load(tmp_path / "e.npz") as found:
        assert found["x"].shape == (TOPICS * EACH, 8)
        assert found["y"][0] == "topic 0"
    rows = [(text,) for text, _ in topic_texts()[:3]]
    alone = write_csv(tmp_path / "alone.csv", ("text",), [*rows, rows[0]])
    assert nearfar("embed", run, alone, "--out", tmp_path / "f.npz").status == 0
    with np.load(tmp_path / "f.npz") as found:
        assert found["x"].shape == (4, 8)
        assert np.allclose(found["x"][0], found["x"][3])
        assert "y" not in found


def test_pairs_train_by_their_labels(nearfar, encoder, pairs, tmp_path):
    done = nearfar("train", pairs, "--out", tmp_path / "run", *options(encoder), *FEW)
    assert done.status == 0, done.err
    config = (tmp_path / "run" / "config.toml").read_text()
    assert 'loss = "contrastive"' in config
    assert "chunk_tokens = 1024" in config
    assert nearfar("evaluate", tmp_path / "run").status == 0


def test_a_frozen_encoder_stays_as_it_is(nearfar, encoder, texts_csv, tmp_path):
    done = nearfar(
        "train", texts_csv, "--out", tmp_path / "run", *options(encoder), *FEW, "--freeze"
    )
    assert done.status == 0, done.err
    before, after = (SentenceTransformer(str(f)) for f in (encoder, tmp_path / "run" / "encoder"))
    for (name, one), other in zip(before[0].named_parameters(), after[0].parameters(), strict=True):
        assert torch.equal(one, other), name
    assert isinstance(after[-2], Dense)
    assert (
        "--chunk-tokens is for"
        in nearfar(
            "train",
            texts_csv,
            "--out",
            tmp_path / "b",
            *options(encoder),
            "--freeze",
            "--chunk-tokens",
            9,
        ).error
    )


def test_load_gives_a_module_that_reads_texts(run):
    model = nf.load(run)
    a, b = model(model.transform("word0 word1", "word2 common1"))
    found = embed_addresses(read_run(run), ["word0 word1", "word2 common1"])
    torch.testing.assert_close(torch.stack([a, b]), found, rtol=0, atol=1e-6)


# -- a damaged run --------------------------------------------------------------------------------


def test_every_file_of_the_encoder_is_checked(nearfar, copy):
    files = sorted(path for path in (copy / "encoder").rglob("*") if path.is_file())
    assert len(files) > 6
    for path in files:
        whole = path.read_bytes()
        for damage in (None, b"", whole[: len(whole) // 2], whole + b" "):
            path.unlink()
            if damage is not None:
                path.write_bytes(damage)
            error = nearfar("verify", copy, "a", "b").error
            assert path.name in error
            assert ("is missing" if damage is None else "is damaged") in error
            path.write_bytes(whole)
    assert nearfar("verify", copy, "a", "b").status in (0, 1)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 1}', '{"format": 1, "files": {"a": [1]}}', "{"]
)
def test_a_damaged_list_of_files_is_one_line(nearfar, copy, content):
    (copy / "encoder.json").write_text(content)
    assert "encoder.json" in nearfar("verify", copy, "a", "b").error
    shutil.rmtree(copy / "encoder")
    assert nearfar("verify", copy, "a", "b").status == 2


def test_foreign_files_are_not_used_nor_overwritten(nearfar, copy, texts_csv, encoder):
    """A file such as adapter_config.json would change what the library loads."""
    (copy / "encoder" / "notes.txt").write_text("mine")
    assert "not part of the run" in nearfar("verify", copy, "a", "b").error
    again = ("train", texts_csv, "--out", copy, *options(encoder), *FEW, "--overwrite")
    assert "'encoder/notes.txt', which is not part of a run" in nearfar(*again).error
    (copy / "encoder" / "notes.txt").unlink()
    assert nearfar(*again).status == 0


# -- encoders -------------------------------------------------------------------------------------


def made(encoder: Path, **more):
    config = TrainConfig(
        data="x.csv", loss="sup_con", encoder=f"sentence-transformers:{encoder}", **more
    )
    return build(config, reads_of(config))


def test_a_layer_after_the_encoder_leaves_angles_as_they_were(encoder):
    texts = [text for text, _ in topic_texts()[:40]]
    own, wide = made(encoder), made(encoder, embedding_dim=64)
    with torch.no_grad():
        x, y = (net.eval()(net.prepare(texts)) for net in (own, wide))
    assert (own.embedding_dim, wide.embedding_dim, y.shape) == (32, 64, (40, 64))
    torch.testing.assert_close(x @ x.T, y @ y.T, rtol=0, atol=1e-5)


def test_a_static_encoder_has_no_mask_to_cut_by(nearfar, encoder, texts_csv, tmp_path):
    tokenizer = SentenceTransformer(str(encoder)).tokenizer
    static = SentenceTransformer(
        modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu"
    )
    static.save(str(tmp_path / "static"), create_model_card=False)
    out = tmp_path / "run"
    done = nearfar("train", texts_csv, "--out", out, *options(tmp_path / "static"), *FEW)
    assert done.status == 0, done.err
    assert nearfar("verify", out, "word0", "word0").status == 0


def test_tokens_are_counted_before_they_are_cut_off(encoder):
    tokens = made(encoder).prepare
    assert tokens.limit == 16
    assert tokens.lengths(["word0", "word0 " * 40]) == [3, 42]
    assert tokens(["word0 " * 40])["input_ids"].shape == (1, 16)
    assert tokens.lengths([]) == []


@pytest.mark.parametrize("tokens", [1, 40, 10**6])
def test_chunks_give_the_gradients_of_the_whole_batch(encoder, tokens):
    from lightning_fabric import Fabric

    from nearfar.app.train.backward import backward

    net, labels = made(encoder).eval(), torch.arange(24) // EACH
    x = net.prepare([text for text, _ in topic_texts()[:24]])
    found = []
    for chunk_tokens in (None, tokens):
        net.zero_grad()

        def loss_of(z: torch.Tensor):
            return nf.sup_con_loss(z, labels), torch.ones(())

        z, loss, _ = backward(net, x, loss_of, Fabric(accelerator="cpu"), chunk_tokens)
        gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        found.append([z.detach(), loss.detach(), *gradients])
    assert len(found[0]) > 20
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_what_is_no_encoder_is_one_line(nearfar, texts_csv, encoder, tmp_path, monkeypatch):
    def error(source: object, *more: str) -> str:
        made = ("--encoder", f"sentence-transformers:{source}")
        return nearfar("train", texts_csv, "--out", tmp_path / "run", *made, *FEW, *more).error

    assert "no such folder: ./missing" in error("./missing")
    assert "no such folder: (empty)" in error("")
    (tmp_path / "empty").mkdir()
    assert "cannot be read by sentence-transformers" in error(tmp_path / "empty")
    assert "--image-size is for image files" in error(encoder, "--image-size", "32")
    assert (
        "reads texts, and glyphs is no table"
        in nearfar("train", "glyphs", "--out", tmp_path / "run", *options(encoder)).error
    )
    pickled = Path(shutil.copytree(encoder, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "a pickle, which is never loaded" in error(pickled)
    foreign = Path(shutil.copytree(encoder, tmp_path / "foreign"))
    modules = (foreign / "modules.json").read_text()
    named = modules.replace("sentence_transformers.base.modules.normalize", "mine")
    (foreign / "modules.json").write_text(named)
    assert "cannot be read" in error(foreign)
    assert not (tmp_path / "run").exists()

    def no_connection(*_, **__):
        raise ConnectionError("no connection")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_connection)
    assert "cannot be fetched (no connection)" in error("nobody/nothing-of-this-name")


def test_a_missing_library_names_the_extra(nearfar, texts_csv, encoder, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    done = nearfar("train", texts_csv, "--out", tmp_path / "run", *options(encoder))
    assert "pip install 'nearfar[st]'" in done.error


# -- the doctor and the report --------------------------------------------------------------------


def test_the_doctor_says_before_training_what_it_finds(nearfar, encoder, tmp_path):
    rows = topic_texts()
    rows += [(f"{rows[0][0].upper()}!", "topic 1"), (" ".join(WORDS[:60]), "topic 2")]
    rows += [(" ".join(WORDS[i : i + 30]), "topic 3") for i in range(5)]
    path = write_csv(tmp_path / "texts.csv", ("text", "identity"), rows)
    done = nearfar("train", path, "--out", tmp_path / "run", *options(encoder), *FEW)
    assert done.status == 0, done.err
    assert "! copied-texts: 2 of 247 texts are also under another identity" in done.out
    assert "! cut-off-texts: " in done.out
    assert "more than 16 tokens" in done.out
    assert "The longest has 62: 'word0 word1" in done.out
    assert done.out.index("cut-off-texts") < done.out.index("step 1/")
    found = json.loads(nearfar("doctor", tmp_path / "run", "--json").out)["findings"]
    assert {"copied-texts", "cut-off-texts"} <= {finding["name"] for finding in found}


def test_the_report_shows_the_hardest_pairs_as_text(nearfar, encoder, tmp_path):
    rows = [(f"<b>{text}</b>\u202e & {'common0 ' * 60}", topic) for text, topic in topic_texts()]
    path = write_csv(tmp_path / "texts.csv", ("text", "identity"), rows)
    out = tmp_path / "run"
    assert nearfar("train", path, "--out", out, *options(encoder), *FEW).status == 0
    assert nearfar("report", out).status == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert '<p class="text" dir="auto">&lt;b&gt;' in page
    assert "each a text" in page
    assert "\u202e" not in page
    assert "…</p>" in page


def test_a_config_repeats_a_run(nearfar, encoder, texts_csv, tmp_path):
    first = ("train", texts_csv, "--out", tmp_path / "a", *options(encoder), *FEW)
    assert nearfar(*first).status == 0
    again = ("train", "--config", tmp_path / "a" / "config.toml", "--out", tmp_path / "b")
    assert nearfar(*again, "--no-report").status == 0
    for name in ("summary.json", "encoder.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
