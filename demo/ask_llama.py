"""Ask a GGUF file a question in llama.cpp: `python demo/ask_llama.py FILE [QUESTION]`.

By llama.cpp's server, here in this process (xllamacpp), with the chat template that the file holds.
"""

import argparse

QUESTION = "What does `itertools.chain` do?"
"""That of demo/ask.py."""
NEW_TOKENS = 64


def answer(file: str, question: str) -> str:
    """The model's greedy answer of at most NEW_TOKENS tokens."""
    from xllamacpp import CommonParams, Server

    params = CommonParams()
    params.model.path, params.n_ctx, params.n_gpu_layers, params.verbosity = file, 512, 0, -1
    asked = {"messages": [{"role": "user", "content": question}], "max_tokens": NEW_TOKENS, "temperature": 0}
    made = Server(params).handle_chat_completions(asked)
    return str(made["choices"][0]["message"]["content"]).strip()


def main() -> None:
    """Print question and answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", help="of `qlora export --format gguf`")
    parser.add_argument("question", nargs="?", default=QUESTION)
    options = parser.parse_args()
    print(f"question           {options.question}")
    print(f"llama.cpp          {answer(options.file, options.question)}")


if __name__ == "__main__":
    main()
