"""Files to named tensors: safetensors, GGUF, and the folder or file that makes a checkpoint."""
