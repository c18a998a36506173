"""The networks, with the parameter names of the official single-file checkpoints."""

from sdinpaint.families import ControlNetConfig
from sdinpaint.models.clip import CLIPText
from sdinpaint.models.controlnet import ControlNet
from sdinpaint.models.unet import UNet
from sdinpaint.models.vae import VAE

__all__ = ["VAE", "CLIPText", "ControlNet", "ControlNetConfig", "UNet"]
