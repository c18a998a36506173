"""From prompts to what the UNet attends to: the tokenizer and the conditioning made with the text encoders."""
