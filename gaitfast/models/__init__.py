"""Networks: the gait models whose backbones are pretrained, the video denoiser, and the frozen autoencoder."""

from gaitfast.models.autoencoder import build_autoencoder
from gaitfast.models.denoiser import build_denoiser
from gaitfast.models.recognizer import build_recognizer

__all__ = ["build_autoencoder", "build_denoiser", "build_recognizer"]
