"""Detection: the streaming network and the peaks of its output."""
