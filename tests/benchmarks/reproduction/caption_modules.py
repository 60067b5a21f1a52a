"""Torch modules of the captioner: an image network, soft attention over its feature map, and an LSTM."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

PAD, START, END, UNKNOWN = 0, 1, 2, 3
"""Word ids that every vocabulary contains."""


class Eye(nn.Module):
    """Image network without its last layer, from images to feature maps with one vector per position."""

    def __init__(self, architecture: dict[str, Any]) -> None:
        super().__init__()
        if architecture["kind"] == "small":
            from langchain_datashunt.small_models.kinds.image_modules import SmallResNet

            self.network: nn.Module = SmallResNet(
                architecture["depth"], architecture["width"], architecture["channels"]
            )
            self.size = int(self.network.size)
        else:
            from transformers import ResNetConfig, ResNetModel

            config = ResNetConfig(**architecture["config"])
            self.network = ResNetModel(config)
            self.size = int(config.hidden_sizes[-1])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return features `[n, places, size]` of images `[n, c, h, w]`."""
        found = self.network(images)
        states: torch.Tensor = getattr(found, "last_hidden_state", found)
        return states.flatten(2).transpose(1, 2)


class AttendingWriter(nn.Module):
    """Show, attend and tell (Xu et al. 2015) with soft attention.

    For each word, attention weights all positions of the image by the state of the LSTM, and a gate scales the result.
    The next word is predicted from the last word, the state and the attention output (deep output).
    """

    def __init__(self, architecture: dict[str, Any], words: int, embedding: int, units: int, dropout: float) -> None:
        super().__init__()
        self.eye = Eye(architecture)
        places = self.eye.size
        self.embedding = nn.Embedding(words, embedding, padding_idx=PAD)
        self.first_state, self.first_cell = nn.Linear(places, units), nn.Linear(places, units)
        self.of_places, self.of_state = nn.Linear(places, units), nn.Linear(units, units)
        self.fit = nn.Linear(units, 1)
        self.gate = nn.Linear(units, places)
        self.cell = nn.LSTMCell(embedding + places, units)
        self.out_state, self.out_seen = nn.Linear(units, embedding), nn.Linear(places, embedding)
        self.output = nn.Linear(embedding, words)
        self.dropout = nn.Dropout(dropout)

    def begin(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return features `[n, p, s]` of images, their projection, and the initial state and cell `[n, u]`."""
        places = self.eye(images)
        mean = places.mean(1)
        return (
            places,
            self.of_places(places),
            torch.tanh(self.first_state(mean)),
            torch.tanh(self.first_cell(mean)),
        )

    def step(
        self,
        word: torch.Tensor,
        places: torch.Tensor,
        projected: torch.Tensor,
        state: torch.Tensor,
        cell: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Process one word `[n]`, and return logits `[n, words]`, state, cell and attention `[n, p]`."""
        scores = self.fit(torch.tanh(projected + self.of_state(state)[:, None])).squeeze(-1)
        attention = scores.softmax(-1)
        seen = torch.sigmoid(self.gate(state)) * (attention[..., None] * places).sum(1)
        embedded = self.embedding(word)
        state, cell = self.cell(torch.cat([embedded, seen], dim=1), (state, cell))
        deep = embedded + self.out_state(self.dropout(state)) + self.out_seen(seen)
        return self.output(self.dropout(torch.tanh(deep))), state, cell, attention

    def losses(self, images: torch.Tensor, words: torch.Tensor, evenness: float) -> torch.Tensor:
        """Return the loss of each caption, shape `[n, 1]`.

        It is the mean negative log-likelihood. In training, a penalty for uneven attention is added.

        Args:
            images: Shape `[n, c, h, w]`.
            words: Ids `[n, t]` with END and padding, without START.
            evenness: Weight of the penalty, the doubly stochastic regularization of the paper.
        """
        places, projected, state, cell = self.begin(images)
        word = torch.full_like(words[:, 0], START)
        kept = (words != PAD).float()
        total, looked = torch.zeros_like(kept[:, 0]), torch.zeros_like(places[..., 0])
        for t in range(words.shape[1]):
            logits, state, cell, attention = self.step(word, places, projected, state, cell)
            found = functional.cross_entropy(logits.float(), words[:, t], reduction="none")
            total = total + found * kept[:, t]
            looked = looked + attention * kept[:, t : t + 1]
            word = words[:, t]
        pull = ((looked * looked.shape[1] / kept.sum(1, keepdim=True) - 1.0) ** 2).mean(1)
        losses = total / kept.sum(1)
        return (losses + evenness * pull if self.training else losses)[:, None]

    def greedy(self, images: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode greedily, and return ids `[n, t]`, padded after END, and log-probabilities `[n, t]`."""
        places, projected, state, cell = self.begin(images)
        word = torch.full((len(places),), START, device=places.device)
        done = torch.zeros_like(word, dtype=torch.bool)
        ids: list[torch.Tensor] = []
        logs: list[torch.Tensor] = []
        for _ in range(most):
            logits, state, cell, _attention = self.step(word, places, projected, state, cell)
            log_p, word = _sayable(logits).max(-1)
            word = torch.where(done, PAD, word)
            ids.append(word)
            logs.append(log_p)
            done = done | (word == END)
            if bool(done.all()):
                break
        return torch.stack(ids, 1), torch.stack(logs, 1)

    def beam(self, images: torch.Tensor, most: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode with `width` beams, ranked by mean log-probability per word, and return the same as `greedy`."""
        n = len(images)
        places, projected, state, cell = (part.repeat_interleave(width, 0) for part in self.begin(images))
        word = torch.full((n * width,), START, device=places.device)
        ids = torch.zeros(n * width, 0, dtype=torch.long, device=places.device)
        logs = torch.zeros(n * width, 0, device=places.device)
        total = torch.full((n, width), -torch.inf, device=places.device)
        total[:, 0] = 0.0
        done = torch.zeros(n, width, dtype=torch.bool, device=places.device)
        first = torch.arange(n, device=places.device)[:, None] * width
        for _ in range(most):
            logits, state, cell, _attention = self.step(word, places, projected, state, cell)
            log_p = _sayable(logits)
            ended = torch.full_like(log_p, -torch.inf)
            ended[:, PAD] = 0.0
            log_p = torch.where(done.reshape(-1, 1), ended, log_p)
            sums = (total.reshape(-1, 1) + log_p).reshape(n, -1)
            total, best = sums.topk(width, dim=1)
            parent, chosen = (best // log_p.shape[1] + first).reshape(-1), best % log_p.shape[1]
            word = chosen.reshape(-1)
            ids = torch.cat([ids[parent], word[:, None]], 1)
            logs = torch.cat([logs[parent], log_p[parent, word][:, None]], 1)
            state, cell = state[parent], cell[parent]
            done = done.reshape(-1)[parent].reshape(n, width) | (chosen == END)
            if bool(done.all()):
                break
        length = (ids != PAD).sum(1).reshape(n, width).clamp(min=1)
        best_row = (total / length).argmax(1) + first[:, 0]
        return ids[best_row], logs[best_row]


def _sayable(logits: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of all words, excluding padding and start."""
    held = logits.float().clone()
    held[:, PAD] = held[
        :, START
    ] = -torch.inf  # assigned separately, because a list index would be copied to the GPU for every word
    return held.log_softmax(-1)
