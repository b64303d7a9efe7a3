"""The network, its predictions, and the file of a trained one."""
