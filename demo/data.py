"""Write the demo's training and evaluation data: `python demo/data.py FOLDER`.

Questions and answers about Python's standard library, made from the docstrings
of the Python that runs this: chat records in `train.jsonl` and `eval.jsonl`.
The same Python version gives the same bytes.

Pure-Python modules are read, never imported: importing some has side effects.
Only the built-in modules named in COMPILED_MODULES are imported.
"""

import argparse
import ast
import hashlib
import importlib
import inspect
import json
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

EVAL_MODULES = frozenset(
    {
        "argparse",
        "calendar",
        "collections",
        "concurrent",
        "configparser",
        "csv",
        "fractions",
        "functools",
        "glob",
        "heapq",
        "io",
        "ipaddress",
        "itertools",
        "json",
        "pathlib",
        "random",
        "shutil",
        "statistics",
        "string",
        "subprocess",
        "tarfile",
        "tempfile",
        "textwrap",
        "threading",
        "time",
        "urllib",
        "zipfile",
    }
)
"""Top-level modules that are only evaluated on; all others are trained on."""
EVAL_PAIRS = 210
"""Enough for a steady mean, few enough to be evaluated three times within the demo's time."""

SKIPPED_MODULES = frozenset(
    {
        "antigravity",
        "distutils",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "site-packages",
        "test",
        "this",
        "tkinter",
        "turtle",
        "turtledemo",
    }
)
"""Not part of the library that programs use, or not part of every Python."""
COMPILED_MODULES = (
    "array",
    "binascii",
    "builtins",
    "cmath",
    "collections",
    "datetime",
    "decimal",
    "errno",
    "functools",
    "gc",
    "io",
    "itertools",
    "marshal",
    "math",
    "os",
    "select",
    "signal",
    "socket",
    "struct",
    "sys",
    "time",
    "unicodedata",
)
"""Modules with parts in C, which have no source to read: imported, then asked for their docstrings."""

SHORTEST_PROSE = 60
LONGEST_PROSE = 300
"""Characters: with question and template a chat is then shorter than 256 tokens."""
QUESTIONS = (
    "What does `{name}` do?",
    "What is `{name}` for?",
    "Explain `{name}`.",
    "In Python, what is `{name}`?",
)

CODE_OR_MARKUP = re.compile(r">>>|\.\.(?!\w)|::|^\s*[-*+=#@:|]|--|[{}\\|<>]|\s{3,}|https?:", re.MULTILINE)
"""What marks a paragraph as an example, a list, a table, a heading, a directive or a signature."""
SIGNATURE = re.compile(r"\s*[\w.]+\(.*\)(\s*->.*|\s+--.*)?$")
ROLE = re.compile(r":[a-z]+(?::[a-z]+)?:`~?([^`]+)`")
SENTENCE_END = re.compile(r"(?<=[a-z0-9`'\")])[.!?](?=\s|$)")


class Document(NamedTuple):
    """An object of the library, and what is written about it."""

    name: str
    """Dotted, such as `json.JSONEncoder.default`."""
    kind: str
    """module, class, function, method or attribute."""
    owner: str
    """The kind of what it belongs to: module or class; empty for a module."""
    text: str
    """The docstring, or the prose made from it."""

    @property
    def module(self) -> str:
        """The top-level module, by which the splits are made."""
        return self.name.partition(".")[0]


def prose(docstring: str, longest: int = LONGEST_PROSE) -> str | None:
    """The leading prose of a docstring as one line, ended at a sentence's end; None when there is too little.

    Takes paragraphs until the first that is not prose, and whole sentences
    until `longest` characters.
    """
    paragraphs = re.split(r"\n\s*\n", without_signature(inspect.cleandoc(docstring)))
    kept = []
    for paragraph in paragraphs:
        if CODE_OR_MARKUP.search(paragraph) or paragraph.startswith((" ", "\t")):
            break
        kept.append(" ".join(paragraph.split()))
    text = ROLE.sub(r"`\1`", " ".join(kept)).replace("``", "`")
    ends = [match.end() for match in SENTENCE_END.finditer(text) if match.end() <= longest]
    if not ends or ends[-1] < SHORTEST_PROSE or not text.isascii():
        return None
    return text[: ends[-1]]


def without_signature(docstring: str) -> str:
    """The docstring without the calls' forms, such as `foo(x[, y]) -> z`, that built-in ones begin with."""
    lines = docstring.splitlines()
    while lines and (not lines[0].strip() or SIGNATURE.match(lines[0])):
        del lines[0]
    return "\n".join(lines)


def documented(tree: ast.Module | ast.ClassDef, prefix: str) -> Iterator[Document]:
    """Every public class, function and method with a docstring below a module or class."""
    owner = "class" if isinstance(tree, ast.ClassDef) else "module"
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or not is_public(
            node.name
        ):
            continue
        name = f"{prefix}.{node.name}"
        if docstring := ast.get_docstring(node):
            yield Document(name, kind_of(node, owner), owner, docstring)
        if isinstance(node, ast.ClassDef):
            yield from documented(node, name)


def kind_of(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, owner: str) -> str:
    """What a definition defines."""
    if isinstance(node, ast.ClassDef):
        return "class"
    if owner == "module":
        return "function"
    decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
    return "attribute" if decorators & {"property", "cached_property", "setter", "getter"} else "method"


def is_public(name: str) -> bool:
    """Whether a name, or every part of a dotted one, is meant for others."""
    return not any(part.startswith("_") for part in name.split("."))


def source_files(library: Path) -> Iterator[tuple[str, Path]]:
    """Dotted name and path of each public module of the library that is written in Python, sorted by path."""
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        name = ".".join(parts)
        if parts and not SKIPPED_MODULES.intersection(parts) and is_public(name) and "-" not in name:
            yield name, path


def from_sources(library: Path) -> Iterator[Document]:
    """Everything public and documented in the library's Python files."""
    for module, path in source_files(library):
        tree = ast.parse(path.read_bytes())
        if docstring := ast.get_docstring(tree):
            yield Document(module, "module", "", docstring)
        yield from documented(tree, module)


def from_compiled(module: ModuleType) -> Iterator[Document]:
    """The public built-in functions, classes and methods of a module that have a docstring."""
    # The names under which C extensions know themselves.
    origins = {module.__name__, f"_{module.__name__}", *(["posix"] if module.__name__ == "os" else [])}
    for name, member in _public_members(module):
        full_name = f"{module.__name__}.{name}"
        if getattr(member, "__module__", None) not in origins or inspect.isfunction(member):
            continue
        if inspect.isclass(member):
            yield Document(full_name, "class", "module", str(member.__doc__))
            for method_name, method in _public_members(member):
                kind = "method" if callable(method) else "attribute"
                yield Document(f"{full_name}.{method_name}", kind, "class", str(method.__doc__))
        elif callable(member):
            yield Document(full_name, "function", "module", str(member.__doc__))


def _public_members(owner: object) -> Iterator[tuple[str, object]]:
    return ((name, member) for name, member in sorted(vars(owner).items()) if is_public(name))


def distinct(documents: Iterable[Document]) -> list[Document]:
    """Those with enough prose, as prose, sorted by name; of equal texts (but for case and punctuation) the first."""
    by_text: dict[str, Document] = {}
    for document in sorted(documents):
        if (text := prose(document.text)) is not None:
            by_text.setdefault(normalised(text), document._replace(text=text))
    return list(by_text.values())


def normalised(text: str) -> str:
    """What two texts have in common when they differ in case, spaces and punctuation only."""
    return " ".join(re.findall(r"\w+", text.lower()))


def split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """(train, eval), apart by module. For eval, EVAL_PAIRS documents are chosen by the hash of their names."""
    train = [document for document in documents if document.module not in EVAL_MODULES]
    held_out = [document for document in documents if document.module in EVAL_MODULES]
    return train, sorted(sorted(held_out, key=name_hash)[:EVAL_PAIRS])


def name_hash(document: Document) -> int:
    """A number that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(document.name.encode()).digest()[:8])


def question(document: Document) -> str:
    """The question; its wording is chosen by the name's hash."""
    return QUESTIONS[name_hash(document) % len(QUESTIONS)].format(name=document.name)


def answer(document: Document) -> str:
    """What kind of thing it is and where it belongs, then the prose."""
    owner, _, last = document.name.rpartition(".")
    if document.kind == "module":
        return f"`{document.name}` is a module of Python's standard library. {document.text}"
    article = "an" if document.kind == "attribute" else "a"
    return f"`{last}` is {article} {document.kind} of the {document.owner} `{owner}`. {document.text}"


def record(document: Document) -> str:
    """A line of chat JSON."""
    messages = [
        {"role": "user", "content": question(document)},
        {"role": "assistant", "content": answer(document)},
    ]
    return json.dumps({"messages": messages}) + "\n"


def write_data(folder: Path) -> tuple[int, int]:
    """Write train.jsonl and eval.jsonl; returns how many records each has."""
    documents = list(from_sources(Path(sysconfig.get_path("stdlib"))))
    for name in COMPILED_MODULES:
        documents += from_compiled(importlib.import_module(name))
    train, held_out = split(distinct(documents))
    folder.mkdir(parents=True, exist_ok=True)
    for name, documents in (("train", train), ("eval", held_out)):
        unfinished = folder / f".{name}.jsonl.{os.getpid()}"
        unfinished.write_text("".join(map(record, documents)), encoding="utf-8")
        unfinished.replace(folder / f"{name}.jsonl")
    return len(train), len(held_out)


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Write questions and answers about Python's standard library."
    )
    parser.add_argument("folder", type=Path, help="folder to write train.jsonl and eval.jsonl into")
    folder = parser.parse_args().folder
    trained, evaluated = write_data(folder)
    print(f"{folder}: {trained} pairs to train on, {evaluated} pairs of other modules to evaluate on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
