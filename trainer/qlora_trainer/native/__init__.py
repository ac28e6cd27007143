"""Extensions in C++, compiled ahead for the torch and the Python that are installed.

An extension is `csrc/NAME.cpp` and its description `csrc/NAME.toml` (see `extension.Extension`) in the room that uses
it. This room finds them all, and knows none of them by name.
"""
