from tests.recipes.tiny import bert

__all__ = ["bert"]
