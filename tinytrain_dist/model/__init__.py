"""The language model. No file here knows ranks or optimizers.

Reading order: transformer (the whole model), attention, layers, loss, matmul (matrix products and their types),
fp8 (products in float8), huggingface_config (Hugging Face's config.json).
"""
