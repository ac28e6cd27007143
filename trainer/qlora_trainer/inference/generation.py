"""Generation: a model continues prompts, token by token.

The model is the trainer's own, as it is trained: a quantized base and its adapter. What the base alone answers comes
from the same model within `adapter_methods.adapters_disabled`.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qlora_trainer.data.collate import Batch, pad_multiple
from qlora_trainer.modeling.base_model import BaseModel
from qlora_trainer.modeling.key_value_cache import CachedSequence
from qlora_trainer.modeling.lora_linear import seeded_generator


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """What logits are divided by; 0 takes the most probable token (greedy)."""
    top_p: float = 1.0
    """Only the most probable tokens are drawn from that together have this probability (Holtzman et al. 2020);
    above 0."""
    seed: int = 0
    """With temperature, equal seeds give equal answers, whatever prompts are beside a prompt."""


GREEDY = Sampling()


def generate(
    model: BaseModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_tokens: Collection[int],
    sampling: Sampling = GREEDY,
) -> list[list[int]]:
    """The answer to each prompt, without the token that ended it.

    An answer of max_new_tokens tokens was cut off there; a shorter one ended by itself.

    Prompts are read one after another and answered together. All of them are kept until the last answer ends: two
    numbers for each token, layer, key head and its size.

    Args:
        model: is in the mode (training or not) afterwards that it was in before.
        prompts: token ids, at least one each.
        max_new_tokens: tokens of an answer, at most.
        stop_tokens: those that end an answer.
        sampling: how tokens are chosen.

    Raises:
        ValueError: a prompt is empty.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for number, token in stream(
        model, prompts, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens, sampling=sampling
    ):
        answers[number].append(token)
    return answers


@torch.no_grad()
def stream(
    model: BaseModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_tokens: Collection[int],
    sampling: Sampling = GREEDY,
) -> Iterator[tuple[int, int]]:
    """As `generate`, but (number of the prompt, token) as soon as there is one. Until its end the model is in use."""
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("an empty prompt cannot be continued: give at least one token")
    was_training = model.graph.training
    model.graph.eval()
    try:
        running: list[_Answer] = []
        for number, prompt in enumerate(prompts):
            answer = _Answer(
                number,
                prompt,
                CachedSequence(model.virtual_tokens + len(prompt) + max_new_tokens),
                seeded_generator(f"generate/{sampling.seed}/{number}"),
            )
            logits = _read_prompt(model, prompt, answer.sequence)
            if answer.take(logits, sampling, max_new_tokens, stop_tokens):
                yield number, answer.tokens[-1]
                running.append(answer)
        while running := [answer for answer in running if len(answer.tokens) < max_new_tokens]:
            still = []
            for answer, logits in zip(running, _read_on(model, running), strict=True):
                if answer.take(logits, sampling, max_new_tokens, stop_tokens):
                    yield answer.number, answer.tokens[-1]
                    still.append(answer)
            running = still
    finally:
        model.graph.train(was_training)


@dataclass
class _Answer:
    """An answer that is being generated."""

    number: int
    """Of its prompt."""
    prompt: Sequence[int]
    sequence: CachedSequence
    """The prompt and the answer without its last token."""
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    """Generated so far."""

    def take(
        self, logits: Tensor, sampling: Sampling, max_new_tokens: int, stop_tokens: Collection[int]
    ) -> bool:
        """Choose the next token by its logits (vocabulary,); False where the answer ends instead."""
        token = choose(logits, sampling, self.generator)
        if len(self.tokens) == max_new_tokens or token in stop_tokens:
            return False
        self.tokens.append(token)
        return True


def _read_prompt(model: BaseModel, prompt: Sequence[int], sequence: CachedSequence) -> Tensor:
    """Logits (vocabulary,) fp32 of what follows a prompt; what attention needs of it is kept in the sequence."""
    length = len(prompt)
    padding = -length % pad_multiple(model.dtype)
    ids = torch.tensor([*prompt, *[0] * padding])
    positions = torch.cat([torch.arange(length), torch.arange(padding)])
    lengths = [length, padding] if padding else [length]
    states = model.hidden_states(_row(ids, positions, lengths, padding), [sequence, None][: len(lengths)])
    sequence.advance(model.virtual_tokens + length)
    return model.logits(states[length - 1 : length])[0]


def _read_on(model: BaseModel, answers: Sequence[_Answer]) -> list[Tensor]:
    """Logits (vocabulary,) fp32 of what follows each answer.

    What grows out of one rotation into another is read anew from its beginning, as transformers' generation does.
    """
    anew = [answer for answer in answers if answer.sequence.length == model.rotated_anew_behind]
    logits = {}
    for answer in anew:
        answer.sequence.cut(0)
        logits[answer.number] = _read_prompt(model, [*answer.prompt, *answer.tokens], answer.sequence)
    if others := [answer for answer in answers if answer.number not in logits]:
        for answer, found in zip(others, _read_last(model, others), strict=True):
            logits[answer.number] = found
    return [logits[answer.number] for answer in answers]


def _read_last(model: BaseModel, answers: Sequence[_Answer]) -> Tensor:
    """Logits (answers, vocabulary) fp32 of what follows the last token of each answer."""
    ids = torch.tensor([answer.tokens[-1] for answer in answers])
    positions = torch.tensor([answer.sequence.length for answer in answers])
    states = model.hidden_states(
        _row(ids, positions, [1] * len(answers), 0), [answer.sequence for answer in answers]
    )
    for answer in answers:
        answer.sequence.advance(1)
    return model.logits(states)


def _row(ids: Tensor, positions: Tensor, lengths: list[int], padding: int) -> Batch:
    nothing = torch.empty(0, dtype=torch.int64)
    return Batch(ids, positions, lengths, padding, logit_positions=nothing, targets=nothing)


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token by its logits (vocabulary,) fp32."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities, tokens = torch.softmax(logits / sampling.temperature, dim=-1).sort(descending=True)
    before = probabilities.cumsum(0) - probabilities  # of those more probable
    probabilities[before >= sampling.top_p] = 0.0
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])
