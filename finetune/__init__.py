"""Parley: fine-tuning of speech-text language models over Mimi codes."""
