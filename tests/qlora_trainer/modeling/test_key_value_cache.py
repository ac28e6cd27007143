"""What is kept of a sequence that grows."""

import pytest
import torch

from qlora_trainer.modeling.key_value_cache import CachedSequence

pytestmark = pytest.mark.process


def test_a_sequence_grows_in_every_layer_and_is_cut() -> None:
    """Each layer has the tokens that it appended, behind those that are counted; what was cut is overwritten."""
    tokens = torch.arange(2 * 8 * 3, dtype=torch.float32).view(1, 2, 8, 3)
    sequence = CachedSequence(capacity=6)
    for layer in (0, 1):
        keys, _ = sequence.append(layer, tokens[:, :, :4] + layer, -tokens[:, :, :4])
        assert torch.equal(keys, tokens[:, :, :4] + layer)
    sequence.advance(4)
    sequence.cut(3)
    keys, values = sequence.append(1, tokens[:, :, 6:] + 1, -tokens[:, :, 6:])

    assert sequence.length == 3
    assert torch.equal(keys, torch.cat([tokens[:, :, :3], tokens[:, :, 6:]], dim=2) + 1)
    assert torch.equal(values, -(keys - 1))


def test_a_sequence_longer_than_its_capacity_is_refused() -> None:
    """What does not fit is not written over something else."""
    sequence = CachedSequence(capacity=3)
    sequence.append(0, torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))
    sequence.advance(2)

    with pytest.raises(ValueError, match="of 4 tokens does not fit into a cache for 3"):
        sequence.append(0, torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))


def test_a_recurrent_state_is_replaced_and_cannot_go_back() -> None:
    """A layer has the state behind the last token alone: a sequence can begin anew, but not lose its end."""
    sequence = CachedSequence(capacity=6)
    assert sequence.state(0) is None
    for value in (1.0, 2.0):
        sequence.keep_state(0, torch.full((3, 4), value), torch.full((2, 4, 4), value))
        sequence.advance(2)
    kept = sequence.state(0)

    assert kept is not None
    assert [float(part.mean()) for part in kept] == [2.0, 2.0]
    sequence.cut(4)
    with pytest.raises(ValueError, match="state behind 4 tokens cannot be cut to 3"):
        sequence.cut(3)
    sequence.cut(0)
    assert (sequence.length, sequence.state(0)) == (0, None)
