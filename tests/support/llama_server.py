"""llama.cpp's own server, in this process, asked over HTTP."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp


class LlamaServer:
    """`llama-server --model FILE`, with `--lora FILE` where there is an adapter; it ends with the last name for it."""

    def __init__(self, model: Path, lora: Path | None = None) -> None:
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_gpu_layers = str(model), 256, 0
        # Threads of ggml spin while they wait for one another: beside other tests one is faster than two.
        params.n_parallel, params.cpuparams.n_threads, params.cpuparams_batch.n_threads = 1, 1, 1
        params.warmup, params.verbosity = False, -1
        if lora is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        self._server = xllamacpp.Server(params)

    def ask(self, path: str, **body: Any) -> Any:
        """What it answers to a POST."""
        request = urllib.request.Request(
            f"{self._server.listening_address}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)

    def tokens(self, text: str) -> list[int]:
        """The text in its tokens, with the one that begins a text, where the file asks for it."""
        found: list[int] = self.ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        return found

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The next tokens, also behind one that ends a text, where the server would stop."""
        ids = list(prompt)
        for _ in range(count):
            answer = self.ask("/completion", prompt=ids, n_predict=1, temperature=0, n_probs=1)
            ids.append(answer["completion_probabilities"][0]["id"])
        return ids[len(prompt) :]
