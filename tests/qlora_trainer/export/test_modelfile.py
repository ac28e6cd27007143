"""Ollama's Modelfile, also read by Ollama's own code."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qlora_trainer.export.chat_format import ChatFormat, Turn
from qlora_trainer.export.modelfile import go_template, modelfile
from testcluster import binaries

CHATML = ChatFormat(
    without_system="",
    turns={role: Turn(f"<|im_start|>{role}\n", "<|im_end|>\n") for role in ("user", "assistant", "system")},
    answer="<|im_start|>assistant\n",
)


def test_the_file_names_model_template_stops_and_how_tokens_are_drawn() -> None:
    """What is not drawn by the model's settings is left to Ollama."""
    text = modelfile(
        "m.gguf", CHATML, None, ["<|im_end|>"], {"do_sample": True, "temperature": 0.6, "top_k": 20}
    )

    assert text.startswith('FROM ./m.gguf\nTEMPLATE """{{ if .Messages }}{{ range .Messages }}')
    assert '{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n{{ end }}' in text
    assert text.endswith('PARAMETER stop "<|im_end|>"\nPARAMETER temperature 0.6\nPARAMETER top_k 20\n')


def test_what_ollama_puts_before_a_text_itself_is_not_written_twice() -> None:
    """The token that begins a text comes from the GGUF file's settings."""
    chat = ChatFormat("<s>", {"user": Turn("[INST] ", " [/INST]"), "assistant": Turn(" ", "</s>")}, "")

    assert go_template(chat, "<s>") == (
        '{{ if .Messages }}{{ range .Messages }}{{ if eq .Role "user" }}[INST] {{ .Content }} [/INST]{{ end }}'
        '{{ if eq .Role "assistant" }} {{ .Content }}</s>{{ end }}{{ end }}{{ end }}'
    )
    assert (go_template(chat, None) or "").startswith(
        '{{ if .Messages }}{{ if ne (index .Messages 0).Role "system" }}<s>'
    )


def test_without_a_format_the_template_in_the_file_counts() -> None:
    """Marks of Go's own language cannot be written either."""
    odd = ChatFormat("{{ x }}", {"user": Turn("", "")}, "")

    for chat in (None, odd):
        text = modelfile("m.gguf", chat, None, [], {})
        assert "TEMPLATE" not in text
        assert "of its own it takes" in text


@pytest.mark.parametrize(
    ("stop", "lines"),
    [
        ("<|im_end|>", ['PARAMETER stop "<|im_end|>"']),
        ("\\end", ['PARAMETER stop "\\end"']),
        ('say "end"', ['PARAMETER stop """say "end""""']),
        ('"""', []),
        ("\u200bend", []),
    ],
)
def test_stop_texts_stand_as_they_are(stop: str, lines: list[str]) -> None:
    """Ollama knows no escapes; what it could not read back is left to the token that the GGUF file names."""
    written = modelfile("m.gguf", None, None, [stop], {}).splitlines()

    assert [line for line in written if line.startswith("PARAMETER")] == lines


@pytest.fixture(scope="module")
def ollama() -> Path:
    """A program of Ollama's parser and templates."""
    return binaries.built("ollama-modelfile")


def as_ollama_reads(ollama: Path, text: str, conversations: list[Any], folder: Path) -> Any:
    """What tests/cluster/modules/ollama/main.go prints."""
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    told = json.dumps([[{"role": role, "content": said} for role, said in each] for each in conversations])
    return json.loads(
        subprocess.check_output([str(ollama), str(folder / "Modelfile")], input=told, text=True)
    )


CONVERSATIONS = [
    [("user", "Hi")],
    [("user", "a\n b"), ("assistant", 'say "so"'), ("user", "{{ .Role }}")],
    [("system", "Be brief"), ("user", "Hi")],
]


@pytest.mark.cluster
@pytest.mark.process
@pytest.mark.parametrize(
    ("chat", "bos"),
    [
        pytest.param(CHATML, None, id="ChatML"),
        pytest.param(
            ChatFormat(
                "<s><|im_start|>system\nYou help.<|im_end|>\n",
                {**CHATML.turns, "system": Turn("<s><|im_start|>system\n", "<|im_end|>\n")},
                CHATML.answer,
            ),
            "<s>",
            id="a system message of its own, and a first token",
        ),
        pytest.param(
            ChatFormat("", {"user": Turn("[INST] ", " [/INST]"), "assistant": Turn(" ", "</s>")}, ""),
            None,
            id="blanks at the ends",
        ),
    ],
)
def test_ollama_writes_conversations_as_they_were_trained(
    chat: ChatFormat, bos: str | None, ollama: Path, tmp_path: Path
) -> None:
    """By its own parser and templates; but for the first token, which it puts there itself."""
    known = CONVERSATIONS if "system" in chat.turns else CONVERSATIONS[:2]

    found = as_ollama_reads(ollama, modelfile("m.gguf", chat, bos, [], {}), known, tmp_path)

    assert found["texts"] == [chat.render(each).removeprefix(bos or "") for each in known]


@pytest.mark.cluster
@pytest.mark.process
def test_ollama_reads_stop_texts_and_parameters_as_they_are(ollama: Path, tmp_path: Path) -> None:
    """Whatever characters they are of."""
    stops = ["<|im_end|>", "\\end", 'say "end"', '"', "two words ", "a\nb"]
    text = modelfile("m.gguf", None, None, stops, {"do_sample": True, "temperature": 0.6})

    found = as_ollama_reads(ollama, text, [], tmp_path)

    commands = [(each["Name"], each["Args"]) for each in found["commands"]]
    assert commands == [("model", "./m.gguf"), *(("stop", stop) for stop in stops), ("temperature", "0.6")]
