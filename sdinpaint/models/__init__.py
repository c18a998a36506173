"""The networks, written by hand. A parameter's name is its name in the official single-file checkpoint."""

from sdinpaint.models.clip import CLIPText
from sdinpaint.models.controlnet import ControlNet, ControlNetConfig
from sdinpaint.models.unet import UNet
from sdinpaint.models.vae import VAE

__all__ = ["VAE", "CLIPText", "ControlNet", "ControlNetConfig", "UNet"]
