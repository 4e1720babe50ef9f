"""The checks of tools/gpu_check.py: what the project does on a real GPU, and how fast.

``table.py`` lists them in order of worth; ``runner.py`` keeps the budget and writes the results; ``workers.py`` gives
each a process of its own. A check is a function ``(context, **options) -> Findings`` in one of the other files. It runs
on a CPU too, with toy sizes and the same code; what a CPU cannot measure is None there.
"""
