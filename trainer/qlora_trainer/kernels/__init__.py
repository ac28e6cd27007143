"""The compiled kernels: one library in C++ without a word of torch in it, a variant of each kernel per processor tier.

A plain C ABI, so that one binary serves every torch. `build` compiles it in seconds; `library` loads it and says which
tier runs. What its functions mean is told by the Python that calls them, in the rooms above.
"""
