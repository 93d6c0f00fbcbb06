"""What optimizers and balancers share: losses, gradients, flat memory, search."""
