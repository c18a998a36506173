"""Weights files and the names in them; knows no model.

reader   `open_weights(path)`: a safetensors file or a pickle, as a lazy mapping from name to tensor
folder   `open_folder_component(folder)`: the same for one component of a diffusers folder, shards merged
layout   `identify(shapes)`: which layout, family and components these names and shapes are
native   `native_state(weights, component, layout)`, `check_complete`, `load_tensors`: every name claimed, then read
export   `export_plan`, `write_diffusers` and `write_single_file`: native names back to the published layouts
keymap   the name tables, with `openclip` for the text encoders of SD2 and SDXL; `edits` applies what they ask for
"""
