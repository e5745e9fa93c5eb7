"""The diffusion process: noise schedules, loss weights, the pretraining objective and a deterministic sampler."""

from gaitfast.diffusion.schedule import NoiseSchedule
from gaitfast.diffusion.weighting import loss_weights

__all__ = ["NoiseSchedule", "loss_weights"]
