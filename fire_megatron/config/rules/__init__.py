"""The rules on a recipe, by subject. Each is a function that looks at what is known and yields what is wrong.

A rule stands here once, whoever asks it (config/checks.py): before torch is imported with what the recipe and the
checkpoints' JSON files tell, later with the machine, the hooks and the tokenizers as well. A rule that needs something
which is not known yet says nothing.
"""
