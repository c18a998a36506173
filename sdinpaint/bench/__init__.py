"""The benchmark suite behind `sdinpaint bench`.

`suite` runs the `parts` over `cases`; `peers` holds sdinpaint and the baselines; `report` keeps rows and makes pages.
"""
