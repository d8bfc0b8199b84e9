"""The language model as one process sees it; no file here knows ranks or optimizers.

Reading order: transformer (the whole model), attention, layers, loss, matmul (the types that products are computed
in), hf_config (Hugging Face's config.json).
"""
