"""The trainer of `chunkft finetune`: ChunkTrainer that counts tokens and measures the activations autograd
saves.
"""

from typing import Any

import torch

import chunkft
from chunkft.cli.progress import Metrics
from chunkft.integrations.transformers import ChunkTrainer

__all__ = ["FinetuneTrainer", "activations_of_full_training"]


class FinetuneTrainer(ChunkTrainer):
    """Counts the tokens of every step, and measures saved activations once for every chunk.

    `saved_peak` is the largest number of bytes that a forward pass saved, `peak_batch` the batch it was
    measured on.
    """

    def __init__(self, *args: Any, metrics: Metrics, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.metrics = metrics
        self.saved_peak: int | None = None
        self.peak_batch: dict[str, torch.Tensor] | None = None
        self.measures = True
        self._measured: set[int] = set()

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of Trainer; the first forward pass of every chunk is measured."""
        if not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        self.metrics.tokens += self._tokens(inputs)
        optimizer = self.chunk_optimizer
        chunk = -1 if optimizer is None else optimizer.active
        if chunk in self._measured or not self.measures:
            return self._training_loss(model, inputs, *args, **kwargs)
        self._measured.add(chunk)
        with chunkft.saved_activations(model) as saved:
            loss = self._training_loss(model, inputs, *args, **kwargs)
        if self.saved_peak is None or saved.peak_bytes > self.saved_peak:
            self.saved_peak = saved.peak_bytes
            self.peak_batch = {name: value.detach().clone() for name, value in inputs.items()}
        return loss

    def _tokens(self, inputs: dict[str, Any]) -> int:
        return int(inputs["attention_mask"].sum())

    def _training_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, inputs, *args, **kwargs)


def activations_of_full_training(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> int | None:
    """Bytes that a forward pass on `batch` saves when every weight of `model` is trained; None if memory does
    not hold it.

    The model must be free of chunk operators; its mode and requires_grad flags are as before afterwards.
    """
    flags = [(weight, weight.requires_grad) for weight in model.parameters()]
    training = model.training
    model.train()
    try:
        for weight, _ in flags:
            weight.requires_grad_(True)
        with chunkft.saved_activations(model) as saved:
            model(**batch)
        return saved.peak_bytes
    except torch.OutOfMemoryError:
        return None
    finally:
        for weight, flag in flags:
            weight.requires_grad_(flag)
        model.train(training)
