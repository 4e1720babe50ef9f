"""Making files of prompts from published sets: a satellite, which training does not import."""
