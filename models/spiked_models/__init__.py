"""Detection networks: loading, streaming, training, and the weights that ship."""
