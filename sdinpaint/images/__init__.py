"""Images as arrays: read, written, cropped, filled, extended, blended and laid out on sheets; no network is needed."""
