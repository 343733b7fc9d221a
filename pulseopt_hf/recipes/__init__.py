"""YAML recipes, from a file to a finished run.

What only reads recipes (`catalogue`, `reading`, `errors`) loads neither torch nor Transformers.
"""
