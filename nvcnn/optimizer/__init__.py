"""From gradients to new weights: the arena that holds both, the allreduces, the learning rates and LARC."""
