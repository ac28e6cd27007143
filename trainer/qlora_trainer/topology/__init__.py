"""Which CPUs, threads and memory each rank of a pod gets: a machine read, a layout decided, a rank set up by it.

Standard library only: all of it happens before torch is imported.
"""
