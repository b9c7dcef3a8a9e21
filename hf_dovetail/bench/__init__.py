"""Measurement: rows of one run on the same prompts, a widened target, llama.cpp beside it, comparison and bars."""
