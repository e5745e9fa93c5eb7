"""The training engine: DeepSpeed ZeRO, the loop, checkpoints and meters. Model, loss and loader are passed in."""
