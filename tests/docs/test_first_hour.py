"""What docs/decisions/0027 says of the first hour: no sentence that was mended is back."""

import subprocess

import pytest

from doc_blocks import PAGES, ROOT

MENDED = [
    "was reloaded, evaluated and found better than the base",
    "g++ and Go 1.26, too",
    "did other work, too",
    "says everything that is not",
    "is not kept to it on one machine",
    "decides about the order of additions",
    "is run again is done at once",
    "whatever dies",
    "the last goes first",
    "is gone on from where it was",
    "is told here",
    "What ranks make of it",
    "On nothing",
    "what is remote is fetched",
    "that is told up to",
    "he may do there",
    "whether files of jobs are right",
    "is no folder",
    "is no JSON object",
]
"""Sentences of the documentation and of messages that were not English, or not clear."""


def tracked(*folders: str) -> list[str]:
    """Files of the repository, by their paths."""
    listed = subprocess.run(
        ["git", "ls-files", "--", *folders], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [path for path in listed.stdout.splitlines() if path.endswith(".py")]


@pytest.mark.parametrize("sentence", MENDED)
def test_no_sentence_that_was_mended_comes_back(sentence: str) -> None:
    """Neither in a page nor in what programs say."""
    pages = [path for path in PAGES if sentence in " ".join((ROOT / path).read_text().split())]

    assert (
        pages + [path for path in tracked("operator", "trainer") if sentence in (ROOT / path).read_text()]
        == []
    )
