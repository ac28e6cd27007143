"""What models are stored in: each form makes weights of what its files hold, one at a time.

A form is a file here with `matches`, and an entry of FORMATS. GGUF is another kind of file, not another kind of tensor,
and stands beside them.
"""
