"""Torch modules of the word networks, imported only when a network is built."""

from __future__ import annotations

import torch
from torch import nn

WIDTHS = (3, 4, 5)


class ConvolutionOverWords(nn.Module):
    """Parallel convolutions with ReLU and max pooling over time (Kim 2014)."""

    def __init__(self, words: int, embedding: int, filters: int, labels: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, embedding, padding_idx=0)
        self.convolutions = nn.ModuleList(nn.Conv1d(embedding, filters, width) for width in WIDTHS)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(filters * len(WIDTHS), labels)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Compute logits `[n, k]` from word ids `[n, t]` and mask `[n, t]`, ignoring windows that overlap padding."""
        states = self.embedding(ids).transpose(1, 2)
        pooled = []
        for width, convolution in zip(WIDTHS, self.convolutions, strict=True):
            found = torch.relu(convolution(states))
            real = mask[:, width - 1 :].clone()
            real[:, 0] = 1  # keep the first window, so that texts shorter than a window have a feature
            pooled.append(found.masked_fill(real[:, None] == 0, 0.0).amax(2))
        logits: torch.Tensor = self.output(self.dropout(torch.cat(pooled, dim=1)))
        return logits


class RecurrenceOverWords(nn.Module):
    """A bidirectional LSTM with max pooling over the words without padding."""

    def __init__(self, words: int, embedding: int, units: int, labels: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, embedding, padding_idx=0)
        self.recurrence = nn.LSTM(embedding, units, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(2 * units, labels)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Compute logits `[n, k]` from word ids `[n, t]` and mask `[n, t]`, ignoring padding."""
        lengths = mask.sum(1).clamp(min=1)
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embedding(ids), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        states, _ = nn.utils.rnn.pad_packed_sequence(
            self.recurrence(packed)[0], batch_first=True, total_length=ids.shape[1]
        )
        real = torch.arange(ids.shape[1], device=ids.device)[None] < lengths[:, None]
        pooled = states.masked_fill(~real[..., None], torch.finfo(states.dtype).min).amax(1)
        logits: torch.Tensor = self.output(self.dropout(pooled))
        return logits
