"""Read and write weights files, and translate the tensor names in them; no model class is needed.

reader   `open_weights(path)` opens a safetensors file or a pickle as a lazy mapping from name to tensor
folder   `open_folder_component(folder)` does so for one component of a diffusers folder, with its shards merged
layout   `identify(shapes)` recognises layout, family and components from names and shapes
native   `native_state(weights, component, layout)`, `check_complete` and `load_tensors` map names and read tensors
export   `export_plan`, `write_diffusers` and `write_single_file` write native names in the published layouts
keymap   the name tables, with `openclip` for the text encoders of SD2 and SDXL; `edits` applies their edits
"""
