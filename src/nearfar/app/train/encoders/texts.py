"""Encoders of texts, from the library sentence-transformers."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nearfar.app.data.content import Batch
from nearfar.app.data.reads import Reads
from nearfar.app.errors import InputError
from nearfar.app.names import SENTENCE_TRANSFORMERS
from nearfar.app.text import printable
from nearfar.app.train.config import TrainConfig
from nearfar.app.train.encoders.embedder import Embedder
from nearfar.extras import needs

READS = Reads(shape=(), texts=True)
EMBEDDING = "sentence_embedding"  # what the modules of the library call it
PICKLED = "pytorch_model.bin"
SECONDS = 10  # to wait for the server
# What may go wrong in a folder of another's making: almost anything.
UNREADABLE = (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, ImportError)


class TextEncoder(nn.Module):
    """The modules of a SentenceTransformer, without a last one that scales to length 1.

    Attributes:
        model: the SentenceTransformer.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Batch) -> Tensor:
        """Tokens as `Tokens` gives them, n texts, to (n, features)."""
        found: Tensor = self.model(dict(x))[EMBEDDING]
        return found


class Tokens:
    """Makes the input of an encoder of some texts, as its own `encode` does.

    Attributes:
        prompt: the text that the encoder puts before each; often empty.
        limit: the most tokens that the encoder reads of a text; None if all.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        name = model.default_prompt_name
        self.prompt = "" if name is None else model.prompts[name]
        limit = model.max_seq_length
        counts = isinstance(limit, int) and callable(getattr(model, "tokenizer", None))
        self.limit: int | None = limit if counts else None

    def __call__(self, texts: Sequence[str]) -> dict[str, Any]:
        found = self._model.preprocess(list(texts), prompt=self.prompt or None)
        return {name: value for name, value in found.items() if not isinstance(value, str)}

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has, before any are cut off."""
        if not texts:  # which tokenizers do not take
            return []
        whole = [f"{self.prompt}{text}" for text in texts]
        found = self._model.tokenizer(whole, truncation=False, padding=False, verbose=False)
        return [len(ids) for ids in found["input_ids"]]


def reads(config: TrainConfig) -> Reads:
    """Texts.

    Raises:
        InputError: a setting is for images.
    """
    if config.image_size is not None:
        raise InputError(f"--image-size is for image files; {config.encoder} reads texts.")
    return READS


def build(config: TrainConfig, reads: Reads, *, weights: bool) -> Embedder:
    """The encoder of a config, followed by one layer if --embedding-dim or --freeze asks for it.

    Raises:
        InputError: there is no such encoder, or it cannot be used.
    """
    source = config.encoder.partition(":")[2]
    encoder, tokens = _opened(source, f"--encoder {config.encoder}")
    features = _features(encoder, tokens, f"--encoder {config.encoder}")
    embedding_dim = config.embedding_dim or features
    head = None
    if embedding_dim != features or config.freeze:
        head = nn.Linear(features, embedding_dim, bias=False)
        nn.init.orthogonal_(head.weight)  # leaves the angles about as they were
    return Embedder(encoder, reads, embedding_dim, head=head, prepare=tokens, pretrained=True)


def save(embedder: Embedder, folder: Path) -> None:
    """Write a folder from which `SentenceTransformer(folder)` gives the same embeddings."""
    SentenceTransformer, modules = _library()  # noqa: N806 - classes
    model: Any = embedder.encoder.model
    parts = [*model]
    if isinstance(head := embedder.head, nn.Linear):
        weight, linear = head.weight.detach(), nn.Identity()
        sizes = head.in_features, head.out_features
        parts.append(modules.Dense(*sizes, False, linear, init_weight=weight))
    parts.append(modules.Normalize())
    whole = SentenceTransformer(
        modules=parts,
        prompts=model.prompts,
        default_prompt_name=model.default_prompt_name,
        similarity_fn_name="cosine",
        device="cpu",
    )
    with _quietly():
        whole.save(str(folder), create_model_card=False)  # which would hold the date


def load(folder: Path) -> Embedder:
    """The encoder in a folder that `save` wrote.

    Raises:
        InputError: it cannot be used.
    """
    encoder, tokens = _opened(str(folder), str(folder), local=True)
    features = _features(encoder, tokens, str(folder))
    return Embedder(encoder, READS, features, prepare=tokens, pretrained=True)


def _opened(source: str, called: str, *, local: bool = False) -> tuple[TextEncoder, Tokens]:
    """The encoder in a folder, or of this name.

    Args:
        source: the folder or the name.
        called: what it is called in errors.
        local: whether nothing may be fetched.
    """
    folder = Path(source).expanduser()
    if source and folder.is_dir():
        _refuse_pickled(folder, called)
        source, local = str(folder), True
    elif source and folder.is_file():
        raise InputError(f"{called}: {source} is a file. Name the folder of the model.")
    elif local or not source or source[0] in "./~" or source.count("/") > 1:
        raise InputError(f"{called}: no such folder: {source or '(empty)'}")
    SentenceTransformer, modules = _library()  # noqa: N806 - classes

    def open_(*, local: bool) -> Any:
        with _quietly():
            return SentenceTransformer(
                source,
                device="cpu",
                local_files_only=local,
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True, "dtype": torch.float32},
            ).float()

    try:
        model = open_(local=True) if local else _cached_or_fetched(open_, source, called)
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(
            f"{called} cannot be read by {SENTENCE_TRANSFORMERS}: {_in_a_line(error)}"
        ) from None
    if len(model) and isinstance(model[-1], modules.Normalize):
        del model[-1]
    return TextEncoder(model), Tokens(model)


def _cached_or_fetched(open_: Any, name: str, called: str) -> Any:
    """The model of this name from the user's cache, or else from the server."""
    try:
        return open_(local=True)
    except OSError:  # not in the cache
        pass
    from huggingface_hub import HfApi

    try:
        with _quietly():
            HfApi().model_info(name, timeout=SECONDS)  # once: the library tries for a minute
    except Exception as error:  # errors of several libraries
        raise InputError(
            f"{called} is no folder, is not in the cache of models, and cannot be fetched "
            f"({_in_a_line(error)}). Name the folder of a model, or try again with a "
            "connection."
        ) from None
    return open_(local=False)


def _features(encoder: TextEncoder, tokens: Tokens, called: str) -> int:
    """The numbers that it gives for a text."""
    encoder.eval()
    try:
        with torch.no_grad():
            found = encoder(tokens(["a", "b"]))
        if found.shape[0] != 2 or found.ndim != 2:
            raise ValueError(f"it turns 2 texts into {tuple(found.shape)}")
    except UNREADABLE as error:
        raise InputError(f"{called} does not embed texts: {_in_a_line(error)}") from None
    return int(found.shape[1])


def _refuse_pickled(folder: Path, called: str) -> None:
    """Refuse weights that only a pickle holds."""
    for pickled in sorted(folder.rglob(PICKLED)):
        if not any(pickled.parent.glob("*.safetensors")):
            raise InputError(
                f"{called} holds {pickled.relative_to(folder)}, a pickle, which is never loaded. "
                "Save the model again with safetensors: model.save(FOLDER)."
            )


def _library() -> tuple[Any, Any]:
    """The class `SentenceTransformer`, and the library's modules."""
    try:
        with needs("st"):
            from sentence_transformers import SentenceTransformer
            from sentence_transformers.sentence_transformer import modules
    except ModuleNotFoundError as missing:
        raise InputError(str(missing)) from None
    return SentenceTransformer, modules


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the log and the progress bars of the libraries."""
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar
    from transformers.utils.logging import is_progress_bar_enabled as enabled

    loggers = [
        logging.getLogger(name)
        for name in (SENTENCE_TRANSFORMERS.replace("-", "_"), "transformers", "huggingface_hub")
    ]
    levels, bars = [logger.level for logger in loggers], enabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            enable_progress_bar()


def _in_a_line(error: BaseException) -> str:
    """The first line of an error, at most 300 characters."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return printable(lines[0][:300]) if lines else type(error).__name__
