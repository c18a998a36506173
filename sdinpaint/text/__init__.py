"""Prompts to text conditioning for the UNet: the tokenizer, and the text encoders' embeddings."""
