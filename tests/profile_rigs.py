"""Models, batches and blocks of memory that the tests of profiles share."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from chunkft.profiling import Block

VOCABULARY = 900


def llama(layers=3, hidden=32, vocabulary=VOCABULARY, dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        vocab_size=vocabulary,
    )
    return LlamaForCausalLM(config).to(dtype)


def batches(count=3, shape=(2, 37), vocabulary=VOCABULARY):
    generator = torch.Generator().manual_seed(0)
    found = [torch.randint(0, vocabulary, shape, generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in found]


def chain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(19, 40), nn.Sigmoid(), nn.Linear(40, 23), nn.Sigmoid(), nn.Linear(23, 5))


def chain_loss(model, x):
    return model(x).square().sum()


def data(count=2):
    return [torch.randn(7, 19) for _ in range(count)]


def block(category, nbytes, born, freed, **more):
    values = {"op": "op", "module": "m", "phase": "forward", "shape": (1,), "dtype": "float32", **more}
    return Block(nbytes=nbytes, category=category, born=born, freed=freed, **values)
