"""Models of many transformers families with random weights, two layers and odd sizes; no dropout."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 61
ATTENTION = {
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "attn_implementation": "eager",
}
DECODER = {
    **ATTENTION,
    "vocab_size": VOCABULARY,
    "intermediate_size": 44,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {
    **ATTENTION,
    "vocab_size": VOCABULARY,
    "intermediate_size": 44,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
SEQUENCE_TO_SEQUENCE = {
    "d_model": 36,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 44,
    "decoder_ffn_dim": 44,
    "dropout": 0.0,
    "attn_implementation": "eager",
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# family: (configuration class, model class, arguments of the configuration, kind of batch)
FAMILIES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", DECODER, "text"),
    "llama-tied": ("LlamaConfig", "LlamaForCausalLM", {**DECODER, "tie_word_embeddings": True}, "text"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**DECODER, "head_dim": 12}, "text"),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**DECODER, "sliding_window": 5}, "text"),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**DECODER, "head_dim": 12, "sliding_window": 5, "sliding_window_pattern": 2},
        "text",
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**DECODER, "resid_pdrop": 0.0}, "text"),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 36,
            "n_layer": 2,
            "n_head": 3,
            "n_positions": 32,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "attn_implementation": "eager",
            **SPECIAL,
        },
        "text",
    ),
    "gpt-neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", DECODER, "text"),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            **ATTENTION,
            "vocab_size": VOCABULARY,
            "ffn_dim": 44,
            "word_embed_proj_dim": 20,
            "dropout": 0.0,
            **SPECIAL,
        },
        "text",
    ),
    "bert": ("BertConfig", "BertForSequenceClassification", {**ENCODER, "num_labels": 3}, "classes"),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", {**ENCODER, "max_position_embeddings": 40}, "text"),
    "deberta-v2": (
        "DebertaV2Config",
        "DebertaV2ForSequenceClassification",
        {
            **{key: value for key, value in ENCODER.items() if key != "attn_implementation"},
            "relative_attention": True,
            "max_relative_positions": 8,
            "position_buckets": 4,
            "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm",
            "pooler_dropout": 0.0,
            "pooler_hidden_size": 36,
            "num_labels": 3,
        },
        "classes",
    ),
    "mobilebert": (
        "MobileBertConfig",
        "MobileBertForMaskedLM",
        {**ENCODER, "embedding_size": 12, "intra_bottleneck_size": 18, "num_feedforward_networks": 1},
        "text",
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 36,
            "d_kv": 12,
            "d_ff": 44,
            "num_layers": 2,
            "num_heads": 3,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "eos_token_id": 2,
        },
        "text",
    ),
    "bart": (
        "BartConfig",
        "BartForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            **SEQUENCE_TO_SEQUENCE,
            "max_position_embeddings": 32,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
            **SPECIAL,
        },
        "text",
    ),
    "whisper": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            **SEQUENCE_TO_SEQUENCE,
            "num_mel_bins": 7,
            "max_source_positions": 10,
            "max_target_positions": 32,
            "decoder_start_token_id": 2,
            "begin_suppress_tokens": None,
            **SPECIAL,
        },
        "sound",
    ),
    "clip": (
        "CLIPConfig",
        "CLIPModel",
        {
            "projection_dim": 10,
            "text_config": {**ENCODER, **SPECIAL},
            "vision_config": {**ATTENTION, "intermediate_size": 44, "image_size": 12, "patch_size": 4},
            "attn_implementation": "eager",
        },
        "pairs",
    ),
    "convnext": (
        "ConvNextConfig",
        "ConvNextForImageClassification",
        {"hidden_sizes": [12, 20], "depths": [1, 2], "num_stages": 2, "patch_size": 2, "num_labels": 3},
        "images",
    ),
    "vit": (
        "ViTConfig",
        "ViTForImageClassification",
        {
            **ATTENTION,
            "intermediate_size": 44,
            "image_size": 12,
            "patch_size": 4,
            "num_labels": 3,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        "images",
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**DECODER, "num_local_experts": 3, "num_experts_per_tok": 2},
        "text",
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            **DECODER,
            "head_dim": 12,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "mlp_only_layers": [],
        },
        "text",
    ),
    "gpt-oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {**DECODER, "head_dim": 12, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 5},
        "text",
    ),
    "mamba": (
        "MambaConfig",
        "MambaForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 36, "num_hidden_layers": 2, "state_size": 5, **SPECIAL},
        "text",
    ),
}


def build(family: str, **changes: Any) -> nn.Module:
    """A model of the family in training mode, with the same random weights at every call."""
    import transformers

    config_class, model_class, arguments, _ = FAMILIES[family]
    torch.manual_seed(len(family))
    model: nn.Module = getattr(transformers, model_class)(
        getattr(transformers, config_class)(**{**arguments, **changes})
    )
    return model.train()


def batch(family: str, number: int = 0) -> dict[str, Any]:
    """Arguments of a forward pass that returns a loss."""
    generator = torch.Generator().manual_seed(100 + number)
    kind = FAMILIES[family][3]
    if kind == "images":
        return {
            "pixel_values": torch.randn(4, 3, 12, 12, generator=generator),
            "labels": torch.randint(0, 3, (4,), generator=generator),
        }
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=generator)
    if kind == "sound":
        return {"input_features": torch.randn(3, 7, 20, generator=generator), "labels": ids}
    if kind == "pairs":
        return {
            "input_ids": ids,
            "pixel_values": torch.randn(3, 3, 12, 12, generator=generator),
            "return_loss": True,
        }
    if kind == "classes":
        return {"input_ids": ids, "labels": torch.randint(0, 3, (3,), generator=generator)}
    return {"input_ids": ids, "labels": ids}


def loss_of(family: str, number: int = 0) -> Callable[[nn.Module], Tensor]:
    arguments = batch(family, number)

    def loss(model: nn.Module) -> Tensor:
        result: Tensor = model(**arguments).loss
        return result

    return loss
