"""YAML recipes, from a file to a finished run.

What only reads recipes (`catalogue`, `reading`) loads neither torch nor Transformers.
"""
