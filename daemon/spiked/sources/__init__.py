"""Sources: who sends samples. Sockets and files in, blocks of device samples out."""
