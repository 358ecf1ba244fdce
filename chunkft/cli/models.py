"""Loads models and tokenizers, and says in one line what is wrong with those that cannot be trained."""

import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import chunkft
from chunkft.cli.errors import UserError

__all__ = [
    "config_of",
    "empty_model",
    "enable_gradient_checkpointing",
    "fit_embeddings",
    "load_causal",
    "load_classifier",
    "load_tokenizer",
    "pad_token",
    "quiet_transformers",
    "resolve_device",
    "resolve_dtype",
]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CAUSALITY_PROBE = 8
Place = Callable[[torch.nn.Module], object]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences the warnings and progress bars of transformers and datasets inside the block."""
    import transformers

    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if importlib.util.find_spec("datasets") is not None:  # commands that read no data do without it
        import datasets

        datasets.disable_progress_bars()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)
        transformers.utils.logging.enable_progress_bar()


def _check_source(model: str, *, weights: bool) -> None:
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"--model {model}: the directory has no config.json")
        if weights and not any((path / name).is_file() for name in WEIGHT_FILES):
            raise UserError(
                f"--model {model}: the directory has no weights (one of {', '.join(WEIGHT_FILES)})"
            )
        return
    if path.exists():
        raise UserError(f"--model {model}: a file; expected a model directory or a hub id")
    if not HUB_ID.fullmatch(model):
        raise UserError(f"--model {model}: no such directory, and not a hub id (NAME or OWNER/NAME)")


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def config_of(model: str, *, weights: bool = True) -> Any:
    """The transformers config of a model directory or hub id.

    Raises UserError for a directory without config.json or (with `weights`) without weights, and for an
    unknown id.
    """
    from transformers import AutoConfig

    _check_source(model, weights=weights)
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--model {model}: its configuration cannot be loaded: {_reason(error)}") from error


def load_tokenizer(model: str) -> Any:
    """The tokenizer that comes with a model; raises UserError if there is none or it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:
        raise UserError(f"--model {model}: its tokenizer cannot be loaded: {_reason(error)}") from error


def pad_token(tokenizer: Any, config: Any) -> int:
    """The id to pad with: the tokenizer's, else the config's, else the end-of-text token (padding is masked
    anyway).
    """
    text = getattr(config, "text_config", config)
    for candidate in (tokenizer.pad_token_id, getattr(text, "pad_token_id", None), tokenizer.eos_token_id):
        if candidate is not None and candidate >= 0:
            return int(candidate)
    return 0


def resolve_device(name: str) -> torch.device:
    """The torch device that --device names; `auto` is the first GPU, or the CPU where there is none.

    A numbered GPU becomes the only one that this process sees, because Trainer always works on the first.
    """
    kind, _, index = name.partition(":")
    if index:
        visible = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
        if visible and int(index) >= len(visible):
            raise UserError(
                f"--device {name}: CUDA_VISIBLE_DEVICES has {len(visible)} devices, numbered from 0"
            )
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[int(index)] if visible else index
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this torch sees no such CUDA device; allowed here: auto, cpu")
    return torch.device("cuda", 0) if kind == "cuda" else torch.device("cpu")


def resolve_dtype(name: str, config: Any, device: torch.device) -> torch.dtype:
    """The dtype that --dtype names; `auto` is bf16 for a 16-bit model on a GPU and fp32 otherwise."""
    if name != "auto":
        return DTYPES[name]
    stored = getattr(config, "dtype", None)
    half = stored in (torch.bfloat16, torch.float16, "bfloat16", "float16")
    return torch.bfloat16 if half and device.type == "cuda" else torch.float32


def _load(
    auto_class: Any, model: str, task: str, dtype: torch.dtype, place: Place | None = None, **options: Any
) -> Any:
    try:
        if place is not None:
            return chunkft.load_streamed(model, dtype=dtype, task=auto_class, place=place, **options)
        return auto_class.from_pretrained(model, dtype=dtype, **options)
    except UserError:
        raise
    except ValueError as error:
        if "Unrecognized configuration class" in str(error):
            kind = config_of(model).model_type
            raise UserError(
                f"--model {model}: model type {kind!r} cannot be trained for --task {task}"
            ) from error
        raise UserError(f"--model {model}: its weights cannot be loaded: {_reason(error)}") from error
    except Exception as error:
        raise UserError(f"--model {model}: its weights cannot be loaded: {_reason(error)}") from error


def load_causal(
    model: str, dtype: torch.dtype, device: torch.device, place: Place | None = None
) -> torch.nn.Module:
    """Loads a causal language model, by ``place`` into host pages that its weights stream from; raises UserError if the
    logits of a position depend on later tokens.
    """
    from transformers import AutoModelForCausalLM

    config = config_of(model)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"--model {model}: model type {config.model_type!r} is an encoder-decoder, not a causal model"
        )
    loaded: torch.nn.Module = _load(AutoModelForCausalLM, model, "causal-lm", dtype, place).to(device)
    if not is_causal(loaded, device):
        raise UserError(
            f"--model {model}: {type(loaded).__name__} is not causal (its predictions look at later tokens);"
            " --task causal-lm needs a decoder"
        )
    return loaded


@torch.no_grad()
def is_causal(model: torch.nn.Module, device: torch.device) -> bool:
    """Tells by two forward passes whether changing the last token leaves the logits before it alone."""
    training = model.training
    model.eval()
    ids = torch.ones(2, CAUSALITY_PROBE, dtype=torch.int64, device=device)
    ids[1, -1] = 2
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1].float()
    model.train(training)
    scale = logits.abs().max().clamp(min=1e-6)
    return bool((logits[0] - logits[1]).abs().max() <= 1e-3 * scale)


def load_classifier(
    model: str,
    dtype: torch.dtype,
    device: torch.device,
    labels: dict[str, int],
    pad: int,
    place: Place | None = None,
) -> tuple[torch.nn.Module, bool]:
    """Loads a sequence classifier for `labels`; the second value tells whether its head is new (random)."""
    from transformers import AutoModelForSequenceClassification

    names = {index: name for name, index in labels.items()}
    loaded, info = _load(
        AutoModelForSequenceClassification,
        model,
        "sequence-classification",
        dtype,
        place,
        num_labels=len(labels),
        id2label=names,
        label2id=dict(labels),
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    loaded.config.pad_token_id = pad
    new_head = bool(info["missing_keys"] or info.get("mismatched_keys"))
    return loaded.to(device), new_head


def longest_sequence(config: Any) -> int | None:
    """The number of positions a model was made for, or None where its config sets no limit."""
    text = getattr(config, "text_config", config)
    limit = getattr(text, "max_position_embeddings", None)
    return int(limit) if isinstance(limit, int) and limit > 0 else None


def check_positions(model: torch.nn.Module, name: str, seq_len: int) -> None:
    """Raise UserError if some positions of a sequence have no row in a learned embedding of positions.

    RoBERTa and its kin number positions from behind their padding index, so fewer are left than the config says.
    """
    for path, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if not isinstance(module, torch.nn.Embedding) or not path.endswith("position_embeddings"):
            continue
        limit = module.num_embeddings - (0 if padding is None else padding + 1)
        if seq_len > limit:
            raise UserError(f"--seq-len {seq_len}: {name} was made for at most {limit} tokens")


def fit_embeddings(model: Any, name: str, tokens: int, largest: int, pad: int, resize: bool) -> str | None:
    """Compares what the tokenizer and the data need with the rows of the embedding, or adds rows with `resize`.

    Args:
        model: of transformers.
        name: what --model says.
        tokens: length of the tokenizer.
        largest: id of the data.
        pad: id that batches are padded with.
        resize: whether rows may be added.

    Returns:
        A note on what was done or noticed, or None.

    Raises:
        UserError: if an id would have no row.
    """
    embedding = model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    if rows is None:
        return None
    needed = max(tokens, largest + 1, pad + 1)
    if needed <= rows:
        return None
    if resize:
        try:
            model.resize_token_embeddings(needed)
        except (NotImplementedError, ValueError, AttributeError) as error:
            raise UserError(
                f"--resize-embeddings: {type(model).__name__} cannot be resized: {_reason(error)}"
            ) from error
        return f"embeddings resized from {rows:,} to {needed:,} rows"
    if max(largest, pad) < rows:
        return (
            f"note: the tokenizer has {tokens:,} tokens and the embedding {rows:,} rows; the data uses none of the"
            " tokens beyond"
        )
    what = f"the data has token id {largest:,}" if largest >= rows else f"the padding token has id {pad:,}"
    raise UserError(
        f"--model {name}: its tokenizer has {tokens:,} tokens and its embedding {rows:,} rows, and {what}; add rows"
        " with --resize-embeddings"
    )


def enable_gradient_checkpointing(model: Any) -> None:
    """Recomputes activations in the backward pass, by the non-reentrant way that partly frozen modules
    need.
    """
    options = {"use_reentrant": False}
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(f"--gradient-checkpointing: {type(model).__name__} does not support it")
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    # Some versions let the embeddings' output require grad, which only the reentrant way needs: the backward pass
    # would run down to them instead of stopping at the active chunk.
    if getattr(model, "_require_grads_hooks", None) or getattr(model, "_require_grads_hook", None):
        model.disable_input_require_grads()


def empty_model(model: str, task: str) -> torch.nn.Module:
    """Builds the model from its config alone on the meta device: shapes and names, no memory."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = config_of(model, weights=False)
    auto_class = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
    try:
        with torch.device("meta"):
            built: torch.nn.Module = auto_class.from_config(config)
            return built
    except ValueError as error:
        raise UserError(
            f"--model {model}: model type {config.model_type!r} cannot be built for --task {task}:"
            f" {_reason(error)}"
        ) from error
