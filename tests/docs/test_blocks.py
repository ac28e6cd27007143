"""What kinds of code blocks the documentation has, and that no command in it is forgotten."""

import pytest

from doc_blocks import NOT_RUN, PROGRAMS, blocks, commands, needs_cluster, reason_not_to_run

LANGUAGES = {"json", "sh", "text", "yaml", "python", "lua"}


def test_every_block_says_what_it_is() -> None:
    """So that commands can be told from what they print, and GitHub colors them."""
    assert [str(block) for block in blocks() if block.language not in LANGUAGES] == []


def test_commands_are_only_in_blocks_of_commands() -> None:
    """A command in a block of another kind would be run by nobody."""
    hidden = [
        f"{block}: {line}"
        for block in blocks()
        if block.language == "text"
        for line in block.text.splitlines()
        if line.split(" ")[0] in PROGRAMS - {"eval"} and "[-h]" not in line
    ]

    assert hidden == []


def test_blocks_of_commands_hold_nothing_else() -> None:
    """What they print stands in a block of its own."""
    others = [
        f"{block}: {command}"
        for block in blocks()
        if block.language == "sh"
        for command in block.commands
        if command.split()[0].removeprefix(".venv/bin/") not in PROGRAMS
    ]

    assert others == []


def test_each_command_is_run_or_has_a_reason() -> None:
    """Those that are run here start programs of this project."""
    for _, command in commands(of_cluster=False):
        assert command.split()[0] in ("qlora", "python", "printf"), (
            f"{command}: run by no test, and no reason why"
        )


@pytest.mark.parametrize("beginning", NOT_RUN)
def test_no_reason_outlives_its_command(beginning: str) -> None:
    """The table names what the pages have."""
    found = [
        c for block in blocks() if block.language == "sh" for c in block.commands if c.startswith(beginning)
    ]

    assert found


def test_a_command_is_read_without_what_is_not_of_it() -> None:
    """Comments go, and what is continued is one line."""
    (block,) = [each for each in blocks() if "helm install" in each.text and each.page == "README.md"]

    assert block.commands[1] == (
        "helm install qlora-operator charts/qlora-operator --namespace qlora-system --create-namespace "
        "--set image.repository=REGISTRY/qlora-operator --set jobs.image.repository=REGISTRY/qlora-trainer"
    )
    assert needs_cluster(block.commands[1])
    assert reason_not_to_run(block.commands[0])
