"""The Llama / Qwen3 network, its loss, and its description for Hugging Face.

The model runs no collective and knows no rank: parallelism is applied to a finished model (`parallel/`). Read
`transformer.py` first.
"""
