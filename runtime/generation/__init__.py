"""Generation: prompts in, text out, token by token."""
