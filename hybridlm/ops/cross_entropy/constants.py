IGNORE = -100  # the label of a position that is no target, as everywhere in PyTorch
