import ct  # noqa: F401 (Ctrl-C while torch is imported is one line)
