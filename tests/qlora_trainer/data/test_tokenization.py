"""Records as token ids, and which of them are supervised."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.data.records import Chat, Document, Message, PromptCompletion, Record
from qlora_trainer.data.tokenization import Sample, Tokenization, render
from qlora_trainer.errors import DataError, ModelError

pytestmark = pytest.mark.process

Make = Callable[..., Any]

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<|im_start|>{{ m.content }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
FORCED_THOUGHT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
END_OF_ALL = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% else %}<|im_end|>{% endif %}"
)
UPPER = (
    "{% for m in messages %}<|im_start|>{{ m.content | upper }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
SPACED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def _chat(*turns: str) -> Record:
    """A conversation of `role: content` turns."""
    pairs = (turn.split(": ", 1) for turn in turns)
    return Record("f.jsonl: line 3", Chat(tuple(Message(role, content) for role, content in pairs)), b"")


def _pair(prompt: str, completion: str) -> Record:
    return Record("f.jsonl: line 3", PromptCompletion(prompt, completion), b"")


def _one(record: Record, tokenizer: Any, max_length: int = 1000) -> Sample:
    [sample] = Tokenization(tokenizer, max_length).samples([record])
    return sample


def _runs(record: Record, tokenizer: Any) -> list[tuple[str, bool]]:
    sample = _one(record, tokenizer)
    return render(sample.ids, sample.mask, tokenizer)


def _supervised(record: Record, tokenizer: Any) -> list[str]:
    return [text for text, supervised in _runs(record, tokenizer) if supervised]


TALK = _chat("user: hi", "assistant: hello", "user: bye", "assistant: see you")


@pytest.mark.model
def test_the_models_template_is_followed(smollm2_tokenizer: Any) -> None:
    """With the real model a sample is its template's tokens; the assistant's turns are learnt, with their end."""
    sample = _one(TALK, smollm2_tokenizer)
    assert isinstance(TALK.content, Chat)
    messages = [{"role": m.role, "content": m.content} for m in TALK.content.messages]
    expected = smollm2_tokenizer.apply_chat_template(messages, return_dict=False)

    assert sample.ids.tolist() == expected
    first, *others = _runs(TALK, smollm2_tokenizer)
    assert first[0].startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert first[0].endswith("<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert not first[1]
    assert others == [
        ("hello<|im_end|>", True),
        ("\n<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n", False),
        ("see you<|im_end|>", True),
        ("\n", False),
    ]


@pytest.mark.model
def test_a_real_prompt_and_completion(smollm2_tokenizer: Any) -> None:
    """With the real model a pair is tokenized as one text; the completion and the end are learnt."""
    sample = _one(_pair("The capital of France is", " Paris."), smollm2_tokenizer)

    assert sample.ids.tolist() == smollm2_tokenizer("The capital of France is Paris.<|im_end|>").input_ids
    assert sample.mask.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("template", [None, MARKED], ids=["prefixes", "markers"])
def test_only_the_assistant_is_supervised(byte_tokenizer: Make, template: str | None) -> None:
    """Markers and checked prefixes agree: what the assistant says, and the token that ends it."""
    tokenizer = byte_tokenizer(template) if template else byte_tokenizer()

    assert _supervised(TALK, tokenizer) == ["hello<|im_end|>", "see you<|im_end|>"]


def test_markers_mean_what_transformers_makes_of_them(byte_tokenizer: Make) -> None:
    """With markers, ids and mask are those of apply_chat_template."""
    tokenizer = byte_tokenizer(MARKED, merges=(("l", "l"), ("e", "ll")))
    assert isinstance(TALK.content, Chat)
    messages = [{"role": m.role, "content": m.content} for m in TALK.content.messages]
    expected = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)

    sample = _one(TALK, tokenizer)

    assert sample.ids.tolist() == expected["input_ids"]
    assert sample.mask.tolist() == expected["assistant_masks"]


def test_what_follows_the_last_answer_is_left_out(byte_tokenizer: Make) -> None:
    """Turns after the assistant's last one are not run at all."""
    whole = _runs(_chat("user: hi", "assistant: hello", "user: thanks"), byte_tokenizer())

    assert whole == _runs(_chat("user: hi", "assistant: hello"), byte_tokenizer())


def test_what_the_template_lets_the_model_say_first_is_supervised(byte_tokenizer: Make) -> None:
    """Text that the template writes between generation prompt and content is what the model has to say."""
    assert _supervised(TALK, byte_tokenizer(THINKING)) == [
        "hello<|im_end|>",
        "<think>\n\n</think>\n\nsee you<|im_end|>",
    ]


@pytest.mark.parametrize("trim", [False, True])
def test_spaces_at_the_seams_are_kept(byte_tokenizer: Make, trim: bool) -> None:
    """Spaces around an answer belong to it, also where the tokenizer leaves them out of its offsets."""
    tokenizer = byte_tokenizer(merges=(("Ġ", "h"), ("Ġ", "Ġ")), trim_offsets=trim)

    assert _supervised(_chat("user: hi", "assistant:   ho  "), tokenizer) == ["  ho  <|im_end|>"]


@pytest.mark.parametrize(
    ("template", "record", "error"),
    [
        (None, TALK, "the model's tokenizer has no chat template to write them: take a model that has one"),
        (
            ALTERNATING,
            _chat("assistant: x"),
            r"line 3: messages\[0\]: the chat template refuses the conversation: roles must",
        ),
        (
            FORCED_THOUGHT,
            TALK,
            r"line 3: the chat template writes what stands before messages\[1\] otherwise",
        ),
        (
            NO_END,
            TALK,
            r"line 3: messages\[1\]: the chat template does not end what the assistant says with a token at which",
        ),
        (
            END_OF_ALL,
            TALK,
            r"line 3: messages\[1\]: the chat template does not end what the assistant says with a token at which",
        ),
        (UPPER, TALK, r"line 3: messages\[1\]: the chat template changes what the assistant says"),
    ],
    ids=["none", "refuses", "prompt", "no-end", "end-of-all", "changes"],
)
def test_what_cannot_be_told_apart_is_refused(
    byte_tokenizer: Make, template: str | None, record: Record, error: str
) -> None:
    """A template without markers that hides what is to be learnt is refused, with reason and record."""
    tokenizer = byte_tokenizer(template)

    with pytest.raises(DataError, match=error):
        _one(record, tokenizer)


@pytest.mark.parametrize("trim", [False, True])
def test_an_answer_is_tokenized_apart_from_its_prompt(byte_tokenizer: Make, trim: bool) -> None:
    """No token spans the prompt's end and the answer's start: the prompt is tokenized alone when the model is asked."""
    tokenizer = byte_tokenizer(SPACED, merges=(("Ġ", "h"), ("Ġ", "s")), trim_offsets=trim)

    assert [text for text, supervised in _runs(TALK, tokenizer) if supervised] == [
        "hello<|im_end|>",
        "see you<|im_end|>",
    ]
    sample = _one(TALK, tokenizer)
    assert sample.ids[sample.mask == 1].tolist() == tokenizer("hello<|im_end|>see you<|im_end|>").input_ids


@pytest.mark.model
@pytest.mark.parametrize("answer", ["    return x", "\n\nTwo lines", "\treturn", "\n", " x"])
def test_an_answer_may_begin_with_white_space(smollm2_tokenizer: Any, answer: str) -> None:
    """With the real model an answer may begin with what its tokenizer would join to the prompt."""
    record = _chat("user: Body?", f"assistant: {answer} end", "user: More?", f"assistant: {answer}!")
    sample = _one(record, smollm2_tokenizer)
    prompt = smollm2_tokenizer.apply_chat_template(
        [{"role": "user", "content": "Body?"}], add_generation_prompt=True, return_dict=False
    )

    assert _supervised(record, smollm2_tokenizer) == [f"{answer} end<|im_end|>", f"{answer}!<|im_end|>"]
    assert sample.ids.tolist()[: len(prompt)] == prompt
    assert sample.mask.tolist()[: len(prompt) + 1] == [0] * len(prompt) + [1]


def test_markers_that_cut_a_token_part_it(byte_tokenizer: Make) -> None:
    """With markers, too, what the assistant says is tokenized apart from what stands before it."""
    marked = (
        "{% for m in messages %}: {% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}"
    )
    tokenizer = byte_tokenizer(marked, merges=(("Ġ", "h"),))

    assert _runs(_chat("assistant: ho"), tokenizer) == [(": ", False), ("ho<|im_end|>", True)]


def test_an_answer_with_a_special_token_is_refused(byte_tokenizer: Make) -> None:
    """An answer that spells the model's end-of-turn token would be cut short, so it is refused."""
    with pytest.raises(DataError, match=r"messages\[1\]: what the assistant says holds a special token"):
        _one(_chat("user: hi", "assistant: a<|im_end|>b"), byte_tokenizer())


def test_a_broken_template_is_the_models_fault(byte_tokenizer: Make) -> None:
    """A template that is no template is an error of the model, not of the data."""
    with pytest.raises(ModelError, match="chat template is not valid"):
        _one(TALK, byte_tokenizer("{% for %}"))


def test_a_pair_is_one_text_with_a_learnt_end(byte_tokenizer: Make) -> None:
    """Prompt and completion are joined as they stand, without the template; completion and EOS are learnt."""
    assert _runs(_pair("2+2=", "4"), byte_tokenizer()) == [("2+2=", False), ("4<|im_end|>", True)]


def test_a_token_across_the_joint_counts_as_completion(byte_tokenizer: Make) -> None:
    """A token made of the prompt's end and the completion's start is learnt."""
    tokenizer = byte_tokenizer(merges=(("=", "4"),))
    trimmed = byte_tokenizer(merges=(("Ġ", "4"),), trim_offsets=True)

    assert _runs(_pair("2+2=", "4"), tokenizer) == [("2+2", False), ("=4<|im_end|>", True)]
    assert _runs(_pair("2+2= ", "4"), trimmed) == [("2+2=", False), (" 4<|im_end|>", True)]


@pytest.mark.parametrize("prompt", ["a", "<s>a"], ids=["added", "written"])
def test_bos_and_eos_come_once(byte_tokenizer: Make, prompt: str) -> None:
    """BOS stands once where the tokenizer adds it, EOS once, whether the data spell them or not."""
    tokenizer = byte_tokenizer(bos=True)

    for completion in ("b", "b<|im_end|>"):
        sample = _one(_pair(prompt, completion), tokenizer)
        assert tokenizer.decode(sample.ids) == "<s>ab<|im_end|>"
        assert sample.mask.tolist() == [0, 0, 1, 1]


def test_a_chat_gets_no_second_bos(byte_tokenizer: Make) -> None:
    """A chat's special tokens are the template's alone."""
    sample = _one(TALK, byte_tokenizer("<s>" + MARKED, bos=True))

    assert sample.ids.tolist().count(byte_tokenizer(bos=True).bos_token_id) == 1


def test_the_first_token_is_never_supervised(byte_tokenizer: Make) -> None:
    """Nothing stands before the first token to predict it from."""
    assert _one(_pair("", "abc"), byte_tokenizer()).mask.tolist() == [0, 1, 1, 1]


def test_a_completion_needs_an_end(byte_tokenizer: Make) -> None:
    """A tokenizer without EOS cannot teach the end of a completion; it can serve a chat."""
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None

    assert len(_supervised(TALK, tokenizer)) == 2
    with pytest.raises(ModelError, match="has no eos_token"):
        _one(_pair("a", "b"), tokenizer)


@pytest.mark.parametrize(("length", "truncated"), [(4, True), (5, False), (6, False)])
def test_an_overlong_sample_loses_its_end(byte_tokenizer: Make, length: int, truncated: bool) -> None:
    """A sample is cut to the length allowed, and says so."""
    tokenizer = byte_tokenizer()
    whole = _one(_pair("ab", "cd"), tokenizer)

    sample = _one(_pair("ab", "cd"), tokenizer, length)

    assert sample.truncated == truncated
    assert sample.ids.tolist() == whole.ids.tolist()[:length]
    assert sample.mask.tolist() == whole.mask.tolist()[:length]


def test_many_records_come_back_in_order(byte_tokenizer: Make) -> None:
    """Records are tokenized in batches, and come back one by one in their order."""
    tokenizer = byte_tokenizer()
    records = [_pair("n=", str(i)) for i in range(1100)]

    decoded = [tokenizer.decode(sample.ids) for sample in Tokenization(tokenizer, 100).samples(records)]

    assert decoded == [f"n={i}<|im_end|>" for i in range(1100)]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(question=TEXT, answer=TEXT.filter(lambda text: text.strip()))
def test_any_text_is_learnt_whole(byte_tokenizer: Make, question: str, answer: str) -> None:
    """Whatever the text, exactly the answer and its end are learnt, as a chat and as a pair."""
    tokenizer = byte_tokenizer()

    assert _supervised(_chat(f"user: {question}", f"assistant: {answer}"), tokenizer) == [
        answer + "<|im_end|>"
    ]
    assert _supervised(_pair(question, answer), tokenizer) == [answer + "<|im_end|>"]


@given(text=TEXT, mask=st.lists(st.booleans(), min_size=80, max_size=80))
def test_runs_join_to_the_whole_text(byte_tokenizer: Make, text: str, mask: list[bool]) -> None:
    """However runs cut a text, even inside a character, joined they are the decoded sample."""
    tokenizer = byte_tokenizer()
    ids = np.array(tokenizer(text).input_ids, dtype=np.int32)

    runs = render(ids, np.array(mask[: len(ids)], dtype=np.uint8), tokenizer)

    assert "".join(run for run, _ in runs) == text


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('no ' + messages[0].content) }}", "refuses the conversation with TemplateError"),
        ("{{ [1].index(messages[0].content) }}", "refuses the conversation with ValueError"),
        ("{{ messages[0].content + 1 }}", "refuses the conversation with TypeError"),
    ],
    ids=["quotes it", "bad value", "bad type"],
)
def test_a_refusal_does_not_repeat_the_conversation(byte_tokenizer: Make, template: str, says: str) -> None:
    """What a template says when it fails is only told where it stands in the template: it may quote the data."""
    chat = _chat("user: a secret", "assistant: x")

    with pytest.raises(DataError, match=says) as refusal:
        _supervised(chat, byte_tokenizer(template))

    assert "secret" not in str(refusal.value)


def test_a_document_is_learned_whole(byte_tokenizer: Make) -> None:
    """A document has no prompt: all of it is supervised, and the end of text behind it."""
    sample = _one(Record("f.txt", Document("Once upon"), b""), byte_tokenizer(bos=True))

    assert byte_tokenizer().decode(sample.ids) == "<s>Once upon<|im_end|>"
    assert sample.mask.tolist() == [0] + [1] * 10


def test_records_of_all_kinds_stand_in_one_dataset(byte_tokenizer: Make) -> None:
    """Conversations, pairs and documents become samples beside each other."""
    records = [TALK, _pair("a", "b"), Record("f.txt", Document("c"), b"")]
    tokenizer = byte_tokenizer()

    alone = [_one(record, tokenizer).ids.tolist() for record in records]

    assert [sample.ids.tolist() for sample in Tokenization(tokenizer, 1000).samples(records)] == alone
