"""What trained the shipped demo checkpoint: procedural scenes, their judge, and the inpainting objective."""
