"""LoRAs, adapters like them, and textual inversions: reading, adding to a model, writing."""
