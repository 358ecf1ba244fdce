"""Shapes of public models, so that they can be planned for without network."""

from typing import Any

__all__ = ["PRESETS", "config_of_preset", "preset_named"]

LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
QWEN = {"vocab_size": 152064, "num_key_value_heads": 8, "max_position_embeddings": 131072}

# name: (short name, class of the configuration, where its config.json is published, its sizes)
PRESETS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llama-3.2-1b": (
        "1B", "LlamaConfig", "huggingface.co/meta-llama/Llama-3.2-1B",
        {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
         "tie_word_embeddings": True},
    ),
    "llama-3.2-3b": (
        "3B", "LlamaConfig", "huggingface.co/meta-llama/Llama-3.2-3B",
        {**LLAMA, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
         "tie_word_embeddings": True},
    ),
    "llama-3.1-8b": (
        "8B", "LlamaConfig", "huggingface.co/meta-llama/Llama-3.1-8B",
        {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "tie_word_embeddings": False},
    ),
    "qwen2.5-14b": (
        "14B", "Qwen2Config", "huggingface.co/Qwen/Qwen2.5-14B",
        {**QWEN, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40,
         "tie_word_embeddings": False},
    ),
    "qwen2.5-32b": (
        "32B", "Qwen2Config", "huggingface.co/Qwen/Qwen2.5-32B",
        {**QWEN, "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
         "tie_word_embeddings": False},
    ),
    "llama-3.1-70b": (
        "70B", "LlamaConfig", "huggingface.co/meta-llama/Llama-3.1-70B",
        {**LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
         "tie_word_embeddings": False},
    ),
}  # fmt: skip


def preset_named(name: str) -> str | None:
    """The preset that a full or a short name means, in any case; None if there is none."""
    asked = name.lower()
    return next((key for key, (short, *_) in PRESETS.items() if asked in (key, short.lower())), None)


def config_of_preset(name: str) -> Any:
    """The configuration of a preset, by its full name."""
    import transformers

    _, kind, _, sizes = PRESETS[name]
    return getattr(transformers, kind)(**sizes)
