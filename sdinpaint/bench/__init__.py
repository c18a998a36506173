"""The benchmark suite: what `sdinpaint bench` measures, beside the peers that are asked for.

`suite` runs `parts` over `cases`; `systems` are this library and its peers; `rows` are what is kept and shown.
"""
