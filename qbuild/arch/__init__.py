"""Model families: what they are called, how their tensors become GGUF ones, and which types they get."""
