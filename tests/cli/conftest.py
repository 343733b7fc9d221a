from tests.recipes.tiny import bert, gpt2, t5

__all__ = ["bert", "gpt2", "t5"]
