"""Ollama's Modelfile."""

import pytest

from qlora_trainer.export.chat_format import ChatFormat, Turn
from qlora_trainer.export.modelfile import go_template, modelfile

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
        assert "of its own templates" in text


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
