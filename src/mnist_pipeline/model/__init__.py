"""The network, the file that carries a trained one, and how it answers."""
