"""From text to tokens and back: model metadata, chat templates, tokenizer, detokenizer, block hashes.

A library without state or network, shared by preprocess (which prepares prompts) and the model service (which
does it itself when preprocess is away, and turns tokens into text).
"""
