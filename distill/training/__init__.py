"""Training with Lightning: module, data module, EMA, checkpoints, callbacks and loggers."""
