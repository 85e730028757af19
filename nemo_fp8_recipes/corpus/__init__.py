"""Token files in Megatron's format: made from text, and read far enough to be checked. Imports no torch.

documents    text files, split into documents
tokenizer    text to token ids: a Hugging Face tokenizer.json, or bytes
index_file   the formats of .bin and .idx
build        documents in, .bin, .idx and a description out
"""
