"""Where ranks may run, and with which CPUs, or why nowhere. Pure: nothing here talks to anyone."""
