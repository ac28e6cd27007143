"""Rotary embeddings by the length of each sample, against transformers' of each sample alone."""

import pytest
import torch
from transformers import Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from parity_cases import LONGROPE
from qlora_trainer.modeling.rotary import LongRope, rotary_embeddings

pytestmark = pytest.mark.process


def config() -> Phi3Config:
    """Short factors reach 20 tokens."""
    return Phi3Config(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=512, pad_token_id=0, **LONGROPE
    )


@pytest.mark.parametrize(
    "segments",
    [
        pytest.param([(0, 20), (0, 3)], id="all short"),
        pytest.param([(0, 21)], id="all long"),
        pytest.param([(0, 5), (0, 30), (0, 20), (0, 21), (0, 2)], id="both in a row"),
        pytest.param([(8, 12), (8, 13)], id="behind a prefix"),
        pytest.param([(19, 1), (20, 1), (21, 1)], id="the next token of three that are generated"),
    ],
)
def test_each_sample_has_the_frequencies_of_its_length(segments: list[tuple[int, int]]) -> None:
    """What each sample has in a packed row is what transformers gives it alone, in any order."""
    x = torch.zeros(1)
    packed, stock = rotary_embeddings(Phi3RotaryEmbedding, config()), Phi3RotaryEmbedding(config())
    assert isinstance(packed, LongRope)
    positions = [torch.arange(first, first + length) for first, length in segments]

    packed.lengths = [length for _, length in segments]
    found = packed(x, torch.cat(positions)[None])

    for mine, theirs in zip(
        found, zip(*(stock(x, own[None]) for own in positions), strict=True), strict=True
    ):
        assert torch.equal(mine, torch.cat(theirs, dim=1))


def test_other_embeddings_are_the_stock_ones() -> None:
    """Nothing is in between where no length matters."""
    plain = Phi3Config(hidden_size=64, num_attention_heads=4, pad_token_id=0)

    assert type(rotary_embeddings(LlamaRotaryEmbedding, plain)) is LlamaRotaryEmbedding
