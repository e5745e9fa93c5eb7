"""Foreign checkpoints in and out. Each module has `load_state_dict(model, sd)` and `state_dict(model)`."""
