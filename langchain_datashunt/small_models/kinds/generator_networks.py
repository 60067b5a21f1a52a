"""Helpers for generative networks of transformers: input form, decoding, padding and parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from langchain_datashunt._utils.optional import require
from langchain_datashunt.exceptions import ConfigurationError

Form = Literal["causal", "seq2seq", "image"]
"""Input form of a network: a text to continue, a text to answer, or an image to describe."""

_AUTO = {
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "image": "AutoModelForImageTextToText",
}
PAIR = "vision-encoder-decoder"
IGNORED = -100


def form_of(config: Any) -> Form:
    """Return the input form of a network from its configuration."""
    if config.model_type == PAIR or getattr(config, "vision_config", None) is not None:
        return "image"
    return "seq2seq" if getattr(config, "is_encoder_decoder", False) else "causal"


def auto_class(config: Any, form: str | None) -> str:
    """Return the name of the transformers class that loads the network."""
    if config.model_type == PAIR:
        return "VisionEncoderDecoderModel"
    return _AUTO[form or form_of(config)]


def full_rows(rows: Sequence[Sequence[int]], fill: int, device: Any) -> Any:
    """Pad rows with `fill` on the right to a tensor of shape `[n, t]`, with `t >= 1`."""
    torch = require("torch", "torch")
    out = torch.full((len(rows), max(1, *(len(row) for row in rows))), fill, dtype=torch.long)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return out.to(device)


def padded_rows(rows: Sequence[Sequence[int]], fill: int, device: Any) -> tuple[Any, Any]:
    """Return rows padded on the right and their attention mask, both of shape `[n, t]`."""
    torch = require("torch", "torch")
    ids = full_rows(rows, fill, device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, (torch.arange(ids.shape[1], device=device)[None] < lengths[:, None]).long()


def own_state(network: Any) -> dict[str, Any]:
    """Return the parameters and buffers by name, with tied tensors included once."""
    found: dict[str, Any] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in network.state_dict().items():
        where = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and where in seen:
            continue
        seen.add(where)
        found[name] = tensor
    return found


def greedy(own: Any) -> Any:
    """Return a greedy decoding configuration with the special tokens of `own`.

    Sampling, beam search and penalties of `own` are dropped. They would change the token probabilities from which the
    confidence is computed.
    """
    names = (
        "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id",
        "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens",
    )  # fmt: skip
    kept = {name: getattr(own, name, None) for name in names}
    return require("transformers", "torch").GenerationConfig(
        **{name: value for name, value in kept.items() if value is not None},
        do_sample=False, num_beams=1,
    )  # fmt: skip


def end_tokens(network: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer; the first one is used as the end token in training."""
    ends = network.generation_config.eos_token_id
    found = [*ends] if isinstance(ends, list | tuple) else [ends]
    found += [tokenizer.eos_token_id, tokenizer.sep_token_id]
    return [end for end in dict.fromkeys(found) if end is not None]


def begin_tokens(tokenizer: Any) -> list[int]:
    """Return a single-token prompt for an empty text, since generation needs at least one token."""
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return [next((one for one in known if one is not None), 0)]


def prompt_limit(network: Any, model: Any) -> int:
    """Return the maximum number of prompt tokens, `10**9` if the network has no limit.

    Raises:
        ConfigurationError: `max_new_tokens` leaves no room for a prompt.
    """
    most = getattr(network.config, "max_position_embeddings", None) or getattr(network.config, "n_positions", None)
    if most is None:
        return 10**9
    room = most - (model.max_new_tokens if model.form == "causal" else 0)
    if room < 1:
        raise ConfigurationError(
            f"max_new_tokens={model.max_new_tokens} leaves no room for a prompt in the {most} positions of "
            f"{model.model_id}. Use a smaller `max_new_tokens`."
        )
    return int(room)
