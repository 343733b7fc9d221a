"""YAML recipes, from a file to a finished run.

What only reads recipes (`catalogue`, `yaml_file`) loads neither torch nor Transformers.
"""
