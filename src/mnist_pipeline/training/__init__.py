"""How the network learns: the loop, its optimizers and augmentation, and the checkpoint that survives a kill."""
