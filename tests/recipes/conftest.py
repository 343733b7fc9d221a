from tests.recipes.tiny import bert, chat, gpt2, t5

__all__ = ["bert", "chat", "gpt2", "t5"]
