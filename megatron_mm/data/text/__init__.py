"""Tokenizer, chat templates, documents."""
